// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "dist/communicator.h"

namespace mrv1 {

// What a rank brings to a step; nothing where it merely goes along.
struct StepLoad {
  int32_t tokens = 0;
  bool has_prompts = false;
};

// What all ranks bring, and so what all decide by.
struct StepLoads {
  bool runs = false;  // somebody brings something
  int32_t size = 0;
  std::array<StepLoad, kMaxRanks> ranks{};
};

// Ranks that have requests of their own but run the same steps: each tells what it brings,
// and none begins before all have. A rank that has nothing to do sleeps until another one wants a
// step. As a step is launched once all have come to it, whatever a rank does before it comes finds
// no device that waits for it.
//
// Any thread of any rank, but agree() by one thread of each rank.
class StepAgreement {
 public:
  explicit StepAgreement(int size);

  // How a rank that sleeps is told that others want a step; an empty function ends that. It is
  // called while nobody else is, and must not call this object.
  void set_wake(int rank, std::function<void()> wake);
  // Whether others wait for the rank to come to the next step.
  bool is_wanted(int rank) const {
    return arrived_.load(std::memory_order_acquire) > 0 &&
           !rank_arrived_[static_cast<size_t>(rank)].load(std::memory_order_acquire);
  }
  // Tells what the rank brings to the next step and waits for the others; what all bring. Nobody
  // runs the step if nobody brings anything, if close() was called, or if has_ended() says that the
  // ranks have ended.
  StepLoads agree(int rank, const StepLoad& load, const std::function<bool()>& has_ended);
  // From now on no step is agreed on: ranks that wait come back.
  void close();
  bool is_closed() const { return closed_.load(std::memory_order_acquire); }

 private:
  const int size_;
  std::atomic<int> arrived_{0};
  std::vector<std::atomic<bool>> rank_arrived_;
  std::atomic<bool> closed_{false};

  std::mutex mutex_;  // of all below; arrived_ and rank_arrived_ change under it
  std::condition_variable changed_;
  uint64_t round_ = 0;
  std::vector<std::function<void()>> wakes_;
  StepLoads next_, agreed_;  // of the round that is open, and of the one before
};

}  // namespace mrv1
