// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

#include "core/dtype.h"
#include "ops/activation.h"

namespace mrv1 {

// The inner loops of the CPU ops, compiled once for each instruction set (vector_ops_<isa>.cc). The
// ops check their arguments, split the work over threads and call these.

// Panels a LinearBlock can name.
constexpr int kMaxPanels = 4;

// out[r, 16 p + lane] = sum over columns of x[r, column] * panels[p][column, lane], in float32 and
// in one chain over ascending columns for every output, however many rows and panels there are.
struct LinearBlock {
  const void* x;  // [rows, x_stride], float32 or bfloat16
  int64_t x_stride;
  int64_t rows;
  int64_t cols;
  const void* panels[kMaxPanels];  // kPanel16 panels of x's dtype
  int num_panels;
  float* out;  // [rows, out_stride]
  int64_t out_stride;
};

// Positions whose scores are computed together; chunks are aligned to position 0.
constexpr int kAttentionChunk = 64;
// Query rows (tokens times heads) of an AttentionTile at most.
constexpr int kAttentionRows = 64;

// Queries of consecutive tokens of one request, for some of the query heads that share one key
// head.
struct AttentionTile {
  const void* q;  // first head of the first token
  void* out;
  int64_t q_token_stride, out_token_stride;  // elements; heads of a token follow each other
  int num_tokens, num_heads;                 // num_tokens * num_heads <= kAttentionRows
  int head_dim;
  const int32_t* positions;    // [num_tokens] ascending
  const int32_t* block_table;  // of the request
  const void* key;             // of the key head, block 0, of cache_dtype
  const void* value;
  DType cache_dtype;  // of q, or FP8
  int64_t block_stride, token_stride;
  // Of the key head, block 0: an element is its code times its scale. Null if there are none.
  const float* key_scale;
  const float* value_scale;
  int64_t scale_block_stride, scale_token_stride;
  int block_size;
  float scale;
  float softcap;  // 0: none
  int window;
  void* scratch;  // attention_scratch_bytes(head_dim), aligned to 64 bytes
};

constexpr int64_t attention_scratch_bytes(int64_t head_dim) {
  const int64_t padded = (head_dim + 15) / 16 * 16;
  // Queries, packed keys, output accumulators; decoded keys and values; probabilities; maximum and
  // sum of each row.
  return 4 * (padded * (2 * kAttentionRows + 3 * kAttentionChunk) +
              kAttentionRows * kAttentionChunk + 2 * kAttentionRows);
}

struct NormRow {
  const void* x;
  const void* residual;  // or null
  const float* weight;
  void* out;
  void* sum;
  int64_t cols;
  float eps;
};

// Entries for one activation dtype. `n` counts elements; any value is allowed.
struct TypedVectorOps {
  void (*linear)(const LinearBlock& block);
  // Columns of a kPanel16 panel of NVFP4, code * block scale, as a panel of the dtype; exact.
  // `cols` is a multiple of 16, `codes` and `scales` are those of the first.
  void (*decode_fp4_panel)(const uint8_t* codes, const uint8_t* scales, int64_t cols, void* panel);
  // out = acc + bias (bias may be null), rounded to the dtype.
  void (*store_row)(const float* acc, const float* bias, void* out, int64_t n);
  // out = activation(gate + bias) * (up + bias), the sums rounded to the dtype before that.
  void (*store_gated_mul_row)(Activation activation, const float* gate, const float* up,
                              const float* gate_bias, const float* up_bias, void* out, int64_t n);
  void (*gated_mul_row)(Activation activation, const void* gate, const void* up, void* out,
                        int64_t n);
  void (*soft_cap_row)(const void* x, float cap, void* out, int64_t n);
  void (*add_row)(const void* a, const void* b, void* out, int64_t n);
  // sums += scale * x, each a fused multiply-add.
  void (*add_scaled_row)(const void* x, float scale, float* sums, int64_t n);
  void (*norm_row)(const NormRow& row);
  // The first 2 * pairs elements of a head; cos_sin holds a cosine for each pair, then the sines.
  // Pairs are (i, i + pairs), or (2 i, 2 i + 1) if interleaved.
  void (*rope_head)(const void* x, const float* cos_sin, void* out, int64_t pairs,
                    bool interleaved);
  void (*attention)(const AttentionTile& tile);
};

// Entries for heads that become FP8 codes, for one activation dtype.
struct CodeOps {
  // The largest finite magnitude, 0 if there is none.
  float (*largest_finite)(const void* values, int64_t n);
  // codes = float8_from_float(value * inverse)
  void (*encode_e4m3)(const void* values, float inverse, void* codes, int64_t n);
  void (*encode_e5m2)(const void* values, float inverse, void* codes, int64_t n);
};

struct VectorOps {
  TypedVectorOps f32, bf16;
  // For float16 queries and outputs, with float32 in between.
  void (*attention_f16)(const AttentionTile& tile);
  CodeOps f32_codes, bf16_codes, f16_codes;
};

// For current_cpu_isa().
const VectorOps& vector_ops();

// The entries for an activation dtype. Throws kInvalidArgument unless it is float32 or bfloat16.
const TypedVectorOps& vector_ops(DType dtype, std::string_view op);

namespace amx {
// Columns of a weight that this takes are a multiple of this.
constexpr int64_t kAmxCols = 32;
// TypedVectorOps::linear for bfloat16. The order of a sum is this function's own.
void linear(const LinearBlock& block);
}  // namespace amx

namespace portable {
extern const VectorOps kVectorOps;
}
namespace avx2 {
extern const VectorOps kVectorOps;
}
namespace avx512 {
extern const VectorOps kVectorOps;
}
namespace avx512bf16 {
extern const VectorOps kVectorOps;
}

}  // namespace mrv1
