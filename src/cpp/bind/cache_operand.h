// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "bind/ops_call.h"
#include "ops/kv_cache.h"

namespace mrv1 {

// The arguments of an op that are a paged KV cache.
struct CacheArguments {
  nb::handle key, value;        // [blocks, block_size, kv_heads, head_dim] by shape
  nb::handle k_scale, v_scale;  // None, [], [1] or [kv_heads], or [blocks, block_size, kv_heads]
  std::string kv_cache_dtype = "auto";
};

// A cache of a call and the arrays it is made of.
struct CacheOperand {
  KvCacheLayer layer;
  std::vector<Operand> arrays;  // key_cache, value_cache and, where given, k_scale, v_scale
};

// Takes a cache in and checks all of it: float32, bfloat16 or float16 as `activation` says, any of
// these without, or FP8 with scales. FP8 is what the arrays are, or uint8 with a kv_cache_dtype
// that names the format. Blocks, tokens and heads may lie in any order by positive strides, those
// of keys and values equal. Where the cache is written no element lies where another one does, nor
// do scales of tokens. Values of static scales are checked where the host can look at them.
CacheOperand cache_operand(OpCall& call, const CacheArguments& arguments,
                           std::optional<DType> activation, bool written);

// The dtype that kv_cache_dtype names: FP8, or that of activations for "auto".
DType named_cache_dtype(const OpCall& call, const std::string& kv_cache_dtype, DType activation);

void check_head_dim(const OpCall& call, int64_t head_dim);

}  // namespace mrv1
