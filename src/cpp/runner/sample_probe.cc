// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/sample_probe.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "core/device.h"
#include "core/error.h"
#include "core/probes.h"
#include "ops/kernels.h"
#include "program/probe_timing.h"
#include "runner/row_lists.h"
#include "state/output_ring.h"

namespace mrv1 {
namespace {

constexpr const char* kWhere = "sample_probe";
constexpr uint64_t kSeed = 1;
// Copies are the first one turned by multiples of so many logits.
constexpr int64_t kTurn = 977;

}  // namespace

SampleProbe::SampleProbe(std::shared_ptr<Device> device, const Options& options)
    : device_(std::move(device)), options_(options) {
  const RowSpec& spec = options_.spec;
  check(options_.batch > 0 && options_.copies > 0, kWhere, "batch is ", options_.batch,
        " and copies ", options_.copies, "; both must be positive");
  check(options_.vocab_size > 0 && options_.vocab_size <= kMaxSampledVocab, kWhere,
        "vocab_size is ", options_.vocab_size, "; must be in [1, ", kMaxSampledVocab, "]");
  check(!spec.token_ids.empty() && spec.prompt_len > 0 &&
            spec.prompt_len <= static_cast<int32_t>(spec.token_ids.size()),
        kWhere, "prompt_len is ", spec.prompt_len, "; must be in [1, ", spec.token_ids.size(),
        "], the tokens given");
  check(!spec.grammar && spec.num_prompt_logprobs < 0, kWhere,
        "grammars and logprobs of prompts are no part of it");
  for (const int32_t id : spec.token_ids) {
    check(id >= 0 && id < options_.vocab_size, kWhere, "token id ", id, " is outside [0, ",
          options_.vocab_size, ")");
  }
  check_row_lists(spec, options_.vocab_size, std::max(spec.num_logprobs, -1));
  make_rows();
  make_logits();
}

Buffer& SampleProbe::allocate(size_t bytes) {
  return buffers_.emplace_back(device_->allocate(std::max<size_t>(bytes, 1), kWhere));
}

template <typename T>
T* SampleProbe::put(const std::vector<T>& values) {
  auto* data = static_cast<T*>(allocate(values.size() * sizeof(T)).data());
  device_->copy_in(data, values.data(), values.size() * sizeof(T));
  return data;
}

void SampleProbe::make_rows() {
  const RowSpec& spec = options_.spec;
  const int32_t batch = options_.batch;
  const auto total_len = static_cast<int32_t>(spec.token_ids.size());
  RowState& state = ctx_.rows;
  state.num_rows = batch;
  state.max_model_len = std::max(spec.prompt_len + spec.max_tokens, total_len + 1);
  state.vocab_size = options_.vocab_size;
  state.max_logprobs = spec.num_logprobs;
  std::vector<Row> rows(static_cast<size_t>(batch));
  std::vector<SamplingRow> sampling(rows.size());
  std::vector<int32_t> tokens(rows.size() * static_cast<size_t>(state.max_model_len));
  std::vector<int32_t> words;
  RowLists lists;
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i].phase = RowPhase::kDecode;
    rows[i].prompt_len = spec.prompt_len;
    rows[i].num_computed = total_len - 1;
    rows[i].total_len = total_len;
    rows[i].min_total_len = spec.prompt_len + spec.min_tokens;
    rows[i].max_total_len = state.max_model_len;
    sampling[i] = plain_sampling_row(spec, options_.vocab_size, 0);
    sampling[i].seed = spec.seed + i;
    lists.build(spec, options_.vocab_size, state.max_model_len, sampling[i]);
    std::copy(spec.token_ids.begin(), spec.token_ids.end(),
              tokens.begin() + static_cast<int64_t>(i) * state.max_model_len);
    words.insert(words.end(), lists.words.begin(), lists.words.end());
    words.resize((i + 1) * static_cast<size_t>((lists.num_words + 3) / 4 * 4));
  }
  int32_t* const pool = put(words);
  for (size_t i = 0; i < rows.size(); ++i)
    sampling[i].words = pool + words.size() / rows.size() * i;
  state.rows = put(rows);
  state.sampling = put(sampling);
  state.tokens = put(tokens);

  std::vector<int32_t> numbers(rows.size());
  std::iota(numbers.begin(), numbers.end(), 0);
  InferParams& infer = ctx_.infer;
  infer.max_requests = infer.max_tokens = infer.max_logits = batch;
  infer.row = infer.logits_batch = infer.logits_entry = put(numbers);
  infer.logits_place = put(std::vector<int32_t>(rows.size(), 0));
  infer.sampled = put(std::vector<int32_t>(rows.size(), kNoToken));
  StepRings& rings = ctx_.rings;
  rings.num_slots = 1;
  rings.output_bytes =
      output_tokens_end(batch, 0) + batch * logprob_record_bytes(state.max_logprobs);
  // As in a step, where the host reads it.
  buffers_.push_back(device_->allocate_mapped(static_cast<size_t>(rings.output_bytes), kWhere));
  rings.output = static_cast<char*>(buffers_.back().data());
  rings.step = put(std::vector<uint64_t>{0});

  ctx_.device = device_.get();
  ctx_.pool = device_->pool();
  ctx_.stream = device_->stream();
  ctx_.sizes = {batch, batch, batch};
  WorkspaceLimits limits{};
  limits.vocab_size = options_.vocab_size;
  limits.max_logits = batch;
  limits.num_threads = ctx_.pool != nullptr ? ctx_.pool->num_threads() : 1;
  ctx_.workspace_bytes = static_cast<size_t>(device_->kernels().workspace_bytes(limits));
  ctx_.workspace = allocate(ctx_.workspace_bytes).data();
}

void SampleProbe::make_logits() {
  std::vector<float> values(static_cast<size_t>(copy_elements()));
  std::mt19937 random(kSeed);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  for (float& value : values) value = normal(random);
  const size_t bytes = values.size() * sizeof(float);
  logits_ = static_cast<float*>(allocate(bytes * static_cast<size_t>(options_.copies)).data());
  sum_ = put(std::vector<uint64_t>{0});
  for (int32_t copy = 0; copy < options_.copies; ++copy) {
    device_->copy_in(logits_ + copy * copy_elements(), values.data(), bytes);
    std::rotate(values.begin(), values.begin() + kTurn % copy_elements(), values.end());
  }
}

std::vector<double> SampleProbe::time_runs(int32_t repeats) {
  const Kernels& kernels = device_->kernels();
  std::vector<double> seconds = time_probe(
      *device_,
      [&] {
        for (int32_t copy = 0; copy < options_.copies; ++copy) {
          kernels.count_tokens(ctx_);
          kernels.sample({logits_ + copy * copy_elements(), options_.vocab_size}, ctx_);
        }
      },
      repeats);
  for (double& run : seconds) run /= options_.copies;
  return seconds;
}

std::vector<double> SampleProbe::time_reads(int32_t repeats) {
  check(device_->type() == DeviceType::kCuda, kWhere, "plain reads are timed on a GPU only");
  // Whole words, aligned to 16 bytes: all but the last logits of a copy, if at all.
  constexpr int64_t kAligned = 4;
  std::vector<double> seconds = time_probe(
      *device_,
      [&] {
        for (int32_t copy = 0; copy < options_.copies; ++copy) {
          const int64_t first = copy * copy_elements() / kAligned * kAligned;
          cuda::read_words(*device_, reinterpret_cast<const uint64_t*>(logits_ + first),
                           copy_elements() / 2, sum_);
        }
      },
      repeats);
  for (double& run : seconds) run /= options_.copies;
  return seconds;
}

std::vector<int32_t> SampleProbe::tokens() {
  std::vector<int32_t> values(static_cast<size_t>(options_.batch));
  device_->copy_out(values.data(), ctx_.infer.sampled, values.size() * sizeof(int32_t));
  return values;
}

const float* SampleProbe::logits(int32_t copy) const {
  check(copy >= 0 && copy < options_.copies, kWhere, "copy ", copy, " is outside [0, ",
        options_.copies, ")");
  return logits_ + copy * copy_elements();
}

}  // namespace mrv1
