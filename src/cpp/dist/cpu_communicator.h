// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "dist/communicator.h"

namespace mrv1 {

// What a rank waits for another one to do, as errors say it: rank 1 did not <deed> step 7.
struct RankDeed {
  int global_rank = 0;
  std::string_view deed;  // outlives the group
  uint64_t step = 0;
};

// A rank of a group whose stream threads share the host's memory: ranks show each other where their
// data lies, and take turns by barriers and by words that one writes and another waits for.
class CpuCommunicator final : public Communicator {
 public:
  // What the ranks of a group have in common.
  struct Shared;

  CpuCommunicator(int rank, int size, int stage, int num_stages, std::shared_ptr<Shared> shared)
      : Communicator(rank, size, stage, num_stages), shared_(std::move(shared)) {}

  using Addresses = std::array<const void*, kMaxRanks>;  // by rank

  // Waits for all ranks of the stage to get here and returns what each has shown. `phase` names the
  // collective in errors and outlives the group. kDevice if the group has ended, or ends as a rank
  // does not arrive in time. From the rank's stream thread.
  Addresses exchange(const void* mine, std::string_view phase);
  // The same without anything to show: what ranks wrote before it, all may read after it.
  void barrier(std::string_view phase) { exchange(nullptr, phase); }

  // Waits for ready(), which reads words that another rank posts, with acquire; returns the
  // nanoseconds that it took. kDevice if the group has ended, or ends as nobody shows signs of life
  // any more. From the rank's stream thread.
  template <typename Ready>
  uint64_t wait_for(const RankDeed& deed, const Ready& ready) {
    return wait_for(deed, &ready,
                    [](const void* state) { return (*static_cast<const Ready*>(state))(); });
  }
  // Runs store(), which writes words that others wait for, with release, and wakes them.
  template <typename Store>
  void post(const Store& store) {
    post(&store, [](const void* state) { (*static_cast<const Store*>(state))(); });
  }

  void abort(std::string_view reason) noexcept override;
  bool is_aborted() const noexcept override;
  std::string abort_reason() const override;

  StagePort* stage_port() override;
  StageCounters* stage_counters() override;
  void show_life() noexcept override;
  uint64_t signs_of_life() const noexcept override;

 private:
  uint64_t wait_for(const RankDeed& deed, const void* state, bool (*ready)(const void* state));
  void post(const void* state, void (*store)(const void* state));
  template <typename Ready>
  bool sleep_until(std::unique_lock<std::mutex>& lock, const Ready& is_over);
  // Who keeps this rank waiting, or whoever keeps that one, and what it did not do.
  std::string blame() const;

  std::shared_ptr<Shared> shared_;
};

}  // namespace mrv1
