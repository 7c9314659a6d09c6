// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "core/float8.h"

namespace mrv1 {

// Head geometry of an attention layer. Its input is a packed row [q heads | k heads | v heads],
// each head head_dim wide.
struct HeadShape {
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;

  int32_t qkv_cols() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
  int32_t q_cols() const { return num_heads * head_dim; }
};

// Scales of an FP8 cache: an element is its code times its scale. One formula for all kinds; the
// strides, in floats, are 0 where a kind has one scale for many elements:
//   kTensor: key[0], value[0];  kHead: key[head], value[head];
//   kToken:  key[block * block_stride + token * token_stride + head * head_stride], also value.
// The writer takes static scales (kTensor, kHead) as they are, finite and at least 2^-126. For
// kToken it computes and stores scale = max(m / format maximum, 2^-126) with m the largest finite
// magnitude of the head after its rounding to the activation dtype (0 if there is none). In all
// kinds code = float8_from_float(value * (1 / scale)), in float32: out of range and infinite values
// saturate, NaN stays NaN (core/float8.h).
enum class KvScaleKind : uint8_t { kNone, kTensor, kHead, kToken };
struct KvScales {
  KvScaleKind kind = KvScaleKind::kNone;
  float* key = nullptr;
  float* value = nullptr;
  int64_t block_stride = 0, token_stride = 0, head_stride = 0;

  MRV1_HD int64_t index(int64_t block, int64_t token, int64_t head) const {
    return block * block_stride + token * token_stride + head * head_stride;
  }
};

// The smallest scale: its inverse is finite.
constexpr float kMinKvScale = 0x1p-126f;

// The scale of a head of a token, by the largest finite magnitude in it. The division by a constant
// is a product and its correction, which rounds as a division does for every float.
template <typename F>
MRV1_HD float kv_token_scale(float largest) {
  constexpr float kInverse = 1.0f / F::kMax;
  const float near = largest * kInverse;
  const float scale = fmaf(fmaf(-near, F::kMax, largest), kInverse, near);
  return scale < kMinKvScale ? kMinKvScale : scale;
}

// Where tokens go: int32 or int64, -1 for nowhere.
struct SlotMapping {
  const void* data = nullptr;
  bool is_wide = false;

  MRV1_HD int64_t operator[](int64_t token) const {
    return is_wide ? static_cast<const int64_t*>(data)[token]
                   : static_cast<const int32_t*>(data)[token];
  }
};

// One layer's paged key/value cache, in an activation dtype or in FP8. Element (block, token, head,
// dim) of keys lies at key + block * block_stride + token * token_stride + head * head_stride +
// dim; strides count elements and hold for values too.
struct KvCacheLayer {
  void* key = nullptr;
  void* value = nullptr;
  DType dtype = DType::kF32;
  int32_t num_blocks = 0;
  int32_t block_size = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int64_t block_stride = 0, token_stride = 0, head_stride = 0;
  KvScales scales;  // kind kNone unless dtype is FP8

  // Elements and bytes of the keys, or of the values.
  int64_t elements() const { return block_stride * num_blocks; }
  int64_t bytes() const { return elements() * static_cast<int64_t>(dtype_size(dtype)); }
  // Bytes of the scales of the keys, or of the values, where each token has its own.
  int64_t scale_bytes() const {
    const bool stored = scales.kind == KvScaleKind::kToken;
    return stored ? scales.block_stride * num_blocks * static_cast<int64_t>(sizeof(float)) : 0;
  }
};

// A layer of [blocks, kv heads, block_size, head_dim]; addresses are not filled in. Scales of
// tokens lie as [blocks, kv heads, block_size], so that those of a head's block are neighbours.
inline KvCacheLayer kv_cache_layer(DType dtype, int32_t num_blocks, int32_t block_size,
                                   const HeadShape& heads,
                                   KvScaleKind scales = KvScaleKind::kNone) {
  KvCacheLayer layer;
  layer.dtype = dtype;
  layer.num_blocks = num_blocks;
  layer.block_size = block_size;
  layer.num_kv_heads = heads.num_kv_heads;
  layer.head_dim = heads.head_dim;
  layer.token_stride = heads.head_dim;
  layer.head_stride = int64_t{block_size} * heads.head_dim;
  layer.block_stride = layer.head_stride * heads.num_kv_heads;
  layer.scales.kind = scales;
  if (scales == KvScaleKind::kHead) layer.scales.head_stride = 1;
  if (scales == KvScaleKind::kToken) {
    layer.scales.token_stride = 1;
    layer.scales.head_stride = block_size;
    layer.scales.block_stride = int64_t{block_size} * heads.num_kv_heads;
  }
  return layer;
}

}  // namespace mrv1
