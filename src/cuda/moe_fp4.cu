// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Products of moe_experts with NVFP4 weights: the weights of each expert that rows have chosen
// stream past the rows of a group (fp4_stream.cuh).
#include "fp4_stream.cuh"
#include "moe_schedule.h"

namespace mrv1::cuda {
namespace {

// Tiles of weight rows of each group's expert, one group's after the other's. kFollows: the kernel
// follows another product of the same pass, so that the schedule is there before that has ended.
template <bool kFollows>
struct MoeItems {
  static constexpr bool kEarly = kFollows;
  static constexpr bool kSameRows = false;
  MoeRows rows;
  MoeSchedule schedule;
  int tiles;  // of a group
  bool sorted, few;
  const MoeFewPairs* few_pairs;  // of few pairs, those of the block

  __device__ void prepare() {
    __shared__ MoeFewPairs pairs;
    if (!few) return;
    if (threadIdx.x < 32) moe_schedule_few(rows, &pairs);
    __syncthreads();
    few_pairs = &pairs;
  }
  __device__ int count() const {
    return (few ? few_pairs->num_groups : __ldcg(schedule.num_groups)) * tiles;
  }
  __device__ StreamItem at(int index) const {
    const int number = index / tiles;
    if (few) {
      const MoeGroup& group = few_pairs->groups[number];
      return {group.expert, index % tiles, group.first_place, group.count};
    }
    const int4 group = __ldcg(reinterpret_cast<const int4*>(schedule.groups) + number);
    return {group.x, index % tiles, group.y, group.z};
  }
  __device__ int64_t x_row(const StreamItem& item, int token) const {
    const int place = item.first_row + token;
    if (sorted) return place;
    return few ? few_pairs->row[place] : __ldcg(schedule.row + place);
  }
};

template <int kParts, int kNs, bool kGated, bool kFollows>
void launch_groups(const StreamArgs& args, const MoeProduct& product, const DeviceLimits& limits,
                   const StepContext& ctx) {
  constexpr int kOutputTiles = kGated ? kParts / 2 : kParts;
  const MoeItems<kFollows> items = {
      product.rows,   product.schedule, (args.row_tiles + kOutputTiles - 1) / kOutputTiles,
      product.sorted, product.few,      nullptr};
  launch_fp4_stream<kParts, kNs, kGated>(kMoeOp, args, items, product.max_groups * items.tiles,
                                         limits, ctx);
}

template <int kNs, bool kGated, bool kFollows>
void launch_groups(const StreamArgs& args, const MoeProduct& product, const DeviceLimits& limits,
                   const StepContext& ctx) {
  // Tall tiles, unless they are too few to occupy the GPU.
  const int64_t tiles = product.max_groups * args.row_tiles / (kGated ? 2 : 4);
  if (tiles >= int64_t{limits.sms} * 3 / 2) {
    return launch_groups<4, kNs, kGated, kFollows>(args, product, limits, ctx);
  }
  launch_groups<2, kNs, kGated, kFollows>(args, product, limits, ctx);
}

template <int kNs>
void launch_groups(const StreamArgs& args, const MoeProduct& product, bool follows,
                   const DeviceLimits& limits, const StepContext& ctx) {
  if (product.gated()) return launch_groups<kNs, true, false>(args, product, limits, ctx);
  if (follows) return launch_groups<kNs, false, true>(args, product, limits, ctx);
  launch_groups<kNs, false, false>(args, product, limits, ctx);
}

}  // namespace

bool moe_fp4_supports(const MoeProduct& product) {
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  return product.dtype == DType::kBF16 && product.weight.dtype == DType::kE2M1 &&
         (!product.gated() || product.out_cols() % kFp4TileRows == 0) && aligned(product.x) &&
         device_limits().major >= 8;
}

MoeCut moe_fp4_cut(int64_t rows, int64_t top_k, int64_t num_experts) {
  // A row goes through an expert once. Of few pairs a group has all rows of its expert.
  if (rows <= 8) return {.tile_rows = 8};
  const int64_t each = rows * top_k / num_experts;
  const bool few = rows * top_k <= kMoeFewPairs;
  if (!few && each <= 3) return {.tile_rows = 8};
  return {.tile_rows = rows <= 16 || (!few && each <= 8) ? 16 : 32};
}

void moe_fp4(const MoeProduct& product, const MoeCut& cut, bool follows, const StepContext& ctx) {
  const DeviceLimits limits = device_limits();
  const WeightView& weight = product.weight;
  StreamArgs args{};
  args.codes = static_cast<const uint4*>(weight.data);
  args.scales = reinterpret_cast<const uint32_t*>(weight.scales);
  args.row_scales = weight.row_scales;
  args.x = static_cast<const BFloat16*>(product.x);
  args.out = product.out;
  args.n = static_cast<int>(product.weight_rows());
  args.k = static_cast<int>(weight.cols);
  args.units = args.row_units = (args.k + kFp4TileCols - 1) / kFp4TileCols;
  args.out_cols = static_cast<int>(product.out_cols());
  args.row_tiles = (args.out_cols + kFp4TileRows - 1) / kFp4TileRows;
  args.x_stride = weight.cols;
  args.activation = product.activation;
  args.read_once = cut.tile_rows == 8;
  args.tile_tokens = cut.tile_rows;
  if (cut.tile_rows == 8) return launch_groups<1>(args, product, follows, limits, ctx);
  if (cut.tile_rows == 16) return launch_groups<2>(args, product, follows, limits, ctx);
  launch_groups<4>(args, product, follows, limits, ctx);
}

}  // namespace mrv1::cuda
