// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/device.h"
#include "dist/group_limits.h"

namespace mrv1 {

// Which kernels carry the collectives of GPUs: packets that say themselves that they have come, or
// plain values in two trips, both of our own and with the same bits; kAuto chooses by size. NCCL's
// are for GPUs that do not reach each other's memory, and to be compared with: between two GPUs
// they were slower at every size, they sum more ranks in an order of their own, and add no bias.
enum class CollectiveKernels { kAuto, kOneShot, kTwoShot, kNccl };

// "auto", "one_shot", "two_shot" or "nccl"; kInvalidArgument for any other name.
CollectiveKernels collective_kernels_from_name(std::string_view name);
std::string_view collective_kernels_name(CollectiveKernels kernels);

struct GroupOptions {
  // Stages of a pipeline, each of as many ranks; all of them end together.
  int num_stages = 1;
  // Bytes that a rank gives to the largest collective, rows of the largest step included.
  int64_t max_bytes = 0;
  // How long a rank waits for the others in a collective before it ends the group.
  std::chrono::milliseconds timeout{8000};
  // Of GPUs only. With kAuto NCCL's carry everything where GPUs of a stage do not reach each other.
  CollectiveKernels kernels = CollectiveKernels::kAuto;
  // Thread blocks, and so processors at most, that moe_dispatch and moe_combine take, at most 64:
  // enough to keep the links busy, few enough that other kernels can run beside them.
  int32_t expert_blocks = 32;
  std::vector<std::string> nccl;  // names to open NCCL by, in order, if it is needed
  // Experts that the tokens of a rank may have in all its sets of buffers, for group_bytes().
  int64_t choices = 0;
};

class Communicator;
// How errors name a rank of a group: with its stage where there are several, of `size` ranks each.
std::string rank_name(int global_rank, int size, int num_stages);

struct StageBuffers;   // dist/stage_link.h
struct StageCounters;  // dist/stage_link.h
struct StageLink;      // dist/stage_link.h
struct StagePort;      // dist/stage_link.h
struct ExpertBuffers;  // dist/expert_link.h
struct ExpertLink;     // dist/expert_link.h

void link_stages(std::span<Communicator* const> ranks, std::span<const StageBuffers> buffers);

// One rank's end of a group of devices that compute one model together: some of its layers each, as
// stages of a pipeline, or a part of every layer of a stage, or both. What passes between them are
// ops (ops/all_reduce.h, ops/all_gather.h, ops/stage_send.h, ops/stage_receive.h, state/adopt.h),
// which find the communicator in their context and downcast it to their backend's class.
// Collectives are those of a stage; its ranks launch the same ones in the same order.
//
// A group ends for good when a rank fails or does not arrive in time: everything that waits for
// others, on a host or a device, comes back, and all later ops fail with the same reason.
class Communicator {
 public:
  virtual ~Communicator();

  // Within the stage.
  int rank() const { return rank_; }
  int size() const { return size_; }
  int stage() const { return stage_; }
  int num_stages() const { return num_stages_; }
  // Among all, as errors name it.
  int global_rank() const { return stage_ * size_ + rank_; }
  bool is_last_stage() const { return stage_ + 1 == num_stages_; }
  std::string name_of(int global_rank) const { return rank_name(global_rank, size_, num_stages_); }
  std::string name() const { return name_of(global_rank()); }

  // Ends the group; the first reason stays. Any thread of any rank.
  virtual void abort(std::string_view reason) noexcept = 0;
  // Whether the group has ended: cheap, and true too where a device gave up waiting. Any thread.
  virtual bool is_aborted() const noexcept = 0;
  // Why it has ended, naming rank and collective; empty while it has not. Any thread.
  virtual std::string abort_reason() const = 0;

  // What the log should say of how the ranks reach each other; mostly nothing.
  virtual std::string note() const { return {}; }
  // Whether sums may have a bias, another dtype and the order of sum_in_order(): not with NCCL.
  virtual bool sums_anything() const { return true; }

  // Throws kDevice with the reason if the group has ended.
  void check_alive() const;

  // A set of buffers for experts; null until link_experts() has linked it. Stays where it is.
  const ExpertLink* expert_link(int set) const { return expert_links_[set].get(); }

  // Null until link_stages(), and without a pipeline. Stays where it is.
  const StageLink* stage_link() const { return link_.get(); }
  // Of this rank, in its device's memory, where the other ranks can write to the port; zeros before
  // the first step.
  virtual StagePort* stage_port() = 0;
  virtual StageCounters* stage_counters() = 0;

  // Ranks of the CPU are as slow as their host; one that does something does not hang. So a rank
  // says that it has begun something, and a wait has no limit while anybody of the group does.
  // Without an effect on GPUs, whose steps are such signs to other stages. Any thread.
  virtual void show_life() noexcept {}
  virtual uint64_t signs_of_life() const noexcept { return 0; }

 protected:
  Communicator(int rank, int size, int stage = 0, int num_stages = 1);

  // `links` are those of all ranks of the stage, by rank. Where a rank cannot write to the buffers
  // of others, puts memory of its own in their place, to be sent from. By link_experts(), from one
  // rank for all.
  virtual void stage_experts(std::span<ExpertLink> /*links*/) {}

 private:
  friend void link_stages(std::span<Communicator* const> ranks,
                          std::span<const StageBuffers> buffers);
  friend void link_experts(std::span<Communicator* const> ranks,
                           std::span<const ExpertBuffers> buffers, int set);

  int rank_, size_, stage_, num_stages_;
  std::unique_ptr<StageLink> link_;
  std::array<std::unique_ptr<ExpertLink>, kMaxExpertSets> expert_links_;
};

// A communicator for each device, in their order: the ranks of the first stage, then those of the
// next. The devices are of one type; GPUs are distinct, reach each other's memory, and outlive the
// group. GPUs of a stage that do not reach each other need NCCL. kInvalidArgument naming what does
// not fit; kDevice naming GPUs that cannot reach each other, and what NCCL was looked for by.
std::vector<std::unique_ptr<Communicator>> make_group(
    std::span<const std::shared_ptr<Device>> devices, const GroupOptions& options);

// Device memory of one rank of such a group of `size` ranks in all.
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
