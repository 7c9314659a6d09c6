// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "program/session.h"

#include <algorithm>
#include <chrono>
#include <limits>

#include "core/device.h"
#include "core/error.h"
#include "core/probes.h"

namespace mrv1 {
namespace {

// As a runner has them, so that products of sizes stay within 64 bits.
ProgramSession::Limits checked_limits(const ProgramSession::Limits& limits) {
  const auto positive = [](int64_t value, const char* name, int64_t limit) {
    check(value > 0 && value <= limit, "session", name, " must be in [1, ", limit, "], not ",
          value);
  };
  positive(limits.max_requests, "max_requests", 1 << 16);
  positive(limits.max_tokens, "max_tokens", 1 << 24);
  positive(limits.max_logits, "max_logits", 1 << 24);
  positive(limits.block_size, "block_size", 4096);
  positive(limits.num_blocks, "num_blocks",
           std::numeric_limits<int32_t>::max() / limits.block_size);
  positive(limits.max_blocks, "max_blocks", 1 << 24);
  positive(limits.max_position, "max_position", 1 << 24);
  return limits;
}

}  // namespace

ProgramSession::ProgramSession(std::shared_ptr<Device> device, Program program,
                               const Limits& limits)
    : device_(std::move(device)),
      program_(std::move(program)),
      limits_(checked_limits(limits)),
      weights_(program_, *device_) {
  const auto ints = [&](int64_t count) {
    buffers_.push_back(device_->allocate(static_cast<size_t>(count) * 4, "session"));
    return static_cast<int32_t*>(buffers_.back().data());
  };
  InferParams& infer = ctx_.infer;
  infer.max_requests = limits.max_requests;
  infer.max_tokens = limits.max_tokens;
  infer.max_logits = limits.max_logits;
  infer.counts = reinterpret_cast<InferCounts*>(ints(sizeof(InferCounts) / 4));
  infer.row = ints(limits.max_requests);
  infer.query_start_loc = ints(limits.max_requests + 1);
  infer.seq_lens = ints(limits.max_requests);
  infer.entry_batch = ints(limits.max_requests);
  infer.sampled = ints(limits.max_requests);
  infer.token_batch = ints(limits.max_tokens);
  infer.token_ids = ints(limits.max_tokens);
  infer.positions = ints(limits.max_tokens);
  const auto groups = static_cast<int64_t>(std::max<size_t>(1, program_.kv_layout().groups.size()));
  infer.slot_mapping = ints(groups * limits.max_tokens);
  infer.logits_indices = ints(limits.max_logits);
  infer.logits_batch = ints(limits.max_logits);
  infer.row_lengths = nullptr;
  RowState& rows = ctx_.rows;
  rows.num_rows = limits.max_requests;
  rows.num_groups = static_cast<int32_t>(groups);
  rows.block_size = limits.block_size;
  rows.max_blocks = limits.max_blocks;
  rows.max_model_len = static_cast<int32_t>(std::min<int64_t>(
      int64_t{limits.max_blocks} * limits.block_size, std::numeric_limits<int32_t>::max()));
  rows.block_table = ints(groups * limits.max_requests * limits.max_blocks);
  ctx_.device = device_.get();
  ctx_.pool = device_->pool();
  ctx_.stream = device_->stream();

  const DType kv_dtype = limits.kv_cache_dtype.value_or(program_.dtype());
  const int64_t keys = int64_t{limits.max_requests} * rows.max_model_len;
  const PlanLimits plan{limits.max_tokens, limits.max_logits, limits.max_requests,
                        kv_dtype == DType::kE4M3 ? keys : 0};
  const KvScaleKind kind = is_float8(kv_dtype) ? limits.kv_scales : KvScaleKind::kNone;
  for (const HeadShape& heads : program_.kv_layers()) {
    KvCacheLayer layer =
        kv_cache_layer(kv_dtype, limits.num_blocks, limits.block_size, heads, kind);
    for (void** side : {&layer.key, &layer.value}) {
      buffers_.push_back(device_->allocate(static_cast<size_t>(layer.bytes()), "session KV cache"));
      *side = buffers_.back().data();
    }
    kv_.push_back(layer);
    if (kind == KvScaleKind::kNone) continue;
    for (const bool values : {false, true}) {
      KvScales& scales = kv_.back().scales;
      const int64_t count = scales_of(static_cast<int32_t>(kv_.size()) - 1, values).second;
      (values ? scales.value : scales.key) = reinterpret_cast<float*>(ints(count));
      set_cache_scales(static_cast<int32_t>(kv_.size()) - 1, values,
                       std::vector<float>(static_cast<size_t>(count), 1.0f));
    }
  }
  ctx_.workspace_bytes = static_cast<size_t>(
      device_->kernels().workspace_bytes(Executable::workspace_limits(program_, plan, *device_)));
  buffers_.push_back(device_->allocate(ctx_.workspace_bytes, "session workspace"));
  ctx_.workspace = buffers_.back().data();
  executable_ = std::make_unique<Executable>(program_, plan, *device_, weights_.views(), kv_,
                                             limits.max_position);
}

void ProgramSession::write_floats(void* target, int64_t count, const std::vector<float>& data,
                                  DType dtype) {
  check(static_cast<int64_t>(data.size()) <= count, "session", data.size(),
        " values do not fit the ", count, " of the buffer");
  if (dtype == DType::kI32) {
    const std::vector<int32_t> whole(data.begin(), data.end());
    return device_->copy_in(target, whole.data(), whole.size() * sizeof(int32_t));
  }
  dispatch_cache(dtype, "session", [&](auto type) {
    using T = typename decltype(type)::type;
    std::vector<T> rounded(data.size());
    std::transform(data.begin(), data.end(), rounded.begin(), from_float<T>);
    device_->copy_in(target, rounded.data(), rounded.size() * sizeof(T));
  });
}

std::vector<float> ProgramSession::read_floats(const void* source, int64_t count, DType dtype) {
  std::vector<float> values(static_cast<size_t>(count));
  if (dtype == DType::kI32) {
    std::vector<int32_t> whole(values.size());
    device_->copy_out(whole.data(), source, whole.size() * sizeof(int32_t));
    std::copy(whole.begin(), whole.end(), values.begin());
    return values;
  }
  dispatch_cache(dtype, "session", [&](auto type) {
    using T = typename decltype(type)::type;
    std::vector<T> raw(values.size());
    device_->copy_out(raw.data(), source, raw.size() * sizeof(T));
    std::transform(raw.begin(), raw.end(), values.begin(), [](T v) { return to_float(v); });
  });
  return values;
}

const Value& ProgramSession::lasting_value(int32_t id) const {
  check(id >= 0 && id < static_cast<int32_t>(program_.values().size()), "session", "no value ", id);
  const auto holds = [id](const std::vector<int32_t>& ids) {
    return std::find(ids.begin(), ids.end(), id) != ids.end();
  };
  check(holds(program_.inputs()) || holds(program_.outputs()), "session", "value ", id,
        " is neither an input nor an output: its bytes are reused during a run");
  return program_.values()[id];
}

int64_t ProgramSession::max_rows(const Value& value) const {
  check(value.space == RowSpace::kTokens || value.space == RowSpace::kLogits, "session",
        "has one rank, and none sends it anything");
  return value.space == RowSpace::kTokens ? limits_.max_tokens : limits_.max_logits;
}

ProgramSession::DeviceValue ProgramSession::device_value(int32_t id) {
  const Value& value = lasting_value(id);
  return {executable_->value(id), value.dtype, max_rows(value), value.cols};
}

void ProgramSession::set_value(int32_t id, const std::vector<float>& data) {
  const Value& value = lasting_value(id);
  write_floats(executable_->value(id), max_rows(value) * value.cols, data, value.dtype);
}

std::vector<float> ProgramSession::value(int32_t id, int64_t rows) {
  const Value& value = lasting_value(id);
  check(rows >= 0 && rows <= max_rows(value), "session", rows, " rows are outside [0, ",
        max_rows(value), "]");
  return read_floats(executable_->value(id), rows * value.cols, value.dtype);
}

void ProgramSession::set_ints(const std::string& name, const std::vector<int32_t>& data) {
  const InferParams& infer = ctx_.infer;
  const int64_t requests = limits_.max_requests, tokens = limits_.max_tokens,
                logits = limits_.max_logits;
  struct Target {
    const char* name;
    int32_t* data;
    int64_t count;
  };
  const Target targets[] = {
      {"counts", reinterpret_cast<int32_t*>(infer.counts), sizeof(InferCounts) / 4},
      {"row", infer.row, requests},
      {"query_start_loc", infer.query_start_loc, requests + 1},
      {"seq_lens", infer.seq_lens, requests},
      {"token_batch", infer.token_batch, tokens},
      {"token_ids", infer.token_ids, tokens},
      {"positions", infer.positions, tokens},
      {"slot_mapping", infer.slot_mapping, ctx_.rows.num_groups * tokens},
      {"logits_indices", infer.logits_indices, logits},
      {"logits_batch", infer.logits_batch, logits},
      {"block_table", ctx_.rows.block_table, ctx_.rows.num_groups * requests * limits_.max_blocks},
  };
  for (const Target& target : targets) {
    if (name != target.name) continue;
    check(static_cast<int64_t>(data.size()) <= target.count, "session", "'", name, "' holds ",
          target.count, " values, not ", data.size());
    if (target.data == infer.seq_lens) seq_lens_ = data;
    if (target.data == infer.query_start_loc) query_start_loc_ = data;
    device_->copy_in(target.data, data.data(), data.size() * sizeof(int32_t));
    return;
  }
  fail(ErrorKind::kInvalidArgument, "session", "no infer parameter '", name, "'");
}

const KvCacheLayer& ProgramSession::cache_layer(int32_t layer) const {
  check(layer >= 0 && layer < static_cast<int32_t>(kv_.size()), "session", "no kv layer ", layer);
  return kv_[layer];
}

void ProgramSession::set_cache(int32_t layer, bool values, const std::vector<float>& data) {
  const KvCacheLayer& cache = cache_layer(layer);
  write_floats(values ? cache.value : cache.key, cache.elements(), data, cache.dtype);
}

std::vector<float> ProgramSession::cache(int32_t layer, bool values) {
  const KvCacheLayer& cache = cache_layer(layer);
  return read_floats(values ? cache.value : cache.key, cache.elements(), cache.dtype);
}

std::pair<float*, int64_t> ProgramSession::scales_of(int32_t layer, bool values) const {
  const KvCacheLayer& cache = cache_layer(layer);
  const KvScales& scales = cache.scales;
  check(scales.kind != KvScaleKind::kNone, "session", "a cache of ", dtype_name(cache.dtype),
        " has no scales");
  const int64_t count = scales.kind == KvScaleKind::kToken  ? scales.block_stride * cache.num_blocks
                        : scales.kind == KvScaleKind::kHead ? cache.num_kv_heads
                                                            : 1;
  return {values ? scales.value : scales.key, count};
}

void ProgramSession::set_cache_scales(int32_t layer, bool values, const std::vector<float>& data) {
  const auto [target, count] = scales_of(layer, values);
  write_floats(target, count, data, DType::kF32);
}

std::vector<float> ProgramSession::cache_scales(int32_t layer, bool values) {
  const auto [source, count] = scales_of(layer, values);
  return read_floats(source, count, DType::kF32);
}

void ProgramSession::set_options(bool batch_invariant, bool eager_attention,
                                 AttentionBackend backend) {
  ctx_.batch_invariant = batch_invariant;
  ctx_.eager_attention = eager_attention;
  ctx_.attention_backend = backend;
}

void ProgramSession::fill_cache(uint64_t seed) {
  uint64_t first = 0;
  for (const KvCacheLayer& layer : kv_) first = fill_random(*device_, layer, seed, first);
}

void ProgramSession::set_sizes(int32_t num_requests, int32_t num_tokens, int32_t num_logits) {
  check(num_requests >= 0 && num_requests <= limits_.max_requests && num_tokens >= 0 &&
            num_tokens <= limits_.max_tokens && num_logits >= 0 && num_logits <= limits_.max_logits,
        "session", "the run exceeds the session's limits");
  ctx_.sizes = {num_requests, num_tokens, num_logits};
  ctx_.prefill = {};
  for (size_t i = 0; i < seq_lens_.size() && i + 1 < query_start_loc_.size(); ++i) {
    ctx_.prefill.keys += seq_lens_[i];
    ctx_.prefill.scores += int64_t{seq_lens_[i]} * (query_start_loc_[i + 1] - query_start_loc_[i]);
  }
}

void ProgramSession::run(int32_t num_requests, int32_t num_tokens, int32_t num_logits) {
  set_sizes(num_requests, num_tokens, num_logits);
  run_on_stream(*device_, [this] { executable_->run(ctx_); });
}

std::vector<double> ProgramSession::time_runs(int32_t num_requests, int32_t num_tokens,
                                              int32_t num_logits, int32_t repeats) {
  run(num_requests, num_tokens, num_logits);
  const bool on_cpu = device_->type() == DeviceType::kCpu;
  std::unique_ptr<Graph> graph;
  if (!on_cpu) {
    run_on_stream(*device_, [&] { graph = device_->capture([this] { executable_->run(ctx_); }); });
  }
  std::vector<double> seconds;
  for (int32_t i = 0; i < repeats; ++i) {
    run_on_stream(*device_, [&] {
      if (!on_cpu) {
        seconds.push_back(cuda::time_launches(*device_, [&] { device_->launch(*graph); }));
        return;
      }
      const auto start = std::chrono::steady_clock::now();
      executable_->run(ctx_);
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
      seconds.push_back(elapsed.count());
    });
  }
  return seconds;
}

}  // namespace mrv1
