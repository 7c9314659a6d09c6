// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "core/device.h"
#include "dist/communicator.h"
#include "nccl.h"
#include "peer_memory.h"
#include "state/step_context.h"

namespace mrv1::cuda {

// What the ranks of a group of GPUs share: their areas of memory, NCCL if it is used, and the end.
class PeerGroup {
 public:
  PeerGroup(std::span<const std::shared_ptr<Device>> devices, const GroupOptions& options);
  ~PeerGroup();
  PeerGroup(const PeerGroup&) = delete;
  PeerGroup& operator=(const PeerGroup&) = delete;

  int size() const { return static_cast<int>(devices_.size()); }
  const PeerView& view(int rank) const { return views_[rank]; }
  // Null if it is not used.
  NcclGroup* nccl() { return nccl_.get(); }
  bool reach_each_other() const { return reach_each_other_; }
  CollectiveKernels kernels() const { return kernels_; }

  void abort(std::string_view reason) noexcept;
  bool is_aborted() const noexcept;
  std::string abort_reason() const;

 private:
  PeerReport* report(int rank) const { return static_cast<PeerReport*>(reports_[rank].host()); }
  void enable_peers();
  void allocate_areas(const GroupOptions& options);
  void open_nccl_group(const std::vector<std::string>& libraries);
  // Lets all ranks meet once: an address that cannot be reached after all shows here.
  void try_out();
  void watch();

  std::vector<std::shared_ptr<Device>> devices_;  // outlive the buffers
  CollectiveKernels kernels_;
  bool reach_each_other_ = true;
  std::vector<Buffer> states_, areas_, reports_;
  std::vector<PeerView> views_;
  std::unique_ptr<NcclGroup> nccl_;

  mutable std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  std::string reason_;
  bool closing_ = false;
  std::atomic<bool> aborted_{false};
  std::thread watcher_;
};

// A rank of a group of GPUs.
class CudaCommunicator final : public Communicator {
 public:
  CudaCommunicator(int rank, std::shared_ptr<PeerGroup> group);

  const PeerView& view() const { return group_->view(rank()); }

  // Which kernels carry a sum of `bytes`, and columns of `rows` rows of `bytes` in all. Where NCCL
  // is to carry everything, sums that it cannot are refused.
  CollectiveKernels choose_sum(int64_t bytes, bool nccl_can) const;
  CollectiveKernels choose_gather(int64_t bytes, int64_t rows) const;

  // Collectives of NCCL, each after a meeting of all ranks with a time limit, as NCCL has none.
  void sum_by_nccl(const void* x, void* out, int64_t count, DType dtype, const StepContext& ctx);
  void gather_by_nccl(const void* x, void* out, int64_t rows, int64_t cols, DType dtype,
                      const StepContext& ctx);

  void abort(std::string_view reason) noexcept override { group_->abort(reason); }
  bool is_aborted() const noexcept override { return group_->is_aborted(); }
  std::string abort_reason() const override { return group_->abort_reason(); }

 private:
  std::shared_ptr<PeerGroup> group_;
};

// Each loads kernels that a group of `size` ranks may launch, on the current GPU: a kernel that is
// loaded at its first launch may wait for others that wait for it.
void load_all_reduce(int size);
void load_all_gather();
void load_meeting();

// Waits, in the rank's stream, until all ranks are there.
void launch_meeting(const PeerView& peers, const StepContext& ctx);

}  // namespace mrv1::cuda
