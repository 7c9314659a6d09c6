// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// What goes into native NVFP4 products, and which builds and GPUs have them.
#include "fp4_gemm.cuh"

#include <algorithm>

#include "core/float4.h"
#include "fp4.cuh"
#include "launch.h"
#include "linear_skinny_kernels.h"

namespace mrv1::cuda {
namespace {

constexpr std::string_view kOp = "linear (NVFP4, native)";
constexpr int kThreads = 256;

struct OperandSize {
  int64_t rows, blocks;                // of 16 columns
  int64_t padded_rows, padded_blocks;  // of the scales
};

OperandSize operand_size(int64_t rows, int64_t cols) {
  return {rows, cols / 16, fp4_gemm_padded(rows, kFp4GemmRows),
          fp4_gemm_padded(cols / 16, kFp4GemmBlocks)};
}

dim3 operand_grid(const OperandSize& size) {
  const int64_t threads = size.padded_rows * size.padded_blocks;
  return dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads));
}

// A thread has a block of 16 columns of a row, or one of the padding.
struct OperandPlace {
  int64_t row, block;

  __device__ explicit OperandPlace(const OperandSize& size) {
    const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    row = at / size.padded_blocks;
    block = at % size.padded_blocks;
  }
};

__device__ __forceinline__ void store_block(const OperandSize& size, const OperandPlace& at,
                                            const Fp4Operand& out, uint2 codes, uint8_t scale) {
  out.scales[fp4_gemm_scale_index(at.row, at.block, size.padded_blocks)] = scale;
  if (at.row < size.rows && at.block < size.blocks) {
    reinterpret_cast<uint2*>(out.codes)[at.row * size.blocks + at.block] = codes;
  }
}

__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const BFloat16* x, const float* global_scale, OperandSize size,
                    Fp4Operand out) {
  launch_next();
  wait_for_previous();
  const OperandPlace at(size);
  if (at.row >= size.padded_rows) return;
  uint32_t codes[2] = {0, 0};
  Float8E4M3 scale{0};
  if (at.row < size.rows && at.block < size.blocks) {
    float values[16];
    float largest = 0.0f;
    for (int i = 0; i < 16; ++i) {
      values[i] = to_float(x[(at.row * size.blocks + at.block) * 16 + i]);
      largest = fmaxf(largest, fabsf(values[i]));
    }
    scale = fp4_block_scale(largest, *global_scale);
    for (int i = 0; i < 16; ++i) {
      codes[i / 8] |= uint32_t{fp4_code(values[i], scale, *global_scale).bits} << (i % 8 * 4);
    }
  }
  store_block(size, at, out, make_uint2(codes[0], codes[1]), scale.bits);
}

__global__ void __launch_bounds__(kThreads)
    untile_kernel(WeightView weight, int64_t first_row, int64_t run_rows, int64_t run_stride,
                  OperandSize size, Fp4Operand out) {
  launch_next();
  wait_for_previous();
  const OperandPlace at(size);
  if (at.row >= size.padded_rows) return;
  uint2 codes = {0, 0};
  uint8_t scale = 0;
  if (at.row < size.rows && at.block < size.blocks) {
    const int64_t row = first_row + at.row / run_rows * run_stride + at.row % run_rows;
    const Fp4Block block = fp4_block(weight, row, at.block);
    codes = {fp4_unpack_word(block.words.x), fp4_unpack_word(block.words.y)};
    scale = fp4_unpack_scale(static_cast<uint8_t>(block.scale));
  }
  store_block(size, at, out, codes, scale);
}

}  // namespace

#if defined(MRV1_SM100_FP4_GEMM)
void run_sm100_fp4_gemm(const Fp4Gemm& gemm, void* workspace, const StepContext& ctx);

bool fp4_gemm_supported() { return device_limits().major == 10; }

void fp4_gemm(const Fp4Gemm& gemm, void* workspace, const StepContext& ctx) {
  run_sm100_fp4_gemm(gemm, workspace, ctx);
}
#else
bool fp4_gemm_supported() { return false; }

void fp4_gemm(const Fp4Gemm&, void*, const StepContext&) {
  fail(ErrorKind::kDevice, kOp, "this build has no native NVFP4 product");
}
#endif

void fp4_quantize(const BFloat16* x, const float* scale, int64_t rows, int64_t cols,
                  const Fp4Operand& out, const StepContext& ctx) {
  const OperandSize size = operand_size(rows, cols);
  launch(kOp, ctx, quantize_kernel, operand_grid(size), kThreads, 0, x, scale, size, out);
}

void fp4_untile(const WeightView& weight, int64_t first_row, int64_t run_rows, int64_t run_stride,
                int64_t sums, const Fp4Operand& out, const StepContext& ctx) {
  const OperandSize size = operand_size(run_rows * sums, weight.cols);
  launch(kOp, ctx, untile_kernel, operand_grid(size), kThreads, 0, weight, first_row, run_rows,
         run_stride, size, out);
}

}  // namespace mrv1::cuda
