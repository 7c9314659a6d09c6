// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/step_agreement.h"

#include <chrono>
#include <utility>

namespace mrv1 {
namespace {

// Between two looks whether the ranks have ended.
constexpr std::chrono::milliseconds kLook{20};

}  // namespace

StepAgreement::StepAgreement(int size)
    : size_(size), rank_arrived_(static_cast<size_t>(size)), wakes_(static_cast<size_t>(size)) {}

void StepAgreement::set_wake(int rank, std::function<void()> wake) {
  std::lock_guard lock(mutex_);
  wakes_[static_cast<size_t>(rank)] = std::move(wake);
}

StepLoads StepAgreement::agree(int rank, const StepLoad& load,
                               const std::function<bool()>& has_ended) {
  std::unique_lock lock(mutex_);
  if (closed_.load(std::memory_order_relaxed)) return {};
  const uint64_t round = round_;
  const bool first = arrived_.load(std::memory_order_relaxed) == 0;
  if (first) next_ = {.size = size_};
  next_.runs |= load.tokens > 0;
  next_.ranks[static_cast<size_t>(rank)] = load;
  rank_arrived_[static_cast<size_t>(rank)].store(true, std::memory_order_release);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    agreed_ = next_;
    for (std::atomic<bool>& arrived : rank_arrived_) arrived.store(false);
    arrived_.store(0, std::memory_order_release);
    ++round_;
    changed_.notify_all();
    return agreed_;
  }
  if (first) {
    for (size_t other = 0; other < wakes_.size(); ++other) {
      if (other != static_cast<size_t>(rank) && wakes_[other]) wakes_[other]();
    }
  }
  const auto is_over = [&] { return round_ != round || closed_.load(std::memory_order_relaxed); };
  while (!changed_.wait_for(lock, kLook, is_over)) {
    if (has_ended()) break;
  }
  // A step that all came to counts, also if the ranks have ended since. The next one cannot be
  // complete without this rank, so what was agreed on is still there.
  if (round_ != round) return agreed_;
  rank_arrived_[static_cast<size_t>(rank)].store(false, std::memory_order_release);
  arrived_.fetch_sub(1, std::memory_order_acq_rel);
  return {};
}

void StepAgreement::close() {
  {
    std::lock_guard lock(mutex_);
    closed_.store(true, std::memory_order_release);
  }
  changed_.notify_all();
}

}  // namespace mrv1
