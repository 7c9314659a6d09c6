// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <memory>
#include <string_view>

#include "dist/communicator.h"

namespace mrv1 {

// A rank of a group whose stream threads share the host's memory: ranks show each other where their
// data lies, and take turns by barriers.
class CpuCommunicator final : public Communicator {
 public:
  // What the ranks of a group have in common.
  struct Shared;

  CpuCommunicator(int rank, int size, std::shared_ptr<Shared> shared)
      : Communicator(rank, size), shared_(std::move(shared)) {}

  using Addresses = std::array<const void*, kMaxRanks>;  // by rank

  // Waits for all ranks to get here and returns what each has shown. `phase` names the collective
  // in errors. kDevice if the group has ended, or ends as a rank does not arrive in time. From the
  // rank's stream thread.
  Addresses exchange(const void* mine, std::string_view phase);
  // The same without anything to show: what ranks wrote before it, all may read after it.
  void barrier(std::string_view phase) { exchange(nullptr, phase); }

  void abort(std::string_view reason) noexcept override;
  bool is_aborted() const noexcept override;
  std::string abort_reason() const override;

 private:
  std::shared_ptr<Shared> shared_;
};

}  // namespace mrv1
