// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

#include "ops/kv_cache.h"
#include "ops/vector_ops.h"
#include "state/step_context.h"

namespace mrv1 {

// Writes heads of tokens, head_dim contiguous elements of an activation dtype, to their places in a
// cache, and their scales if it has one for each.
class CacheHeadWriter {
 public:
  // For heads of `dtype`; check_cache_write() has passed. The cache outlives this.
  CacheHeadWriter(const KvCacheLayer& cache, DType dtype);

  void write(bool is_key, int64_t slot, int64_t head, const void* from) const;

 private:
  const KvCacheLayer& cache_;
  // For codes; null where bits are copied.
  const CodeOps* codes_ = nullptr;
};

// Throws kInvalidArgument unless each of the step's tokens has a slot in [-1, slots of the cache).
void check_slots(std::string_view op, const KvCacheLayer& cache, const SlotMapping& slots,
                 const StepContext& ctx);

}  // namespace mrv1
