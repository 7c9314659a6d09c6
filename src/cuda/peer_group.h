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
#include "dist/expert_link.h"
#include "nccl.h"
#include "peer_memory.h"
#include "state/step_context.h"

namespace mrv1::cuda {

// What the ranks of a group of GPUs share: their memory, NCCL if it is used, and the end. Ranks are
// numbered among all stages.
class PeerGroup {
 public:
  PeerGroup(std::span<const std::shared_ptr<Device>> devices, const GroupOptions& options);
  ~PeerGroup();
  PeerGroup(const PeerGroup&) = delete;
  PeerGroup& operator=(const PeerGroup&) = delete;

  int num_ranks() const { return static_cast<int>(devices_.size()); }
  int num_stages() const { return num_stages_; }
  // Ranks of a stage.
  int size() const { return num_ranks() / num_stages_; }
  const PeerView& view(int rank) const { return views_[rank]; }
  // Null without a pipeline.
  StagePort* stage_port(int rank) const;
  StageCounters* stage_counters(int rank) const;
  // Of a stage; null if it is not used.
  NcclGroup* nccl(int stage) { return nccl_.empty() ? nullptr : nccl_[stage].get(); }
  bool reach_each_other() const { return reach_each_other_; }
  CollectiveKernels kernels() const { return kernels_; }
  // Communicator::note.
  std::string note() const;

  // Communicator::stage_experts, of a stage.
  void stage_experts(int stage, std::span<ExpertLink> links);

  void abort(std::string_view reason) noexcept;
  bool is_aborted() const noexcept;
  std::string abort_reason() const;

 private:
  PeerReport& report(int rank) const { return static_cast<PeerReport*>(reports_.host())[rank]; }
  PeerEnd end_of(int rank) const noexcept;
  std::string name_of(int rank) const { return rank_name(rank, size(), num_stages_); }
  // Whether a rank writes to the GPU of another one.
  bool writes_to(int rank, int peer) const;
  bool can_reach(int rank, int peer) const;
  std::string unreached_text(int rank, int peer) const;
  // Sets unreached_ if ranks of a stage do not reach each other.
  void find_unreached();
  void enable_peers();
  void allocate_areas(const GroupOptions& options);
  void open_nccl_groups(const std::vector<std::string>& libraries);
  // Lets ranks write to each other once: an address that cannot be reached after all shows here.
  void try_out();
  void watch();

  std::vector<std::shared_ptr<Device>> devices_;  // outlive the buffers
  int num_stages_;
  CollectiveKernels kernels_;
  bool reach_each_other_;  // within a stage
  std::string unreached_;  // why NCCL carries what ranks exchange, if nobody asked for it
  std::vector<Buffer> states_, areas_, stages_;
  std::vector<Buffer> staged_;  // of each set of buffers for experts, by rank
  Buffer reports_;
  std::vector<PeerView> views_;
  std::vector<std::unique_ptr<NcclGroup>> nccl_;  // by stage

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
  CudaCommunicator(int global_rank, std::shared_ptr<PeerGroup> group);

  const PeerView& view() const { return group_->view(global_rank()); }
  // Whether it has areas in which others can write; not so where NCCL is to carry everything.
  bool reaches_peers() const { return group_->reach_each_other(); }

  // Which kernels carry a sum of `bytes`, and columns of `rows` rows of `bytes` in all. Where NCCL
  // is to carry everything, sums that it cannot are refused.
  CollectiveKernels choose_sum(int64_t bytes, bool nccl_can) const;
  CollectiveKernels choose_gather(int64_t bytes, int64_t rows) const;

  // Collectives of NCCL, each after a meeting of all ranks with a time limit, as NCCL has none.
  // Ranks queue them in one order, as a step of each has it: those of halves share a stream.
  void sum_by_nccl(const void* x, void* out, int64_t count, DType dtype, const StepContext& ctx);
  void gather_by_nccl(const void* x, void* out, int64_t rows, int64_t cols, DType dtype,
                      const StepContext& ctx);
  // What moe_dispatch and moe_combine exchange: whole regions, as only devices know how many rows
  // have come. Tokens from where they are staged; `partial`, [ranks, region_rows, hidden], into
  // the sums of others.
  void dispatch_by_nccl(const ExpertLink& link, const StepContext& ctx);
  void combine_by_nccl(const void* partial, const ExpertBuffers& own, const StepContext& ctx);

  void abort(std::string_view reason) noexcept override { group_->abort(reason); }
  bool is_aborted() const noexcept override { return group_->is_aborted(); }
  std::string abort_reason() const override { return group_->abort_reason(); }
  std::string note() const override { return group_->note(); }
  bool sums_anything() const override { return reaches_peers() || size() == 1; }

  StagePort* stage_port() override { return group_->stage_port(global_rank()); }
  StageCounters* stage_counters() override { return group_->stage_counters(global_rank()); }

 protected:
  void stage_experts(std::span<ExpertLink> links) override {
    group_->stage_experts(stage(), links);
  }

 private:
  void exchange(std::span<const NcclMessage> messages, const StepContext& ctx);

  std::shared_ptr<PeerGroup> group_;
};

// Each loads kernels that a group of `size` ranks may launch, on the current GPU: a kernel that is
// loaded at its first launch may wait for others that wait for it.
void load_all_reduce(int size);
void load_all_gather();
void load_moe_dispatch();
void load_moe_combine(int size);
void load_meeting();

// Waits, in the rank's stream, until all ranks of the stage are there.
void launch_meeting(const PeerView& peers, const StepContext& ctx);
// The same for all ranks that it can reach, before anything else.
void launch_trial(const PeerWatch& watch, const PeerStates& peers, const StepContext& ctx);

}  // namespace mrv1::cuda
