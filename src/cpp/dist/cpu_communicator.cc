// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "dist/cpu_communicator.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <string>

#include "core/error.h"

namespace mrv1 {
namespace {

// Looks at the others before a rank goes to sleep: ranks that have a core each meet within these.
constexpr int kSpins = 2000;

}  // namespace

struct CpuCommunicator::Shared {
  std::chrono::milliseconds timeout{};
  std::atomic<uint64_t> meetings{0};  // that all ranks came to
  std::atomic<bool> aborted{false};

  std::mutex mutex;  // of all below
  std::condition_variable changed;
  std::string reason;
  int num_arrived = 0;
  std::array<bool, kMaxRanks> arrived{};
  Addresses showing{};
  // Of the last two meetings: a rank may still read one while others are at the next.
  std::array<Addresses, 2> shown{};

  void abort(std::string_view why) {
    if (!aborted.load(std::memory_order_relaxed)) reason = why;
    aborted.store(true, std::memory_order_release);
    changed.notify_all();
  }
};

CpuCommunicator::Addresses CpuCommunicator::exchange(const void* mine, std::string_view phase) {
  Shared& shared = *shared_;
  std::unique_lock lock(shared.mutex);
  const uint64_t meeting = shared.meetings.load(std::memory_order_relaxed);
  const auto is_over = [&] {
    return shared.meetings.load(std::memory_order_acquire) != meeting ||
           shared.aborted.load(std::memory_order_acquire);
  };
  if (!shared.aborted.load(std::memory_order_relaxed)) {
    shared.showing[rank()] = mine;
    shared.arrived[rank()] = true;
    if (++shared.num_arrived == size()) {
      shared.num_arrived = 0;
      shared.arrived.fill(false);
      shared.shown[meeting % 2] = shared.showing;
      shared.meetings.store(meeting + 1, std::memory_order_release);
      shared.changed.notify_all();
    } else {
      lock.unlock();
      for (int i = 0; i < kSpins && !is_over(); ++i) {
      }
      lock.lock();
      if (!shared.changed.wait_for(lock, shared.timeout, is_over)) {
        std::string missing;
        for (int other = 0; other < size(); ++other) {
          if (!shared.arrived[other]) missing += concat(missing.empty() ? "" : ", ", other);
        }
        shared.abort(concat("rank ", missing, " did not come to ", phase, " within ",
                            shared.timeout.count(), " ms"));
      }
    }
  }
  // A meeting that all came to counts, also if the group has ended since.
  if (shared.meetings.load(std::memory_order_relaxed) == meeting) {
    fail(ErrorKind::kDevice, "ranks", shared.reason);
  }
  return shared.shown[meeting % 2];
}

void CpuCommunicator::abort(std::string_view reason) noexcept {
  std::lock_guard lock(shared_->mutex);
  shared_->abort(reason);
}

bool CpuCommunicator::is_aborted() const noexcept {
  return shared_->aborted.load(std::memory_order_acquire);
}

std::string CpuCommunicator::abort_reason() const {
  std::lock_guard lock(shared_->mutex);
  return shared_->reason;
}

std::vector<std::unique_ptr<Communicator>> make_cpu_group(int size, const GroupOptions& options) {
  check(size >= 1 && size <= kMaxRanks, "ranks", "a group has 1 to ", kMaxRanks, " ranks, not ",
        size);
  const auto shared = std::make_shared<CpuCommunicator::Shared>();
  shared->timeout = options.timeout;
  std::vector<std::unique_ptr<Communicator>> group;
  for (int rank = 0; rank < size; ++rank) {
    group.push_back(std::make_unique<CpuCommunicator>(rank, size, shared));
  }
  return group;
}

}  // namespace mrv1
