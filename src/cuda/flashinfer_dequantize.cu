// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Keys and values of an E4M3 cache in bfloat16, for kernels that read nothing else. A thread takes
// 16 codes of a key and those of its value; the threads of a token are neighbours.
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "flashinfer_kernels.h"
#include "launch.h"
#include "vector.cuh"

namespace mrv1::cuda {
namespace {

constexpr std::string_view kOp = "paged_attention.dequantize";
constexpr int kThreads = 256;
constexpr int kCodes = 16;  // of a 16-byte load

// Every code is a half. GPUs without the instruction convert in software.
__device__ __forceinline__ void dequantize(uint4 codes, float scale, __nv_bfloat16* to) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float values[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto pair = static_cast<__nv_fp8x2_storage_t>(words[2 * i + j / 2] >> (j % 2 * 16));
      const float2 two = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
      values[2 * j] = two.x * scale;
      values[2 * j + 1] = two.y * scale;
    }
    store_vector(to, i, pack(values));
  }
}

struct DequantizeArgs {
  KvCacheLayer cache, to;
  FlashPlan plan;
  InferParams infer;
  const int32_t* block_table;  // of the layer's group
  int32_t max_blocks;
  int32_t first_head;
};

__global__ void __launch_bounds__(kThreads) dequantize_kernel(DequantizeArgs args) {
  launch_next();
  wait_for_previous();
  const KvCacheLayer& cache = args.cache;
  const int32_t threads_per_key = cache.head_dim / kCodes;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const auto place = static_cast<int32_t>(index / threads_per_key);
  const int32_t column = static_cast<int32_t>(index % threads_per_key) * kCodes;
  if (place >= args.plan.key_begin[args.infer.max_requests]) return;

  // The last batch position whose keys begin here or before: others that do have none.
  int32_t batch = 0;
  for (int32_t end = args.infer.counts->num_requests; end - batch > 1;) {
    const int32_t middle = (batch + end) / 2;
    (args.plan.key_begin[middle] <= place ? batch : end) = middle;
  }
  const int32_t in_row = place - args.plan.key_begin[batch];
  if (in_row >= args.plan.key_count[batch]) return;  // of a row that did not fit
  const int32_t position = args.infer.seq_lens[batch] - args.plan.key_count[batch] + in_row;
  const int64_t block = args.block_table[int64_t{args.infer.row[batch]} * args.max_blocks +
                                         position / cache.block_size];
  const int64_t token = position % cache.block_size;
  const int64_t head = args.first_head + static_cast<int32_t>(blockIdx.y);
  const int64_t from =
      block * cache.block_stride + token * cache.token_stride + head * cache.head_stride + column;
  const int64_t scale = cache.scales.index(block, token, head);
  const uint4 key = load_vector(static_cast<const uint8_t*>(cache.key) + from, 0);
  const uint4 value = load_vector(static_cast<const uint8_t*>(cache.value) + from, 0);
  const int64_t to = blockIdx.y * args.to.head_stride + place * args.to.token_stride + column;
  dequantize(key, cache.scales.key[scale], static_cast<__nv_bfloat16*>(args.to.key) + to);
  dequantize(value, cache.scales.value[scale], static_cast<__nv_bfloat16*>(args.to.value) + to);
}

}  // namespace

void dequantize_keys(const PagedAttentionParams& params, const StepContext& ctx,
                     const FlashPlan& plan, int32_t first_head, const KvCacheLayer& to,
                     int64_t max_keys) {
  const KvCacheLayer& cache = *params.cache;
  check(cache.dtype == DType::kE4M3 && cache.scales.key != nullptr && cache.scales.value != nullptr,
        kOp, "the cache is ", dtype_name(cache.dtype),
        "; only float8_e4m3fn with scales is dequantised");
  for (const int64_t stride : {cache.block_stride, cache.token_stride, cache.head_stride}) {
    check(stride > 0 && stride % kCodes == 0, kOp, "a stride of the cache is ", stride,
          "; it must be a multiple of ", kCodes);
  }
  check(is_vector_aligned(cache.key) && is_vector_aligned(cache.value), kOp,
        "the cache must begin at a multiple of 16 bytes");
  const int64_t group_blocks = int64_t{ctx.rows.num_rows} * ctx.rows.max_blocks;
  const DequantizeArgs args{cache,
                            to,
                            plan,
                            ctx.infer,
                            ctx.rows.block_table + params.kv_group * group_blocks,
                            ctx.rows.max_blocks,
                            first_head};
  const int64_t threads = max_keys * (cache.head_dim / kCodes);
  const dim3 grid(static_cast<unsigned>((threads + kThreads - 1) / kThreads),
                  static_cast<unsigned>(to.num_kv_heads));
  launch(kOp, ctx, dequantize_kernel, grid, dim3(kThreads), 0, args);
}

}  // namespace mrv1::cuda
