// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// FlashInfer's FA2 kernel over a paged cache, for prefill and, with the keys of a row split into
// chunks, for decode. Its query rows are tokens times the heads that share a key/value head, so any
// group size fits. One shape per head_dim and use, small enough for the shared memory of every GPU
// from sm_80 on, instead of FlashInfer's choice at run time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <flashinfer/attention/default_prefill_params.cuh>
#include <flashinfer/attention/mask.cuh>
#include <flashinfer/attention/prefill.cuh>
#include <flashinfer/attention/variants.cuh>
#include <type_traits>

#include "flashinfer_kernels.h"

namespace mrv1::cuda {

// Lengths come from seq_lens; FlashInfer would derive them from the number of pages.
template <typename Out, typename Kv>
struct Fa2Params : flashinfer::BatchPrefillPagedParams<__nv_bfloat16, Kv, Out, int32_t> {
  const int32_t* seq_lens = nullptr;
  const float* key_scale = nullptr;  // of all keys of an FP8 cache

  __host__ __device__ __forceinline__ uint32_t get_kv_len(uint32_t batch) const {
    return seq_lens[batch];
  }
};

// The window is always compiled in; it costs a comparison in masked iterations only.
using Fa2Variant = flashinfer::DefaultAttention</*use_custom_mask=*/false,
                                                /*use_sliding_window=*/true,
                                                /*use_logits_soft_cap=*/false, /*use_alibi=*/false>;

// Scores over the codes of an FP8 cache. The scale of its values is left to the caller.
struct Fa2ScaledVariant : Fa2Variant {
  template <typename Params>
  __device__ __host__ Fa2ScaledVariant(const Params& params, uint32_t batch, uint8_t* shared)
      : Fa2Variant(params, batch, shared) {
    sm_scale_log2 *= *params.key_scale;
  }
};

// kMmaKv times 16 keys per warp and iteration; four warps share the queries (kTile > 16) or the
// keys.
template <int kHeadDim, int kTile, int kMmaKv, typename Out, typename Kv = __nv_bfloat16>
struct Fa2 {
  static constexpr uint32_t kWarpsQ = flashinfer::get_num_warps_q(kTile);
  static constexpr uint32_t kWarpsKv = flashinfer::get_num_warps_kv(kTile);
  using Variant = std::conditional_t<sizeof(Kv) == 1, Fa2ScaledVariant, Fa2Variant>;
  using Traits = flashinfer::KernelTraits<
      flashinfer::MaskMode::kCausal, kTile, flashinfer::get_num_mma_q(kTile), kMmaKv, kHeadDim / 16,
      kHeadDim / 16, kWarpsQ, kWarpsKv, flashinfer::PosEncodingMode::kNone, __nv_bfloat16, Kv, Out,
      float, int32_t, Variant, /*ENABLE_FP4_REPACK=*/false>;
  static_assert(!Traits::IsInvalid());
  static constexpr size_t kSharedBytes = sizeof(typename Traits::SharedStoragePaged);
  static_assert(kSharedBytes <= 99 * 1024, "of a block, on every GPU from sm_80 on");

  static void launch(std::string_view op, const FlashArgs& args, const FlashBlocks& blocks,
                     int32_t* out_begin, Out* out, float* lse) {
    const PagedAttentionParams& op_params = args.params;
    const KvCacheLayer& cache = args.keys.cache;
    const StepContext& ctx = args.ctx;
    const HeadShape& shape = op_params.shape;
    Fa2Params<Out, Kv> params;
    params.q = static_cast<__nv_bfloat16*>(const_cast<void*>(op_params.qkv));
    params.q_indptr = ctx.infer.query_start_loc;
    params.q_stride_n = op_params.q_token_stride();
    params.q_stride_h = shape.head_dim;
    params.seq_lens = args.keys.lengths;
    params.key_scale = cache.scales.key;
    params.num_qo_heads = shape.num_heads;
    params.group_size = flashinfer::uint_fastdiv(shape.num_heads / shape.num_kv_heads);
    const int64_t strides[3] = {cache.block_stride, cache.head_stride, cache.token_stride};
    params.paged_kv = flashinfer::paged_kv_t<Kv, int32_t>(
        shape.num_kv_heads, cache.block_size, shape.head_dim, ctx.infer.max_requests,
        flashinfer::QKVLayout::kHND, static_cast<Kv*>(cache.key), static_cast<Kv*>(cache.value),
        strides, const_cast<int32_t*>(args.keys.block_table), args.plan.page_begin,
        /*last_page_len=*/nullptr);
    params.window_left = op_params.window > 0 ? op_params.window - 1 : -1;
    params.sm_scale = op_params.scale;
    params.request_indices = blocks.batch;
    params.qo_tile_indices = blocks.tile;
    params.kv_tile_indices = blocks.chunk;
    params.block_valid_mask = blocks.valid;
    params.kv_chunk_size_ptr = blocks.chunk_size;
    params.partition_kv = lse != nullptr;
    params.o_indptr = out_begin;
    params.o = out;
    params.lse = lse;
    params.padded_batch_size = args.grid;
    launch_alone(op, ctx,
                 flashinfer::BatchPrefillWithPagedKVCacheKernel</*SAME_KV_STRIDES=*/true, Traits,
                                                                Fa2Params<Out, Kv>>,
                 dim3(args.grid, 1, shape.num_kv_heads), dim3(32, kWarpsQ, kWarpsKv), kSharedBytes,
                 params);
  }
};

template <int kHeadDim>
void launch_flash_prefill(const FlashArgs& args, int32_t tile) {
  const auto run = [&](auto kernel) {
    decltype(kernel)::launch("paged_attention.prefill_fa2", args, args.plan.prefill,
                             args.ctx.infer.query_start_loc,
                             static_cast<__nv_bfloat16*>(args.params.out), nullptr);
  };
  if constexpr (kHeadDim == 256) {
    run(Fa2<256, 64, 2, __nv_bfloat16>());
  } else if (tile == 128) {
    run(Fa2<kHeadDim, 128, 4, __nv_bfloat16>());
  } else {
    run(Fa2<kHeadDim, 64, 4, __nv_bfloat16>());
  }
}

template <int kHeadDim>
void launch_flash_decode(const FlashArgs& args) {
  Fa2<kHeadDim, kDecodeTile, 256 / kHeadDim, float>::launch(
      "paged_attention.decode_fa2", args, args.plan.decode, args.plan.split_begin,
      args.plan.partial_out, args.plan.partial_lse);
}

// Of as many keys at a time as FlashInfer itself would choose.
template <int kHeadDim>
void launch_flash_decode_e4m3(const FlashArgs& args) {
  Fa2<kHeadDim, kDecodeTile, 512 / kHeadDim, float, __nv_fp8_e4m3>::launch(
      "paged_attention.decode_fa2", args, args.plan.decode, args.plan.split_begin,
      args.plan.partial_out, args.plan.partial_lse);
}

}  // namespace mrv1::cuda
