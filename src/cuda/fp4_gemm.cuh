// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "fp4.cuh"

// Products of two NVFP4 matrices on tensor cores that multiply codes themselves: compute capability
// 10.0, in builds for it that have CUTLASS's headers.
namespace mrv1::cuda {

// Block scales of a matrix as the tensor cores take them: tiles of 128 rows and 4 blocks, in which
// rows 32 apart follow each other. Rows and blocks are padded with zeros.
constexpr int64_t kFp4GemmRows = 128;
constexpr int64_t kFp4GemmBlocks = 4;
constexpr int64_t fp4_gemm_padded(int64_t count, int64_t unit) {
  return (count + unit - 1) / unit * unit;
}
// Bytes of the scales of [rows, cols].
constexpr int64_t fp4_gemm_scale_bytes(int64_t rows, int64_t cols) {
  return fp4_gemm_padded(rows, kFp4GemmRows) * fp4_gemm_padded(cols / 16, kFp4GemmBlocks);
}
// Where the scale of a row and a block lies; `blocks` are those of a row, padded.
MRV1_HD int64_t fp4_gemm_scale_index(int64_t row, int64_t block, int64_t blocks) {
  const int64_t tile = row / 128 * (blocks / 4) + block / 4;
  return tile * 512 + row % 32 * 16 + row % 128 / 32 * 4 + block % 4;
}

// out = scale * x weight^T in float32, of values code * block scale.
struct Fp4Gemm {
  const void* x;              // codes [rows, k / 2], the even column in the low nibble
  const void* x_scales;       // as above
  const void* weight;         // codes [n, k / 2]
  const void* weight_scales;  // as above
  float* out;                 // [rows, n], rows out_stride apart, a multiple of 4
  const float* scale;         // device memory
  int64_t rows, n, k;         // k: a multiple of 32
  int64_t out_stride;
};

// Whether this build has the product, and the current GPU can run it.
bool fp4_gemm_supported();
// Scratch of the product.
constexpr size_t kFp4GemmWorkspace = size_t{8} << 20;
void fp4_gemm(const Fp4Gemm& gemm, void* workspace, const StepContext& ctx);

// Operands of a product: codes and block scales, of so many bytes.
struct Fp4Operand {
  uint8_t* codes;
  uint8_t* scales;
};
constexpr int64_t fp4_operand_bytes(int64_t rows, int64_t cols) {
  return fp4_gemm_padded(rows * cols / 2, 256) +
         fp4_gemm_padded(fp4_gemm_scale_bytes(rows, cols), 256);
}
inline Fp4Operand fp4_operand(void* memory, int64_t rows, int64_t cols) {
  auto* codes = static_cast<uint8_t*>(memory);
  return {codes, codes + fp4_gemm_padded(rows * cols / 2, 256)};
}
// Rounds x [rows, cols] to block scales and codes; `scale` is their global one, in device memory.
void fp4_quantize(const BFloat16* x, const float* scale, int64_t rows, int64_t cols,
                  const Fp4Operand& out, const StepContext& ctx);
// Rows of an NVFP4 weight: of each of `sums` runs of run_rows rows, `run_stride` rows apart, one
// after the other.
void fp4_untile(const WeightView& weight, int64_t first_row, int64_t run_rows, int64_t run_stride,
                int64_t sums, const Fp4Operand& out, const StepContext& ctx);

}  // namespace mrv1::cuda
