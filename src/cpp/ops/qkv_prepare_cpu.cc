// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/qkv_prepare.h"

#include <cstring>
#include <optional>

#include "core/error.h"
#include "core/thread_pool.h"
#include "ops/cache_head_cpu.h"
#include "ops/cache_write.h"
#include "ops/vector_ops.h"

namespace mrv1 {
namespace {

constexpr int64_t kElementsPerPiece = 8192;
constexpr int32_t kMaxHeadDim = 256;

void check_params(const QkvPrepareParams& params, const StepContext& ctx) {
  constexpr std::string_view kOp = "qkv_prepare";
  const HeadShape& shape = params.shape;
  check(shape.head_dim > 0 && shape.head_dim % 8 == 0 && shape.head_dim <= kMaxHeadDim, kOp,
        "head_dim is ", shape.head_dim, ", must be a multiple of 8 up to ", kMaxHeadDim);
  check((params.q_norm == nullptr) == (params.k_norm == nullptr), kOp,
        "q_norm and k_norm must be given together");
  check(params.out != nullptr, kOp, "out is null, must be given");
  if (params.rope != nullptr) {
    check(params.rope_pairs > 0 && 2 * params.rope_pairs <= shape.head_dim, kOp, "rope_pairs is ",
          params.rope_pairs, ", must be in [1, ", shape.head_dim / 2, "]");
    for (int32_t t = 0; t < ctx.sizes.num_tokens; ++t) {
      const int32_t position = ctx.infer.positions[t];
      check(position >= 0 && position < params.max_position, kOp, "position of token ", t, " is ",
            position, ", must be in [0, ", params.max_position, ")");
    }
  }
  if (params.cache != nullptr) {
    check_cache_write(kOp, *params.cache, shape, params.dtype);
    check_slots(kOp, *params.cache, slots_of(params.slots, params.kv_group, ctx), ctx);
  }
}

}  // namespace

void qkv_prepare_cpu(const QkvPrepareParams& params, const StepContext& ctx) {
  const TypedVectorOps& ops = vector_ops(params.dtype, "qkv_prepare");
  check_params(params, ctx);
  const HeadShape& shape = params.shape;
  const int64_t size = static_cast<int64_t>(dtype_size(params.dtype));
  const int64_t head_bytes = shape.head_dim * size;
  const int64_t row_bytes = shape.qkv_cols() * size;
  const int first_key = shape.num_heads;
  const int first_value = shape.num_heads + shape.num_kv_heads;
  const int num_heads = shape.num_heads + 2 * shape.num_kv_heads;
  std::optional<CacheHeadWriter> writer;
  if (params.cache != nullptr) writer.emplace(*params.cache, params.dtype);

  // One head of a token: through the parts it takes, to `out` and to the cache.
  const auto prepare_head = [&](int64_t token, int head, int64_t slot) {
    const int64_t offset = token * row_bytes + head * head_bytes;
    const char* from = static_cast<const char*>(params.qkv) + offset;
    char* to = static_cast<char*>(params.out) + offset;
    if (head < first_value && params.q_norm != nullptr) {
      const float* weight = head < first_key ? params.q_norm : params.k_norm;
      ops.norm_row(NormRow{from, nullptr, weight, to, nullptr, shape.head_dim, params.eps});
      from = to;
    }
    if (head < first_value && params.rope != nullptr) {
      const int64_t position = ctx.infer.positions[token];
      const int64_t turned = int64_t{2} * params.rope_pairs;
      ops.rope_head(from, params.rope + position * turned, to, params.rope_pairs,
                    params.interleaved);
      if (from != to) {
        std::memcpy(to + turned * size, from + turned * size,
                    static_cast<size_t>(head_bytes - turned * size));
      }
      from = to;
    }
    if (from != to) std::memcpy(to, from, static_cast<size_t>(head_bytes));
    if (head >= first_key && slot >= 0) {
      const bool is_key = head < first_value;
      writer->write(is_key, slot, head - (is_key ? first_key : first_value), to);
    }
  };

  const SlotMapping slots =
      params.cache == nullptr ? SlotMapping{} : slots_of(params.slots, params.kv_group, ctx);
  ctx.pool->parallel_for(ctx.sizes.num_tokens * int64_t{num_heads},
                         kElementsPerPiece / shape.head_dim, [&](int64_t begin, int64_t end, int) {
                           for (int64_t i = begin; i < end; ++i) {
                             const int64_t token = i / num_heads;
                             const int head = static_cast<int>(i % num_heads);
                             prepare_head(token, head, writer ? slots[token] : -1);
                           }
                         });
}

}  // namespace mrv1
