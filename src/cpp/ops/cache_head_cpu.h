// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

#include "ops/kv_cache.h"
#include "state/step_context.h"

namespace mrv1 {

// Writes one head of a token, cache.head_dim contiguous elements of an activation dtype, to its
// place among the keys or the values, and its scale if the cache has one for it.
using WriteCacheHead = void (*)(const KvCacheLayer& cache, bool is_key, int64_t slot, int64_t head,
                                const void* from);

// For heads of `dtype`; check_cache_write() has passed.
WriteCacheHead cache_head_writer(const KvCacheLayer& cache, DType dtype);

// Throws kInvalidArgument unless each of the step's tokens has a slot in [-1, slots of the cache).
void check_slots(std::string_view op, const KvCacheLayer& cache, const SlotMapping& slots,
                 const StepContext& ctx);

}  // namespace mrv1
