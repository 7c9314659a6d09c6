// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "dist/cpu_communicator.h"

#include <atomic>
#include <condition_variable>
#include <new>

#include "core/clock.h"
#include "core/error.h"
#include "dist/stage_link.h"

namespace mrv1 {
namespace {

// Looks at the others before a rank goes to sleep: ranks that have a core each meet within these.
constexpr int kSpins = 2000;

// The collectives of a stage.
struct Meetings {
  std::atomic<uint64_t> held{0};  // that all ranks came to

  // Below the group's mutex.
  int num_arrived = 0;
  std::array<bool, kMaxRanks> arrived{};
  CpuCommunicator::Addresses showing{};
  // Of the last two meetings: a rank may still read one while others are at the next.
  std::array<CpuCommunicator::Addresses, 2> shown{};
};

struct alignas(128) Life {
  std::atomic<uint64_t> signs{0};
};

}  // namespace

// By stage, or by global rank.
struct CpuCommunicator::Shared {
  std::chrono::milliseconds timeout{};
  std::atomic<bool> aborted{false};
  std::array<Life, kMaxRanks> life;
  std::array<StagePort, kMaxRanks> ports{};
  std::array<StageCounters, kMaxRanks> counters{};
  std::array<Meetings, kMaxRanks> meetings;

  std::mutex mutex;  // of all below
  std::condition_variable changed;
  std::string reason;
  // What the ranks that sleep wait for: a collective, if it is of no step; nothing, if it is no
  // deed.
  std::array<RankDeed, kMaxRanks> deeds;

  void abort(std::string_view why) noexcept {
    if (!aborted.load(std::memory_order_relaxed)) {
      try {
        reason = why;
      } catch (const std::bad_alloc&) {
        reason.clear();  // the end matters more
      }
    }
    aborted.store(true, std::memory_order_release);
    changed.notify_all();
  }
};

// --- waits -------------------------------------------------------------------------------------

// False if the group showed no sign of life for too long. Ranks that wait show none, so a rank that
// hangs soon brings all of them to rest.
template <typename Ready>
bool CpuCommunicator::sleep_until(std::unique_lock<std::mutex>& lock, const Ready& is_over) {
  for (uint64_t signs = signs_of_life();;) {
    if (shared_->changed.wait_for(lock, shared_->timeout, is_over)) return true;
    const uint64_t now = signs_of_life();
    if (now == signs) return false;
    signs = now;
  }
}

std::string CpuCommunicator::blame() const {
  const Shared& shared = *shared_;
  int waiter = global_rank();
  // One who waits for itself, by way of others, ends the search, too.
  for (int i = 0; i < size() * num_stages(); ++i) {
    const RankDeed& next = shared.deeds[shared.deeds[waiter].global_rank];
    if (next.deed.empty()) break;
    waiter = shared.deeds[waiter].global_rank;
  }
  const RankDeed& missed = shared.deeds[waiter];
  const auto limit = concat(" within ", shared.timeout.count(), " ms");
  if (missed.step != 0) {
    return concat(name_of(missed.global_rank), " did not ", missed.deed, " step ", missed.step,
                  limit, ": ", name_of(waiter), " waited for it");
  }
  const int first = waiter - waiter % size();
  std::string missing;
  for (int other = 0; other < size(); ++other) {
    if (shared.meetings[first / size()].arrived[other]) continue;
    missing += concat(missing.empty() ? "" : ", ", name_of(first + other));
  }
  return concat(missing, " did not come to ", missed.deed, limit);
}

CpuCommunicator::Addresses CpuCommunicator::exchange(const void* mine, std::string_view phase) {
  Shared& shared = *shared_;
  Meetings& meetings = shared.meetings[stage()];
  show_life();
  std::unique_lock lock(shared.mutex);
  const uint64_t meeting = meetings.held.load(std::memory_order_relaxed);
  const auto is_over = [&] {
    return meetings.held.load(std::memory_order_acquire) != meeting ||
           shared.aborted.load(std::memory_order_acquire);
  };
  if (!shared.aborted.load(std::memory_order_relaxed)) {
    meetings.showing[rank()] = mine;
    meetings.arrived[rank()] = true;
    if (++meetings.num_arrived == size()) {
      meetings.num_arrived = 0;
      meetings.arrived.fill(false);
      meetings.shown[meeting % 2] = meetings.showing;
      meetings.held.store(meeting + 1, std::memory_order_release);
      shared.changed.notify_all();
    } else {
      lock.unlock();
      for (int i = 0; i < kSpins && !is_over(); ++i) {
      }
      lock.lock();
      const auto missing = [&] {
        int other = 0;
        while (meetings.arrived[other]) ++other;
        return stage() * size() + other;
      };
      RankDeed& waits = shared.deeds[global_rank()];
      while (!is_over()) {
        waits = {missing(), phase, 0};
        // Until somebody comes, who may not be the last.
        const auto is_new = [&] { return is_over() || missing() != waits.global_rank; };
        if (!sleep_until(lock, is_new)) shared.abort(blame());
      }
      waits = {};
    }
  }
  // A meeting that all came to counts, also if the group has ended since.
  if (meetings.held.load(std::memory_order_relaxed) == meeting) {
    fail(ErrorKind::kDevice, "ranks", shared.reason);
  }
  return meetings.shown[meeting % 2];
}

uint64_t CpuCommunicator::wait_for(const RankDeed& deed, const void* state,
                                   bool (*ready)(const void* state)) {
  Shared& shared = *shared_;
  show_life();
  check_alive();
  if (ready(state)) return 0;
  const uint64_t start = clock_ns();
  const auto is_over = [&] {
    return shared.aborted.load(std::memory_order_acquire) || ready(state);
  };
  for (int i = 0; i < kSpins && !is_over(); ++i) {
  }
  if (!is_over()) {
    std::unique_lock lock(shared.mutex);
    shared.deeds[global_rank()] = deed;
    if (!sleep_until(lock, is_over)) shared.abort(blame());
    shared.deeds[global_rank()] = {};
  }
  check_alive();
  return clock_ns() - start;
}

// Below the mutex, so that nobody falls asleep between a look at the words and the call.
void CpuCommunicator::post(const void* state, void (*store)(const void* state)) {
  show_life();
  {
    std::lock_guard lock(shared_->mutex);
    store(state);
  }
  shared_->changed.notify_all();
}

// --- the group ---------------------------------------------------------------------------------

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

StagePort* CpuCommunicator::stage_port() { return &shared_->ports[global_rank()]; }

StageCounters* CpuCommunicator::stage_counters() { return &shared_->counters[global_rank()]; }

void CpuCommunicator::show_life() noexcept {
  shared_->life[global_rank()].signs.fetch_add(1, std::memory_order_relaxed);
}

uint64_t CpuCommunicator::signs_of_life() const noexcept {
  uint64_t signs = 0;
  for (const Life& life : shared_->life) signs += life.signs.load(std::memory_order_relaxed);
  return signs;
}

std::vector<std::unique_ptr<Communicator>> make_cpu_group(int size, const GroupOptions& options) {
  const auto shared = std::make_shared<CpuCommunicator::Shared>();
  shared->timeout = options.timeout;
  const int stage_size = size / options.num_stages;
  std::vector<std::unique_ptr<Communicator>> group;
  for (int rank = 0; rank < size; ++rank) {
    group.push_back(std::make_unique<CpuCommunicator>(
        rank % stage_size, stage_size, rank / stage_size, options.num_stages, shared));
  }
  return group;
}

}  // namespace mrv1
