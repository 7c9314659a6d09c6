// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/device.h"

namespace mrv1 {

// Ranks of a group at most, as kernels keep a value of each in registers.
constexpr int kMaxRanks = 8;

// Which kernels carry the collectives of GPUs: packets that say themselves that they have come, or
// plain values in two trips, both of our own and with the same bits; kAuto chooses by size. NCCL's
// are there to be compared with: between two GPUs they were slower at every size, they sum more
// ranks in an order of their own, and add no bias.
enum class CollectiveKernels { kAuto, kOneShot, kTwoShot, kNccl };

struct GroupOptions {
  // Bytes that a rank gives to the largest collective, rows of the largest step included.
  int64_t max_bytes = 0;
  // How long a rank waits for the others in a collective before it ends the group.
  std::chrono::milliseconds timeout{8000};
  // Of GPUs only.
  CollectiveKernels kernels = CollectiveKernels::kAuto;
  std::vector<std::string> nccl;  // names to open NCCL by, in order, for kNccl
};

// One rank's end of a group of devices that compute one model together. The collectives themselves
// are ops (ops/all_reduce.h, ops/all_gather.h), which find the communicator in their context and
// downcast it to their backend's class. All ranks launch the same collectives in the same order.
//
// A group ends for good when a rank fails or does not arrive in time: every collective that waits,
// on a host or a device, comes back, and all later ones fail with the same reason.
class Communicator {
 public:
  virtual ~Communicator() = default;

  int rank() const { return rank_; }
  int size() const { return size_; }

  // Ends the group; the first reason stays. Any thread of any rank.
  virtual void abort(std::string_view reason) noexcept = 0;
  // Whether the group has ended: cheap, and true too where a device gave up waiting. Any thread.
  virtual bool is_aborted() const noexcept = 0;
  // Why it has ended, naming rank and collective; empty while it has not. Any thread.
  virtual std::string abort_reason() const = 0;

  // Throws kDevice with the reason if the group has ended.
  void check_alive() const;

 protected:
  Communicator(int rank, int size) : rank_(rank), size_(size) {}

 private:
  int rank_, size_;
};

// A communicator for each device, ranks in their order. The devices are of one type; GPUs are
// distinct, reach each other's memory, and outlive the group. kInvalidArgument naming what does not
// fit.
std::vector<std::unique_ptr<Communicator>> make_group(
    std::span<const std::shared_ptr<Device>> devices, const GroupOptions& options);

// Device memory of one rank of such a group.
int64_t group_bytes(DeviceType type, int size, const GroupOptions& options);

// Ranks that share the host's memory (dist/cpu_communicator.h).
std::vector<std::unique_ptr<Communicator>> make_cpu_group(int size, const GroupOptions& options);

// Implemented by src/cuda, or by src/cpp/no_cuda in a build without CUDA.
namespace cuda {
std::vector<std::unique_ptr<Communicator>> make_group(
    std::span<const std::shared_ptr<Device>> devices, const GroupOptions& options);
int64_t group_bytes(int size, const GroupOptions& options);
}  // namespace cuda

}  // namespace mrv1
