// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Linear of few rows with an NVFP4 weight (fp4_stream.cuh).
#include "fp4_stream.cuh"
#include "linear_fp4.h"

namespace mrv1::cuda {
namespace {

constexpr std::string_view kOp = "linear";
constexpr int kMaxTileTokens = 32;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Tiles of weight rows, and tiles of tokens. Those of one weight tile follow each other, to run
// side by side.
struct LinearItems {
  static constexpr bool kEarly = true;
  static constexpr bool kSameRows = true;
  int tiles, token_tiles;
  int tile_tokens, tokens;

  __device__ void prepare() const {}
  __device__ int count() const { return tiles * token_tiles; }
  __device__ StreamItem at(int index) const {
    const int first = index % token_tiles * tile_tokens;
    return {0, index / token_tiles, first, min(tile_tokens, tokens - first)};
  }
  __device__ int64_t x_row(const StreamItem& item, int token) const {
    return item.first_row + token;
  }
};

template <int kParts, int kNs, bool kGated>
void launch_stream(const StreamArgs& args, LinearItems items, const DeviceLimits& limits,
                   const StepContext& ctx) {
  items.tiles = ceil_div(args.row_tiles, kGated ? kParts / 2 : kParts);
  launch_fp4_stream<kParts, kNs, kGated>(kOp, args, items, int64_t{items.tiles} * items.token_tiles,
                                         limits, ctx);
}

// Tiles of so many parts: by what a multiprocessor reads, weights from memory and x from the second
// cache, whose bytes cost about 0.7 of those; one block alone does not keep it busy.
int choose_parts(const StreamArgs& args, int token_tiles, bool gated, int sms) {
  int best = 0;
  double best_cost = 0;
  for (const int parts : {1, 2, 3, 4}) {
    if (gated && parts % 2 != 0) continue;
    const int items = ceil_div(args.row_tiles, gated ? parts / 2 : parts) * token_tiles;
    const double alone = items <= sms ? 1.5 : 1.0;
    const double cost = alone * ceil_div(items, sms) * (9.0 * parts + 1.4 * args.tile_tokens);
    if (best == 0 || cost < best_cost) {
      best = parts;
      best_cost = cost;
    }
  }
  return best;
}

template <int kNs>
void launch_stream(const StreamArgs& args, const LinearItems& items, const DeviceLimits& limits,
                   const StepContext& ctx) {
  const bool gated = args.activation != Activation::kNone;
  const int parts = choose_parts(args, items.token_tiles, gated, limits.sms);
  if (gated) {
    if (parts == 2) return launch_stream<2, kNs, true>(args, items, limits, ctx);
    return launch_stream<4, kNs, true>(args, items, limits, ctx);
  }
  if (parts == 1) return launch_stream<1, kNs, false>(args, items, limits, ctx);
  if (parts == 2) return launch_stream<2, kNs, false>(args, items, limits, ctx);
  if (parts == 3) return launch_stream<3, kNs, false>(args, items, limits, ctx);
  launch_stream<4, kNs, false>(args, items, limits, ctx);
}

}  // namespace

bool fp4_streams(const LinearParams& params, int64_t first_col, int64_t cols, int64_t x_stride) {
  const int64_t end = first_col + cols;
  return params.dtype == DType::kBF16 && first_col % kFp4TileCols == 0 &&
         (end % kFp4TileCols == 0 || end == params.weight.cols) && x_stride % 8 == 0 &&
         reinterpret_cast<uintptr_t>(params.x) % 16 == 0 && device_limits().major >= 8;
}

void linear_fp4_streamed(const LinearParams& params, int64_t first_col, int64_t cols, int64_t rows,
                         int64_t x_stride, const StepContext& ctx) {
  const DeviceLimits limits = device_limits();
  const WeightView& weight = params.weight;
  const int64_t first_unit = first_col / kFp4TileCols;
  const auto units = [](int64_t columns) {
    return static_cast<int>((columns + kFp4TileCols - 1) / kFp4TileCols);
  };
  StreamArgs args{};
  args.codes = static_cast<const uint4*>(weight.data) + first_unit * 64;
  args.scales = reinterpret_cast<const uint32_t*>(weight.scales) + first_unit * 32;
  args.row_scales = weight.row_scales;
  args.x = static_cast<const BFloat16*>(params.x);
  args.bias = params.bias;
  args.out = params.out;
  args.n = static_cast<int>(weight.rows);
  args.k = static_cast<int>(cols);
  args.units = units(cols);
  args.row_units = units(weight.cols);
  args.out_cols = static_cast<int>(params.out_cols());
  args.row_tiles = ceil_div(args.out_cols, kFp4TileRows);
  args.x_stride = x_stride;
  args.activation = params.activation;
  args.out_f32 = params.out_dtype == DType::kF32;
  LinearItems items{};
  items.tokens = static_cast<int>(rows);
  items.token_tiles = ceil_div(items.tokens, kMaxTileTokens);
  items.tile_tokens = args.tile_tokens = ceil_div(items.tokens, items.token_tiles);
  args.read_once = items.token_tiles == 1;
  if (args.tile_tokens <= 8) return launch_stream<1>(args, items, limits, ctx);
  if (args.tile_tokens <= 16) return launch_stream<2>(args, items, limits, ctx);
  launch_stream<4>(args, items, limits, ctx);
}

}  // namespace mrv1::cuda
