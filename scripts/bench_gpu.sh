#!/usr/bin/env bash
# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#
# All figures of a GPU, in named parts of at most eight minutes each:
#
#   [COMMIT=id] scripts/bench_gpu.sh WHEEL_DIR OUT_DIR [PART ...]
#
# WHEEL_DIR holds the mrv1 wheel built with CUDA, and wheels of what the machine lacks. Each part
# writes PART.json (records, see docs/benchmarks.md) and PART.log (the table) to OUT_DIR. A part
# that has been measured is not measured again; delete its .json to repeat it. COMMIT is what the
# records say the wheel was built from; default: that of the checkout. Parts, all of them by
# default:
#
#   decode-0.6b decode-8b              steps at batch 1 to 256, beside vLLM
#   prefill-0.6b prefill-8b            256 prompts of 1024 tokens
#   mix-0.6b mix-8b                    256 requests of many lengths
#   decode-30b prefill-30b             the same with experts
#   decode-8b-nvfp4 prefill-8b-nvfp4 decode-30b-nvfp4 prefill-30b-nvfp4    with NVFP4 weights
#   linear-0.6b linear-8b linear-8b-nvfp4    the matrix products of a layer
#   attention-8b                       batch x context, and uneven lengths, by two backends
#   profile-0.6b-1 profile-8b-1 profile-8b-64 profile-8b-256    where the rest of a step goes
#   sampler                            the draw of a token for each row
#   kv-write                           writes to a paged KV cache
#   kv-attention kv-attention-uneven   decode attention by itself, over caches of all formats
#   load-0.6b load-8b                  a model directory from the disk, twice
#
# and only where they are named, on a host with two GPUs:
#
#   mix-1024-8b                        1,024 requests on one GPU, to compare with
#   pp2-decode-8b pp2-prefill-8b pp2-mix-8b pp2-mix-1024-8b     the same on two stages; mixes leave
#                                      PART.trace.json for https://ui.perfetto.dev
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage="usage: [COMMIT=id] scripts/bench_gpu.sh WHEEL_DIR OUT_DIR [PART ...]"
wheels=${1:?${usage}}
out=${2:?${usage}}
shift 2
parts=("$@")
((${#parts[@]})) || parts=(decode-0.6b decode-8b prefill-0.6b prefill-8b mix-0.6b mix-8b
  decode-30b prefill-30b decode-8b-nvfp4 prefill-8b-nvfp4 decode-30b-nvfp4 prefill-30b-nvfp4
  linear-0.6b linear-8b linear-8b-nvfp4 attention-8b profile-0.6b-1 profile-8b-1 profile-8b-64 profile-8b-256
  kv-write kv-attention kv-attention-uneven sampler load-0.6b load-8b)
commit=${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}

scratch=$(mktemp -d)
trap 'rm -rf "${scratch}"' EXIT
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
  --target "${scratch}/site" "${wheels}"/*.whl || exit 1
export PYTHONPATH=${scratch}/site PYTHONUNBUFFERED=1
mkdir -p "${out}"
out=$(cd "${out}" && pwd)

shape_of() {
  case $1 in
    *-0.6b*) echo qwen3-0.6b ;;
    *-30b*) echo qwen3-30b-a3b ;;
    *) echo llama3-8b ;;
  esac
}

# bench PART FIGURE [OPTION ...]: the records are there only once they are whole.
bench() {
  local part=$1 figure=$2
  shift 2
  timeout 480 python3 -m mrv1 bench "${figure}" --device cuda --no-progress --commit "${commit}" \
    --peers benchmarks/peers/h200_vllm.json --json "${scratch}/${part}.json" "$@" &&
    mv "${scratch}/${part}.json" "${out}/${part}.json"
}

# Writes the directory, then loads it twice: from the disk as far as the system has not kept it,
# and from memory.
load() {
  local part=$1 shape=$2
  timeout 480 python3 - "${shape}" "${scratch}/${part}" "${scratch}/${part}.json" <<'PYTHON' &&
import json
import sys
import time

from mrv1 import shapes
from mrv1.loader import RunnerOptions, load_model
from mrv1.random_model import save_random_model

shape, directory, path = sys.argv[1:]
save_random_model(directory, shapes.shape_config(shape)[1], progress=False)
options = RunnerOptions(device="cuda", max_model_len=2048)
seconds = []
for _ in range(2):
    start = time.perf_counter()
    model = load_model(directory, options, progress=False)
    total = time.perf_counter() - start
    phases = {name: round(value, 4) for name, value in model.startup.items()}
    seconds.append(
        {"shape": shape, "total": round(total, 3), "seconds": phases, "bytes": model.startup_bytes}
    )
    print(seconds[-1], model.runner.memory_plan, flush=True)
    model.runner.close()
    model.device.close()
with open(path, "w") as file:
    json.dump(seconds, file, indent=1)
PYTHON
    mv "${scratch}/${part}.json" "${out}/${part}.json"
  local status=$?
  rm -rf "${scratch:?}/${part}"
  return ${status}
}

# run_mix PART [OPTION ...]: as many requests as the part's name says.
run_mix() {
  local part=$1 requests=256
  shift
  [[ ${part} == *-1024-* ]] && requests=1024
  bench "${part}" mix --shape "$(shape_of "${part}")" --requests "${requests}" "$@"
}

run_part() {
  local part=$1 shape figure weights=bf16
  shape=$(shape_of "${part}")
  [[ ${part} == *-nvfp4 ]] && weights=nvfp4
  case ${part} in
    pp2-mix-*)
      run_mix "${part}" --pipeline-parallel-size 2 --trace "${out}/${part}.trace.json"
      ;;
    pp2-*)
      figure=${part#pp2-}
      bench "${part}" "${figure%%-*}" --shape "${shape}" --pipeline-parallel-size 2
      ;;
    decode-*) bench "${part}" decode --shape "${shape}" --weights "${weights}" ;;
    prefill-*) bench "${part}" prefill --shape "${shape}" --weights "${weights}" ;;
    mix-*) run_mix "${part}" ;;
    linear-*)
      bench "${part}" op --shape "${shape}" --weights "${weights}" \
        --ops qkv_proj,o_proj,gate_up_proj,down_proj,logits
      ;;
    attention-8b)
      # The heads of Llama-3-8B, with room for longer contexts.
      bench "${part}" op --shape qwen3-8b --ops attention --context 1024,8192,16384 \
        --lengths even,log-uniform,one-long --backend native,flashinfer --steps 20
      ;;
    profile-*) bench "${part}" profile --shape "${shape}" --batch "${part##*-}" ;;
    kv-attention)
      bench "${part}" decode_attention --group 1,4,8 --layout HND,NHD
      ;;
    kv-attention-uneven)
      # The second has as many bytes in rows of one length.
      bench "${part}" decode_attention --batch 256 --context 766 --lengths one-long,even
      ;;
    kv-write) bench "${part}" kv_write --kv-heads 1,2,4,8,32,128 --launches overlapped,plain ;;
    sampler) bench "${part}" sampler ;;
    load-*) load "${part}" "${shape}" ;;
    *)
      echo "no part '${part}'" >&2
      return 2
      ;;
  esac
}

status=0
for part in "${parts[@]}"; do
  [[ -e ${out}/${part}.json ]] && continue
  start=${SECONDS}
  if run_part "${part}" > "${out}/${part}.log" 2>&1; then
    verdict=measured
  else
    verdict=FAILED
    status=1
  fi
  printf '%-16s %-9s %4d s\n' "${part}" "${verdict}" $((SECONDS - start)) |
    tee -a "${out}/summary.txt"
  cat "${out}/${part}.log"
done
exit ${status}
