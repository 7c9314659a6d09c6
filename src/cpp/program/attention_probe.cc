// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "program/attention_probe.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "core/error.h"
#include "ops/fill_random.h"
#include "ops/kernels.h"
#include "program/probe_timing.h"

namespace mrv1 {
namespace {

constexpr std::string_view kWhere = "attention_probe";
constexpr uint64_t kSeed = 1;

AttentionProbe::Options checked(const AttentionProbe::Options& options) {
  const HeadShape& shape = options.shape;
  check(shape.num_kv_heads > 0 && shape.num_heads > 0 && shape.num_heads % shape.num_kv_heads == 0,
        kWhere, shape.num_heads, " heads; must be a positive multiple of the ", shape.num_kv_heads,
        " key/value heads");
  check(shape.head_dim > 0 && shape.head_dim % 8 == 0 && shape.head_dim <= 256, kWhere,
        "head_dim is ", shape.head_dim, "; must be a multiple of 8 up to 256");
  check(options.cache_dtype == DType::kBF16 || is_float8(options.cache_dtype), kWhere,
        "the cache is ", dtype_name(options.cache_dtype), "; must be bfloat16 or FP8");
  check(is_float8(options.cache_dtype) == (options.scales != KvScaleKind::kNone), kWhere,
        "a cache of ", dtype_name(options.cache_dtype),
        is_float8(options.cache_dtype) ? " needs scales" : " has no scales");
  check(options.block_size > 0 && options.copies > 0, kWhere, "block_size is ", options.block_size,
        " and copies ", options.copies, "; both must be positive");
  check(!options.lengths.empty(), kWhere, "there are no requests");
  for (const int32_t length : options.lengths) {
    check(length > 0, kWhere, "a request has ", length, " tokens; must be positive");
  }
  return options;
}

// [blocks, block_size, heads, head_dim], and scales of tokens [blocks, block_size, heads].
void put_tokens_first(KvCacheLayer& layer) {
  layer.token_stride = int64_t{layer.num_kv_heads} * layer.head_dim;
  layer.head_stride = layer.head_dim;
  if (layer.scales.kind != KvScaleKind::kToken) return;
  layer.scales.token_stride = layer.num_kv_heads;
  layer.scales.head_stride = 1;
}

}  // namespace

AttentionProbe::AttentionProbe(std::shared_ptr<Device> device, const Options& options)
    : device_(std::move(device)), options_(checked(options)) {
  make_batch();
  for (int32_t copy = 0; copy < options_.copies; ++copy) make_cache(copy);
}

Buffer& AttentionProbe::allocate(int64_t bytes) {
  return buffers_.emplace_back(device_->allocate(static_cast<size_t>(bytes), "attention probe"));
}

int32_t* AttentionProbe::ints(std::span<const int32_t> values) {
  auto* data = static_cast<int32_t*>(allocate(static_cast<int64_t>(values.size_bytes())).data());
  device_->copy_in(data, values.data(), values.size_bytes());
  return data;
}

void AttentionProbe::make_batch() {
  const HeadShape& shape = options_.shape;
  const std::vector<int32_t>& lengths = options_.lengths;
  const auto batch = static_cast<int32_t>(lengths.size());
  const auto blocks_of = [&](int32_t length) {
    return (length + options_.block_size - 1) / options_.block_size;
  };
  int32_t max_blocks = 0;
  for (const int32_t length : lengths) {
    max_blocks = std::max(max_blocks, blocks_of(length));
    num_blocks_ += blocks_of(length);
  }
  std::vector<int32_t> blocks(static_cast<size_t>(num_blocks_) - 1);
  std::iota(blocks.begin(), blocks.end(), 1);
  std::shuffle(blocks.begin(), blocks.end(), std::mt19937_64(kSeed));
  std::vector<int32_t> table(static_cast<size_t>(batch) * max_blocks);
  size_t next = 0;
  for (int32_t row = 0; row < batch; ++row) {
    for (int32_t i = 0; i < blocks_of(lengths[row]); ++i) {
      table[static_cast<size_t>(row) * max_blocks + i] = blocks[next++];
    }
  }
  std::vector<int32_t> rows(lengths.size() + 1);
  std::iota(rows.begin(), rows.end(), 0);
  std::vector<int32_t> positions(lengths);
  for (int32_t& position : positions) --position;

  InferParams& infer = ctx_.infer;
  infer.max_requests = infer.max_tokens = batch;
  infer.counts =
      reinterpret_cast<InferCounts*>(ints(std::vector<int32_t>{batch, batch, 0, batch, 0, 0}));
  infer.row = ints(rows);
  infer.query_start_loc = ints(rows);
  infer.token_batch = ints(rows);
  infer.seq_lens = ints(lengths);
  infer.positions = ints(positions);
  RowState& state = ctx_.rows;
  state.num_rows = batch;
  state.num_groups = 1;
  state.block_size = options_.block_size;
  state.max_blocks = max_blocks;
  state.max_model_len = *std::max_element(lengths.begin(), lengths.end());
  state.block_table = ints(table);
  ctx_.device = device_.get();
  ctx_.pool = device_->pool();
  ctx_.stream = device_->stream();
  ctx_.sizes = {batch, batch, 0};

  WorkspaceLimits limits{};
  limits.head_dim = shape.head_dim;
  limits.max_tokens = batch;
  limits.num_threads = ctx_.pool != nullptr ? ctx_.pool->num_threads() : 1;
  ctx_.workspace_bytes = static_cast<size_t>(device_->kernels().workspace_bytes(limits));
  ctx_.workspace = allocate(static_cast<int64_t>(ctx_.workspace_bytes)).data();
  plan_.shape = shape;
  plan_.dtype = DType::kBF16;
  plan_.cache_dtype = options_.cache_dtype;
  plan_.cache_scales = options_.scales;
  plan_.max_requests = plan_.max_tokens = batch;
  plan_.data = allocate(device_->kernels().attention_plan_bytes(plan_, *device_)).data();

  const int64_t elements = int64_t{batch} * shape.q_cols();
  void* queries = allocate(elements * static_cast<int64_t>(sizeof(BFloat16))).data();
  fill_random(*device_, {queries, DType::kBF16, elements, kSeed, 0, 0.0f, 1.0f});
  queries_ = queries;
  out_ = allocate(elements * static_cast<int64_t>(sizeof(BFloat16))).data();
}

void AttentionProbe::make_cache(int32_t copy) {
  KvCacheLayer layer = kv_cache_layer(options_.cache_dtype, num_blocks_, options_.block_size,
                                      options_.shape, options_.scales);
  if (options_.tokens_first) put_tokens_first(layer);
  const uint64_t seed = kSeed + 1 + static_cast<uint64_t>(copy);
  uint64_t first = 0;
  for (void** side : {&layer.key, &layer.value}) {
    *side = allocate(layer.bytes()).data();
    fill_random(*device_, {*side, layer.dtype, layer.elements(), seed, first, 0.0f, 1.0f});
    first += static_cast<uint64_t>(layer.elements());
  }
  // Static scales are equal, so that they may stand for one of the whole cache.
  const bool of_tokens = options_.scales == KvScaleKind::kToken;
  const int64_t scales = of_tokens ? layer.scale_bytes() / static_cast<int64_t>(sizeof(float))
                                   : options_.shape.num_kv_heads;
  if (options_.scales != KvScaleKind::kNone) {
    for (float** side : {&layer.scales.key, &layer.scales.value}) {
      *side = static_cast<float*>(allocate(scales * static_cast<int64_t>(sizeof(float))).data());
      fill_random(*device_,
                  {*side, DType::kF32, scales, seed, first, 0.75f, of_tokens ? 0.25f : 0.0f});
      first += static_cast<uint64_t>(scales);
    }
  }
  caches_.push_back(layer);
}

bool AttentionProbe::supports(AttentionBackend backend) {
  ctx_.attention_backend = backend;
  bool found = false;
  run_on_stream(*device_,
                [&] { found = device_->kernels().decode_backend(plan_, ctx_) == backend; });
  return found;
}

std::vector<double> AttentionProbe::time_runs(AttentionBackend backend, int32_t repeats) {
  ctx_.attention_backend = backend;
  const Kernels& kernels = device_->kernels();
  const auto attend = [&] {
    for (const KvCacheLayer& cache : caches_) {
      kernels.paged_attention({.qkv = queries_,
                               .out = out_,
                               .shape = options_.shape,
                               .dtype = DType::kBF16,
                               .scale = 1.0f / std::sqrt(static_cast<float>(cache.head_dim)),
                               .window = 0,
                               .softcap = 0.0f,
                               .cache = &cache,
                               .kv_group = 0,
                               .plan = &plan_,
                               .q_stride = options_.shape.q_cols()},
                              ctx_);
    }
  };
  run_on_stream(*device_, [&] { kernels.plan_attention(plan_, ctx_); });
  std::vector<double> seconds = time_probe(*device_, attend, repeats);
  for (double& run : seconds) run /= static_cast<double>(caches_.size());
  return seconds;
}

std::vector<float> AttentionProbe::output() {
  std::vector<BFloat16> raw(options_.lengths.size() * static_cast<size_t>(options_.shape.q_cols()));
  device_->copy_out(raw.data(), out_, raw.size() * sizeof(BFloat16));
  std::vector<float> values(raw.size());
  std::transform(raw.begin(), raw.end(), values.begin(), [](BFloat16 v) { return to_float(v); });
  return values;
}

int64_t AttentionProbe::read_bytes() const {
  const int64_t tokens =
      std::accumulate(options_.lengths.begin(), options_.lengths.end(), int64_t{0});
  const int64_t scale = options_.scales == KvScaleKind::kToken ? sizeof(float) : 0;
  const int64_t head =
      options_.shape.head_dim * static_cast<int64_t>(dtype_size(options_.cache_dtype));
  return 2 * tokens * options_.shape.num_kv_heads * (head + scale);
}

}  // namespace mrv1
