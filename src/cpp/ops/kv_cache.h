// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace mrv1 {

// One layer's paged key/value cache. Element (block, token, head, dim) of keys lies at
// key + block * block_stride + token * token_stride + head * head_stride + dim; strides count
// elements and hold for values too. The runner allocates [blocks, heads, block_size, head_dim].
struct KvCacheLayer {
  void* key = nullptr;
  void* value = nullptr;
  DType dtype = DType::kF32;
  int32_t num_blocks = 0;
  int32_t block_size = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int64_t block_stride = 0, token_stride = 0, head_stride = 0;
};

// Head geometry of an attention layer. Its input is a packed row [q heads | k heads | v heads],
// each head head_dim wide.
struct HeadShape {
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;

  int32_t qkv_cols() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
  int32_t q_cols() const { return num_heads * head_dim; }
};

}  // namespace mrv1
