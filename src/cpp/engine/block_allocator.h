// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "core/error.h"

namespace mrv1 {

// Free KV blocks, block 0 excluded (the null block). Reservations promise blocks that are taken
// later: allocate() draws on one, so it cannot fail.
class BlockAllocator {
 public:
  explicit BlockAllocator(int32_t num_blocks) : total_(num_blocks - 1) {
    for (int32_t block = num_blocks - 1; block >= 1; --block) free_.push_back(block);
  }

  int32_t total() const { return total_; }
  int32_t free() const { return static_cast<int32_t>(free_.size()); }
  int32_t unreserved() const { return free() - reserved_; }
  int32_t reserved() const { return reserved_; }

  bool reserve(int32_t count) {
    if (count > unreserved()) return false;
    reserved_ += count;
    return true;
  }
  void unreserve(int32_t count) {
    check_internal(count <= reserved_, "blocks", "reservation underflow");
    reserved_ -= count;
  }
  // Takes one reserved block.
  int32_t allocate() {
    check_internal(reserved_ > 0 && !free_.empty(), "blocks", "nothing is reserved");
    --reserved_;
    const int32_t block = free_.back();
    free_.pop_back();
    return block;
  }
  void release(const std::vector<int32_t>& blocks) {
    free_.insert(free_.end(), blocks.rbegin(), blocks.rend());
    check_internal(free() <= total_, "blocks", "released twice");
  }

 private:
  int32_t total_;
  int32_t reserved_ = 0;
  std::vector<int32_t> free_;
};

}  // namespace mrv1
