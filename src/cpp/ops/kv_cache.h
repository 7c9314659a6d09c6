// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/dtype.h"

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

// One layer's paged key/value cache. Element (block, token, head, dim) of keys lies at
// key + block * block_stride + token * token_stride + head * head_stride + dim; strides count
// elements and hold for values too.
struct KvCacheLayer {
  void* key = nullptr;
  void* value = nullptr;
  DType dtype = DType::kF32;
  int32_t num_blocks = 0;
  int32_t block_size = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int64_t block_stride = 0, token_stride = 0, head_stride = 0;

  // Elements and bytes of the keys, or of the values.
  int64_t elements() const { return block_stride * num_blocks; }
  int64_t bytes() const { return elements() * static_cast<int64_t>(dtype_size(dtype)); }
};

// A layer of [blocks, kv heads, block_size, head_dim]; addresses are not filled in.
inline KvCacheLayer kv_cache_layer(DType dtype, int32_t num_blocks, int32_t block_size,
                                   const HeadShape& heads) {
  KvCacheLayer layer;
  layer.dtype = dtype;
  layer.num_blocks = num_blocks;
  layer.block_size = block_size;
  layer.num_kv_heads = heads.num_kv_heads;
  layer.head_dim = heads.head_dim;
  layer.token_stride = heads.head_dim;
  layer.head_stride = int64_t{block_size} * heads.head_dim;
  layer.block_stride = layer.head_stride * heads.num_kv_heads;
  return layer;
}

}  // namespace mrv1
