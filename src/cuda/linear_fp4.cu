// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// linear with NVFP4 weights. Few rows go through linear_fp4_streamed.cu. For many a weight is
// copied to the workspace in bfloat16, which its codes times their block scales are exactly, for
// the product of bfloat16 linears; a piece at a time where it is larger than the workspace is to
// be. float32 activations have a plain kernel.
#include "linear_fp4.h"

#include <algorithm>
#include <type_traits>

#include "activation.cuh"
#include "fp4.cuh"
#include "fp4_gemm.cuh"
#include "launch.h"
#include "linear_context.h"
#include "vector.cuh"

namespace mrv1::cuda {
namespace {

constexpr std::string_view kOp = "linear";
constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;
constexpr size_t kScratchAlignment = 256;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ float zero;  // as all of a device's variables begin

// A warp computes an output, or gate and up of one; its lanes split the blocks of columns.
template <typename T, typename Out, bool kGated>
__global__ void __launch_bounds__(kThreads)
    plain_kernel(LinearParams params, int64_t first_col, int64_t cols, int64_t rows,
                 int64_t x_stride) {
  launch_next();
  wait_for_previous();
  const WeightView& weight = params.weight;
  const int64_t out_cols = kGated ? weight.rows / 2 : weight.rows;
  const int64_t col = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (col >= out_cols) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const T* x = static_cast<const T*>(params.x) + row * x_stride;
    constexpr int kSums = kGated ? 2 : 1;
    float sums[kSums] = {};
    for (int64_t block = lane; block < cols / 16; block += 32) {
#pragma unroll
      for (int which = 0; which < kSums; ++which) {
        const Fp4Block codes = fp4_block(weight, which * out_cols + col, first_col / 16 + block);
        const uint32_t scale = fp4_decode_scale(codes.scale, 0);
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          uint32_t pairs[4];
          fp4_dequantize(word == 0 ? codes.words.x : codes.words.y, scale, pairs);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const T* at = x + block * 16 + word * 8 + i * 2;
            sums[which] = fmaf(to_float(at[0]), __uint_as_float(pairs[i] << 16), sums[which]);
            sums[which] =
                fmaf(to_float(at[1]), __uint_as_float(pairs[i] & 0xffff0000u), sums[which]);
          }
        }
      }
    }
#pragma unroll
    for (int which = 0; which < kSums; ++which) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        sums[which] += __shfl_xor_sync(0xffffffffu, sums[which], step);
      }
      const int64_t at = which * out_cols + col;
      sums[which] = __fmul_rn(sums[which], weight.row_scales[at] * kFp4Unscale);
      if (params.bias != nullptr) sums[which] += params.bias[at];
    }
    if (lane != 0) continue;
    float value = sums[0];
    if constexpr (kGated) {
      value = gated_mul(params.activation, to_float(from_float<T>(sums[0])),
                        to_float(from_float<T>(sums[kSums - 1])));
    }
    static_cast<Out*>(params.out)[row * out_cols + col] = from_float<Out>(value);
  }
}

// out[i, c] = code * block scale of rows first_row + i, in bfloat16. A thread has what a lane has
// of a unit of 64 columns; blockIdx.y is a tile's row.
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(WeightView weight, int64_t matrix_tiles, int64_t first_row, int64_t rows,
                      BFloat16* out) {
  const int64_t row_tiles = (weight.cols + kFp4TileCols - 1) / kFp4TileCols;
  const int64_t unit = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int64_t tile_row = blockIdx.z * matrix_tiles + first_row / kFp4TileRows + blockIdx.y;
  const int64_t tile = tile_row * row_tiles + unit / 2;
  out += blockIdx.z * rows * weight.cols;
  const int64_t col = unit * kFp4UnitCols + lane % 4 * 16;
  const bool valid = col < weight.cols;
  uint4 codes = {0, 0, 0, 0};
  uint32_t scales = 0;
  if (valid) {
    codes = static_cast<const uint4*>(weight.data)[(tile * 2 + unit % 2) * 32 + lane];
    scales = reinterpret_cast<const uint32_t*>(weight.scales)[tile * 32 + lane];
    scales >>= unit % 2 * 16;
  }
  launch_next();
  wait_for_previous();
  if (!valid) return;
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    const int64_t row = int64_t{blockIdx.y} * kFp4TileRows + high * 8 + lane / 4;
    if (row >= rows) continue;
    constexpr uint32_t kUnscale = 0x43004300u;  // kFp4Unscale, twice
    static_assert(kFp4Unscale == 128.0f);
    const uint32_t scale = fp4_decode_scale(scales, high);
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      uint32_t pairs[4];
      fp4_dequantize(word == 0 ? (high == 0 ? codes.x : codes.z) : (high == 0 ? codes.y : codes.w),
                     scale, pairs);
#pragma unroll
      for (uint32_t& pair : pairs) pair = multiply_pairs(pair, kUnscale);
      store_vector(out + row * weight.cols + col, word,
                   make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    }
  }
}

// Copies rows [first_row, first_row + rows), the first of them a multiple of 16.
void dequantize(const WeightView& weight, int64_t first_row, int64_t rows, BFloat16* out,
                const StepContext& ctx) {
  const int64_t units = ceil_div(weight.cols, kFp4TileCols) * 2;
  const int64_t tiles = ceil_div(rows, kFp4TileRows);
  for (int64_t tile = 0; tile < tiles; tile += kMaxGridY) {
    const int64_t count = std::min(kMaxGridY, tiles - tile);
    const int64_t done = tile * kFp4TileRows;
    launch(
        kOp, ctx, dequantize_kernel,
        dim3(static_cast<unsigned>(ceil_div(units, kThreads / 32)), static_cast<unsigned>(count)),
        kThreads, 0, weight, 0, first_row + done, rows - done, out + done * weight.cols);
  }
}

struct FinishArgs {
  const float* product;     // [rows, sums * cols]: of gate and then of up with an activation
  int64_t product_stride;   // elements between rows
  const float* row_scales;  // of the first column, those of up `out_cols` on
  const float* bias;        // likewise, or null
  void* out;                // the first column's, in rows of out_cols
  int64_t cols, out_cols;
  Activation activation;
};

// out = product * row scale (+ bias), or activation(gate) * up of two. blockIdx.y is the row.
template <typename Out, bool kGated>
__global__ void __launch_bounds__(kThreads) scale_kernel(FinishArgs args) {
  launch_next();
  wait_for_previous();
  const int64_t col = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (col >= args.cols) return;
  constexpr int kSums = kGated ? 2 : 1;
  float sums[kSums];
#pragma unroll
  for (int which = 0; which < kSums; ++which) {
    const int64_t at = which * args.out_cols + col;
    sums[which] =
        __fmul_rn(args.product[blockIdx.y * args.product_stride + which * args.cols + col],
                  args.row_scales[at]);
    if (args.bias != nullptr) sums[which] += args.bias[at];
  }
  float value = sums[0];
  if constexpr (kGated) {
    value = gated_mul(args.activation, to_float(from_float<Out>(sums[0])),
                      to_float(from_float<Out>(sums[kSums - 1])));
  }
  static_cast<Out*>(args.out)[blockIdx.y * args.out_cols + col] = from_float<Out>(value);
}

// Where a linear by way of copies has what: copies of weight rows in `scratch_bytes` at the end of
// the workspace, products of float32 in the rest, after what cuBLASLt or CUTLASS take.
struct CopiedLinear {
  const LinearParams& params;
  int64_t scratch_bytes;
  LinearContext& context;
  const StepContext& ctx;

  const WeightView& weight = params.weight;
  int64_t sums = params.gated() ? 2 : 1;  // weight rows of an output
  StepContext rest = without_scratch();
  void* scratch = static_cast<char*>(ctx.workspace) + rest.workspace_bytes;
  char* products = static_cast<char*>(ctx.workspace) + kCublasLtWorkspace;
  int64_t room = static_cast<int64_t>(rest.workspace_bytes) - kCublasLtWorkspace;
  int64_t piece = piece_outputs();
  bool native = is_native();

  StepContext without_scratch() const {
    StepContext without = ctx;
    without.workspace_bytes = ctx.workspace_bytes / kScratchAlignment * kScratchAlignment -
                              static_cast<size_t>(scratch_bytes);
    return without;
  }
  int64_t copy_bytes() const {
    return weight.rows * weight.cols * static_cast<int64_t>(sizeof(BFloat16));
  }
  // Outputs whose weight rows are copied at a time.
  int64_t piece_outputs() const {
    const int64_t out_cols = params.out_cols();
    const int64_t fit =
        scratch_bytes / (sums * weight.cols * static_cast<int64_t>(sizeof(BFloat16)));
    if (fit >= out_cols) return out_cols;
    const int64_t pieces = ceil_div(out_cols, fit / kFp4TileRows * kFp4TileRows);
    return ceil_div(ceil_div(out_cols, pieces), kFp4TileRows) * kFp4TileRows;
  }
  // Whether the GPU multiplies codes, x being rounded to such as well.
  bool is_native() const {
    return fp4_gemm_supported() && weight.cols % 32 == 0 &&
           fp4_operand_bytes(sums * piece, weight.cols) <= scratch_bytes &&
           room >= native_bytes(kFp4GemmRows);
  }
  int64_t native_stride() const { return fp4_gemm_padded(sums * piece, 4); }
  int64_t native_bytes(int64_t rows) const {
    return fp4_operand_bytes(rows, weight.cols) +
           rows * native_stride() * static_cast<int64_t>(sizeof(float));
  }
  // Rows whose products are there at a time.
  int64_t piece_rows() const {
    const int64_t row_bytes = sums * piece * static_cast<int64_t>(sizeof(float));
    int64_t rows = std::min(room / row_bytes, kMaxGridY);
    if (native) {
      rows = rows / kFp4GemmRows * kFp4GemmRows;
      while (native_bytes(rows) > room) rows -= kFp4GemmRows;
    }
    check_internal(rows > 0, kOp, "workspace has ", ctx.workspace_bytes,
                   " bytes, which hold no row of ", sums * piece);
    return rows;
  }

  // cuBLASLt multiplies by row scales as it goes, if it is known which are equal.
  bool run_whole(int64_t rows) const {
    if (native || weight.scale_runs == nullptr || weight.scale_runs->empty() ||
        copy_bytes() > scratch_bytes) {
      return false;
    }
    LinearParams copied = params;
    copied.weight = {.data = scratch,
                     .dtype = DType::kBF16,
                     .rows = weight.rows,
                     .cols = weight.cols,
                     .row_scales = weight.row_scales,
                     .scale_runs = weight.scale_runs};
    const LinearPlan plan = context.plan(copied, rows, rest);
    if (plan.kind != LinearKind::kCublasLt) return false;
    dequantize(weight, 0, weight.rows, static_cast<BFloat16*>(scratch), ctx);
    run_linear(copied, rows, plan, context, rest);
    return true;
  }

  // The weight rows of outputs [first, first + cols).
  void copy_weight(int64_t first, int64_t cols) const {
    if (native) {
      fp4_untile(weight, first, cols, params.out_cols(), sums,
                 fp4_operand(scratch, sums * cols, weight.cols), ctx);
      return;
    }
    for (int64_t which = 0; which < sums; ++which) {
      dequantize(weight, which * params.out_cols() + first, cols,
                 static_cast<BFloat16*>(scratch) + which * cols * weight.cols, ctx);
    }
  }

  // The product of rows [row, row + count) with them; without the scales of rows.
  const float* multiply(int64_t row, int64_t count, int64_t cols) const {
    const BFloat16* x = static_cast<const BFloat16*>(params.x) + row * weight.cols;
    if (native) {
      const Fp4Operand rounded = fp4_operand(products, count, weight.cols);
      auto* out = reinterpret_cast<float*>(products + fp4_operand_bytes(count, weight.cols));
      fp4_quantize(x, weight.input_scale, count, weight.cols, rounded, ctx);
      const Fp4Operand copied = fp4_operand(scratch, sums * cols, weight.cols);
      fp4_gemm({rounded.codes, rounded.scales, copied.codes, copied.scales, out, weight.input_scale,
                count, sums * cols, weight.cols, fp4_gemm_padded(sums * cols, 4)},
               ctx.workspace, ctx);
      return out;
    }
    LinearParams copied = params;
    copied.x = x;
    copied.weight = {
        .data = scratch, .dtype = DType::kBF16, .rows = sums * cols, .cols = weight.cols};
    copied.bias = nullptr;
    copied.activation = Activation::kNone;
    copied.out = products;
    copied.out_dtype = DType::kF32;
    run_linear(copied, count, context.plan(copied, count, rest), context, rest);
    return reinterpret_cast<const float*>(products);
  }

  void finish(const float* product, int64_t row, int64_t count, int64_t first, int64_t cols) const {
    const int64_t at =
        (row * params.out_cols() + first) * static_cast<int64_t>(dtype_size(params.out_dtype));
    const FinishArgs args = {product,
                             native ? fp4_gemm_padded(sums * cols, 4) : sums * cols,
                             weight.row_scales + first,
                             params.bias != nullptr ? params.bias + first : nullptr,
                             static_cast<char*>(params.out) + at,
                             cols,
                             params.out_cols(),
                             params.activation};
    const dim3 grid(static_cast<unsigned>(ceil_div(cols, kThreads)), static_cast<unsigned>(count));
    dispatch_activation(params.out_dtype, kOp, [&](auto tag) {
      using Out = typename decltype(tag)::type;
      launch(kOp, ctx, params.gated() ? scale_kernel<Out, true> : scale_kernel<Out, false>, grid,
             kThreads, 0, args);
    });
  }

  void run(int64_t rows) const {
    if (run_whole(rows)) return;
    const int64_t most_rows = piece_rows();
    for (int64_t first = 0; first < params.out_cols(); first += piece) {
      const int64_t cols = std::min(piece, params.out_cols() - first);
      copy_weight(first, cols);
      for (int64_t row = 0; row < rows; row += most_rows) {
        const int64_t count = std::min(most_rows, rows - row);
        finish(multiply(row, count, cols), row, count, first, cols);
      }
    }
  }
};

template <typename T, typename Out>
void run_plain(const LinearParams& params, int64_t first_col, int64_t cols, int64_t rows,
               int64_t x_stride, const StepContext& ctx) {
  const dim3 grid(static_cast<unsigned>(ceil_div(params.out_cols(), kThreads / 32)),
                  static_cast<unsigned>(std::min(rows, kMaxGridY)));
  launch(kOp, ctx, params.gated() ? plain_kernel<T, Out, true> : plain_kernel<T, Out, false>, grid,
         kThreads, 0, params, first_col, cols, rows, x_stride);
}

}  // namespace

void fp4_dequantize(const WeightView& weight, int64_t first, int64_t count, BFloat16* out,
                    const StepContext& ctx) {
  const int64_t rows = weight.rows / weight.matrices;
  const int64_t tiles = ceil_div(rows, kFp4TileRows);
  check(tiles <= kMaxGridY && count <= kMaxGridY, kOp, "matrices have ", rows, " rows, at most ",
        kMaxGridY * kFp4TileRows, " are possible");
  const int64_t units = ceil_div(weight.cols, kFp4TileCols) * 2;
  const dim3 grid(static_cast<unsigned>(ceil_div(units, kThreads / 32)),
                  static_cast<unsigned>(tiles), static_cast<unsigned>(count));
  WeightView from = weight;
  const WeightView one = matrix(weight, first);
  from.data = one.data;
  from.scales = one.scales;
  launch(kOp, ctx, dequantize_kernel, grid, kThreads, 0, from, tiles, 0, rows, out);
}

const float* fp4_zero() {
  void* address = nullptr;
  check_cuda(cudaGetSymbolAddress(&address, zero), kOp, "cudaGetSymbolAddress");
  return static_cast<const float*>(address);
}

void linear_fp4_columns(const LinearParams& params, int64_t first_col, int64_t cols, int64_t rows,
                        int64_t x_stride, const StepContext& ctx) {
  if (fp4_streams(params, first_col, cols, x_stride)) {
    return linear_fp4_streamed(params, first_col, cols, rows, x_stride, ctx);
  }
  dispatch_activation(params.dtype, kOp, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (params.out_dtype == params.dtype) {
      run_plain<T, T>(params, first_col, cols, rows, x_stride, ctx);
    } else {
      run_plain<T, float>(params, first_col, cols, rows, x_stride, ctx);
    }
  });
}

void linear_fp4(const LinearParams& params, int64_t rows, LinearContext& context,
                const StepContext& ctx) {
  const WeightView& weight = params.weight;
  if (rows > kFp4StreamedRows && !ctx.batch_invariant && params.dtype == DType::kBF16) {
    const int64_t size = sizeof(BFloat16);
    const int64_t scratch = fp4_workspace_bytes(weight.rows * weight.cols, rows);
    const int64_t others = kCublasLtWorkspace + kMinIntermediate;
    // A single tile of gate and of up must fit.
    if (scratch >= std::min(weight.rows, int64_t{2} * kFp4TileRows) * weight.cols * size &&
        static_cast<int64_t>(ctx.workspace_bytes) >= scratch + others) {
      return CopiedLinear{params, scratch, context, ctx}.run(rows);
    }
  }
  linear_fp4_columns(params, 0, weight.cols, rows, weight.cols, ctx);
}

}  // namespace mrv1::cuda
