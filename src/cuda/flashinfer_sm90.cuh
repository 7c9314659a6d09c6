// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// FlashInfer's FA3 kernel (warpgroup MMA, queries loaded by TMA, pages by cp.async) over a paged
// cache, driven by __device__ code of our own that hands out tiles: a fixed grid walks a list that
// lies on the device, so that neither the launch nor the host depends on the lengths of rows.
#pragma once

// clang-format off
#include "flashinfer_cutlass_utils.h"  // before FlashInfer's headers
#include <flashinfer/attention/hopper/prefill_sm90.cuh>
// clang-format on

#include <algorithm>

#include "flashinfer_kernels.h"

namespace mrv1::cuda {

// Items are tiles times query heads, heads of a tile next to each other, so that those that share
// keys run at the same time. Tiles are sorted by falling cost, and the grid's blocks take items in
// boustrophedon order: forth, back, forth, which evens out what each gets in total.
struct TileWalk {
  struct Params {
    const FlashTile* tiles;
    const int32_t* num_tiles;
    cutlass::FastDivmod heads;       // query heads
    cutlass::FastDivmod group_size;  // query heads per key/value head
  };

  struct WorkTileInfo {
    int item = 0;
    int num_items = 0;
    int round = 0;
    int head = 0;
    int kv_head = 0;
    FlashTile tile{};

    CUTLASS_DEVICE bool is_valid(const Params&) const { return item < num_items; }
    CUTLASS_DEVICE auto get_block_coord(const Params&) const {
      return cute::tuple{tile.tile,       head,           kv_head,     tile.query_begin,
                         tile.page_begin, tile.query_len, tile.kv_len, tile.batch};
    }
  };

  CUTLASS_DEVICE static WorkTileInfo work(const Params& params, int round, int num_items) {
    WorkTileInfo info;
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    info.round = round;
    info.num_items = num_items;
    info.item = round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
    if (info.item < num_items) {
      int index = 0;
      params.heads(index, info.head, info.item);
      info.kv_head = params.group_size.divide(info.head);
      const int4* source = reinterpret_cast<const int4*>(params.tiles + index);
      int4* target = reinterpret_cast<int4*>(&info.tile);
      target[0] = source[0];
      target[1] = source[1];
    }
    return info;
  }

  CUTLASS_DEVICE WorkTileInfo get_initial_work(const Params& params) const {
    return work(params, 0, *params.num_tiles * params.heads.divisor);
  }
  template <bool is_producer = false>
  CUTLASS_DEVICE WorkTileInfo get_next_work(const Params& params,
                                            const WorkTileInfo& current) const {
    return work(params, current.round + 1, current.num_items);
  }
  CUTLASS_DEVICE void init_consumer() const {}
  CUTLASS_DEVICE void prefetch_next_work(const Params&, const WorkTileInfo&) const {}
  CUTLASS_DEVICE void broadcast_next_work(const WorkTileInfo&) const {}
};

// What FlashInfer's variants read about the softmax.
struct Fa3Softmax {
  float sm_scale;
};

// FlashInfer's epilogue, but with barriers that hold. Its own has every thread arrive twice at the
// one between the stores to shared memory and the reads, so a warpgroup may read what another has
// not stored yet; and nothing keeps the next tile's values, which take the same memory, from coming
// before all have been read.
template <typename Traits>
struct Fa3Epilogue : flashinfer::CollectiveEpilogue<Traits> {
  using Base = flashinfer::CollectiveEpilogue<Traits>;

  template <typename BlockCoord, typename SharedStorage, typename Out, typename Lse, typename Mma>
  CUTLASS_DEVICE void store(const typename Base::Params& params, const Out& out, const Lse&,
                            SharedStorage& shared, Mma mma, int thread,
                            const BlockCoord& block_coord) {
    using cutlass::arch::NamedBarrier;
    constexpr auto kStored = cutlass::arch::ReservedNamedBarriers::EpilogueBarrier;
    const auto [tile, head, kv_head, query_begin, page_begin, query_len, kv_len, batch] =
        block_coord;
    const auto tile_out =
        cute::make_tensor(cute::make_smem_ptr(shared.smem_o.data()), typename Base::SmemLayoutO{});
    const auto copy = cute::make_tiled_copy_C(typename Base::SmemCopyAtomO{}, mma);
    const auto own = copy.get_thread_slice(thread);
    const auto rounded = flashinfer::convert_type<typename Base::DTypeO>(out);
    const auto source = own.retile_S(rounded);
    auto target = own.partition_D(tile_out);
    // All have read the values, which lie there.
    NamedBarrier::sync(Base::NUM_MMA_THREADS,
                       static_cast<int>(flashinfer::NamedBarriers::kValueEmpty));
    cute::copy(copy, source, target);
    NamedBarrier::sync(Base::NUM_MMA_THREADS, kStored);
    flashinfer::write_tiled<Base::NUM_COPY_THREADS>(
        params.O_ptr, typename Base::TiledCopyO{}, params.layout_O,
        cute::select<0, 1>(typename Base::TileShape_PDV{}), tile_out, thread, tile, head,
        query_begin, query_len);
    NamedBarrier::sync(Base::NUM_MMA_THREADS, kStored);
  }
};

template <int kHeadDim>
void launch_flash_prefill_sm90(const FlashArgs& args) {
  using Element = cutlass::bfloat16_t;
  constexpr int kTileKv = kHeadDim == 256 ? 32 : 96;  // FlashInfer's tuning
  using Traits =
      flashinfer::AttentionKernelTraits</*USE_TMA_LOAD_KV=*/false, kHeadDim, kHeadDim,
                                        sm90_tile(kHeadDim), kTileKv, /*NUM_STAGES=*/2, Element,
                                        Element, Element, int32_t, flashinfer::StandardAttention>;
  using Mainloop = flashinfer::SparseCollectiveMainloop<Fa3Softmax, Traits, /*CAUSAL=*/true>;
  using Epilogue = Fa3Epilogue<Traits>;
  // A row without a window has one that is never reached: one kernel serves both, and the
  // comparison is made in masked iterations only.
  constexpr int kNoWindow = 1 << 30;

  const PagedAttentionParams& op_params = args.params;
  const KvCacheLayer& cache = args.keys.cache;
  const StepContext& ctx = args.ctx;
  const HeadShape& shape = op_params.shape;
  Element* keys = static_cast<Element*>(cache.key);
  Element* values = static_cast<Element*>(cache.value);
  const auto kv_layout = flashinfer::get_gmem_layout(0, shape.num_kv_heads, kHeadDim,
                                                     cache.token_stride, cache.head_stride);
  const auto mainloop = Mainloop::to_underlying_arguments(
      {static_cast<const Element*>(op_params.qkv),
       flashinfer::get_gmem_layout(ctx.sizes.num_tokens, shape.num_heads, kHeadDim,
                                   op_params.q_token_stride(), kHeadDim),
       keys, kv_layout, values, kv_layout, args.keys.block_table,
       op_params.window > 0 ? op_params.window - 1 : kNoWindow, cache.block_stride,
       cache.block_stride, static_cast<uint32_t>(cache.block_size), Fa3Softmax{op_params.scale}});
  const auto epilogue = Epilogue::to_underlying_arguments(
      {static_cast<Element*>(op_params.out),
       flashinfer::get_gmem_layout(ctx.sizes.num_tokens, shape.num_heads, kHeadDim, args.out_stride,
                                   kHeadDim),
       /*lse_ptr=*/nullptr,
       flashinfer::get_lse_gmem_layout(ctx.sizes.num_tokens, shape.num_heads)});
  const TileWalk::Params tiles{args.plan.tiles, args.plan.num_tiles,
                               cutlass::FastDivmod(shape.num_heads),
                               cutlass::FastDivmod(shape.num_heads / shape.num_kv_heads)};
  launch_alone(
      "paged_attention.prefill_fa3", ctx,
      flashinfer::PrefillWithKVCacheKernel<Mainloop, Epilogue, Traits,
                                           /*LEFT_SLIDING_WINDOW=*/true, /*CAUSAL=*/true, TileWalk>,
      dim3(args.grid), dim3(Traits::NUM_WARPS * 32), sizeof(typename Traits::SharedStorage),
      mainloop, epilogue, tiles);
}

}  // namespace mrv1::cuda
