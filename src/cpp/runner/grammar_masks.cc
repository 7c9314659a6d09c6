// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/grammar_masks.h"

#include "core/device.h"

#include <algorithm>

namespace mrv1 {

void GrammarMasks::allocate(Device& device) {
  memory_ = device.allocate_mapped(static_cast<size_t>(num_rows_) * mask_size() * sizeof(uint32_t),
                                   "grammar masks");
}

void GrammarMasks::allow_all(int32_t row) { std::ranges::fill(mask(row), ~uint32_t{0}); }

}  // namespace mrv1
