// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/copy_blocks.h"

#include "core/error.h"

namespace mrv1 {

void check_copies(std::span<const BlockCopy> copies, int32_t num_blocks) {
  const char* where = "copy_blocks";
  for (size_t i = 0; i < copies.size(); ++i) {
    for (const int32_t block : {copies[i].source, copies[i].target}) {
      check(block > 0 && block < num_blocks, where, "block id ", block, " is outside [1, ",
            num_blocks, ")");
    }
    for (size_t j = 0; j < copies.size(); ++j) {
      check(
          copies[i].target != copies[j].source && (i == j || copies[i].target != copies[j].target),
          where, "block ", copies[i].target, " is written by one copy and named by another");
    }
  }
}

}  // namespace mrv1
