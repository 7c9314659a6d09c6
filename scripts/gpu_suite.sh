#!/usr/bin/env bash
# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#
# What must pass on a machine with a GPU, in named parts that add to one report:
#
#   scripts/gpu_suite.sh WHEEL_DIR REPORT_DIR [PART ...]
#
# WHEEL_DIR holds the mrv1 wheel built with CUDA, and wheels of what the machine lacks. Parts:
# smoke (seconds: does the build load and draw a token), suite (the tests that take --device),
# memcheck, racecheck, initcheck, synccheck (compute-sanitizer over the op tests and whole
# steps; racecheck over steps alone). Default: all.
# A part that has passed is not run again; delete its .ok file in REPORT_DIR to repeat it.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage="usage: scripts/gpu_suite.sh WHEEL_DIR REPORT_DIR [PART ...]"
wheels=${1:?${usage}}
report=${2:?${usage}}
shift 2
parts=("$@")
((${#parts[@]})) || parts=(smoke suite memcheck racecheck initcheck synccheck)

site=$(mktemp -d)
trap 'rm -rf "${site}"' EXIT
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "${site}" \
  "${wheels}"/*.whl || exit 1
export PYTHONPATH=${site} PYTHONUNBUFFERED=1
mkdir -p "${report}"

# The kernels of this project alone: those of libraries are theirs to check, and slow the tools down.
sanitizer() {
  local tool=$1
  shift
  timeout 120 compute-sanitizer --tool "${tool}" --error-exitcode 9 --target-processes all \
    --kernel-name kns=mrv1 --kernel-name-exclude kns=flashinfer "$@"
}

# Whole steps with every kind of sampling, eager and as graphs, so that each kernel runs under the
# tool; the sampler over odd vocabularies, less of it under racecheck; and the op tests, with their odd
# shapes, except under racecheck, which is too slow for them.
sanitized() {
  if [[ $1 != racecheck ]]; then
    MRV1_TEST_EXAMPLES=6 sanitizer "$1" python3 -m pytest -q -p no:cacheprovider --device cuda \
      tests/test_ops_parity.py tests/test_moe_ops.py tests/test_moe_sizes.py \
      tests/test_kv_attention.py tests/test_nvfp4.py || return 1
  fi
  local tokens=6 examples=6
  [[ $1 == racecheck ]] && tokens=2 examples=2
  MRV1_TEST_EXAMPLES=${examples} sanitizer "$1" python3 -m pytest -q -p no:cacheprovider \
    --device cuda -k "equal_the_reference or small_row or left_of or any_pieces" \
    tests/test_sampler.py tests/test_sampler_edits.py tests/test_sampler_logprobs.py || return 1
  # Of several GPUs where there are. That peers are enabled already is an error of the API, and expected.
  sanitizer "$1" --report-api-errors no python3 -m pytest -q -p no:cacheprovider --device cuda \
    -k "(columns and float32 or bias or come) and (one_shot or two_shot)" \
    tests/test_collectives.py || return 1
  # Without the largest batch: under the tools it takes a rank more than its 8 s.
  sanitizer "$1" --report-api-errors no python3 -m pytest -q -p no:cacheprovider --device cuda \
    -k "(random_lives and 7) or arrive_whole" tests/test_stages.py || return 1
  sanitizer "$1" python3 - "${tokens}" <<'PYTHON'
import pathlib
import sys

import mrv1
from mrv1 import LLM, SamplingParams, StructuredOutputsParams

count = int(sys.argv[1])
params = [
    SamplingParams(temperature=0.0, max_tokens=count),
    SamplingParams(temperature=0.8, max_tokens=count, seed=1),
    SamplingParams(temperature=0.8, top_k=5, max_tokens=count, seed=2, min_tokens=1),
    SamplingParams(temperature=1.2, top_p=0.9, min_p=0.02, top_k=50, max_tokens=count, seed=3),
]
# Every edit of logits, and logprobs before them.
edited = [
    SamplingParams(temperature=0.0, max_tokens=count, presence_penalty=0.5, frequency_penalty=0.2,
                   repetition_penalty=1.2, logprobs=5, prompt_logprobs=2),
    SamplingParams(temperature=0.8, max_tokens=count, seed=5, logit_bias={7: 2.0, 11: -3.0},
                   bad_words=["the", "a time"], logprobs=0),
    SamplingParams(temperature=0.8, top_k=5, max_tokens=count, seed=6, min_tokens=2,
                   stop_token_ids=[5, 6], allowed_token_ids=list(range(64)), logprobs=20),
    SamplingParams(temperature=1.2, top_p=0.9, max_tokens=count, seed=7, frequency_penalty=0.3,
                   bad_words=["Once"], logit_bias={3: 1.0}, stop_sequences=[[1, 2]]),
]
# Steps with such a row are cut before the draw.
words = StructuredOutputsParams(regex="[a-z ]{9,}")
bound = [SamplingParams(seed=4, max_tokens=count, structured_outputs=words), params[0]]
demo = pathlib.Path(mrv1.__file__).parent / "demo"
for dtype, mode, cache in (
    ("float32", "eager", "auto"), ("bfloat16", "eager", "auto"), ("bfloat16", "full", "auto"),
    ("bfloat16", "eager", "fp8_e4m3"), ("bfloat16", "full", "fp8_e4m3"),
    ("bfloat16", "eager", "fp8_e5m2"),
):
    with LLM(demo, device="cuda", dtype=dtype, kv_cache_dtype=cache, graph_mode=mode,
             capture_sizes=[4], piecewise_sizes=[], max_num_batched_tokens=8, max_num_seqs=4,
             progress=False, num_kv_blocks=64) as llm:
        for together in (params, edited, bound):
            for result in llm.generate(["Once upon a time"] * len(together), together):
                print(dtype, mode, cache, result.finish_reason, result.token_ids)
PYTHON
}

run_part() {
  case $1 in
    smoke)
      python3 - <<'PYTHON'
from mrv1 import LLM, SamplingParams, _core
import mrv1, pathlib
print(_core.cuda_describe())
demo = pathlib.Path(mrv1.__file__).parent / "demo"
with LLM(demo, device="cuda", dtype="float32", progress=False) as llm:
    print(llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=16))[0].text)
PYTHON
      ;;
    suite)
      # Every test file whose tests take the device.
      grep -lE '\b(native_)?device: ' tests/test_*.py |
        xargs python3 -m pytest -q -p no:cacheprovider --device cuda --durations=5
      ;;
    memcheck | racecheck | initcheck | synccheck) sanitized "$1" ;;
    *)
      echo "no part '$1'" >&2
      return 2
      ;;
  esac
}

status=0
for part in "${parts[@]}"; do
  [[ -e ${report}/${part}.ok ]] && continue
  start=${SECONDS}
  if run_part "${part}" > "${report}/${part}.log" 2>&1; then
    touch "${report}/${part}.ok"
    verdict=passed
  else
    verdict=FAILED
    status=1
  fi
  closing=$(grep -E 'passed|failed|ERROR SUMMARY' "${report}/${part}.log" | tail -n 2 | tr '\n' ' ')
  printf '%-10s %-7s %4d s  %s\n' "${part}" "${verdict}" $((SECONDS - start)) "${closing}" |
    tee -a "${report}/summary.txt"
done
exit ${status}
