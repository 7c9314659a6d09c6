// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "runner/model_runner.h"

namespace mrv1 {

// The ranks beside the one that leads: a runner each, and a thread that carries out, in order, what
// the leader's runner was asked to do and did. As the host side of a runner follows from its calls
// alone, all ranks have the same rows and launch the same steps. What only results tell, the leader
// passes on. A call that fails here though it succeeded there ends the group.
//
// Called by the thread that calls the leader's runner, but for has_retired().
class RankFollowers {
 public:
  // Runners of all ranks but `leader`, in their order.
  RankFollowers(std::vector<std::unique_ptr<ModelRunner>> runners, int leader);
  // Carries out what was posted, ends the threads and the runners.
  ~RankFollowers();

  int count() const { return static_cast<int>(followers_.size()); }
  ModelRunner& runner(int rank) { return *followers_[rank < leader_ ? rank : rank - 1]->runner; }

  void add_row(const RowSpec& spec, RowHandle made);
  void append_blocks(RowHandle row, int32_t group, std::span<const int32_t> block_ids);
  void drop_blocks(RowHandle row, int32_t group, int32_t first, int32_t count);
  void free_row(RowHandle row);
  void copy_blocks(std::span<const BlockCopy> copies);
  // `injected`: the failure that the step has on all ranks, if any. `in_halves`: as the leader.
  void execute(std::span<const BatchItem> batch, const std::string& injected, bool in_halves);
  // `rows` and their masks, `words` each, of the step that is cut.
  void finish_step(std::span<const int32_t> rows, const uint32_t* masks, int64_t words);
  // What a result has said of rows that speculate, see ModelRunner::retire_rows().
  void retire_rows(std::span<const RowTable::Mark> marks, std::span<const int32_t> num_computed);
  void capture_graphs();
  void fill_kv_random(uint64_t seed);

  // Waits until everything that was posted is done; kDevice if the group ends before that.
  void join();
  // Whether all of them have ended a step. Any thread.
  bool has_retired(uint64_t step) const;
  // Whether everything that was posted is done, and launched work has ended, by then.
  bool settles(std::chrono::steady_clock::time_point until);

 private:
  enum class Kind {
    kAddRow,
    kAppendBlocks,
    kDropBlocks,
    kFreeRow,
    kCopyBlocks,
    kExecute,
    kFinishStep,
    kRetireRows,
    kCapture,
    kFillKv,
    kStop,
  };
  // Memory is used again by the next in its place.
  struct Command {
    Kind kind = Kind::kStop;
    RowHandle row;
    int32_t group = 0, first = 0, count = 0;
    uint64_t seed = 0;
    int64_t words = 0;
    const std::vector<uint32_t>* masks = nullptr;  // of mask_sets_
    std::vector<int32_t> ids;
    std::vector<BatchItem> batch;
    std::vector<BlockCopy> copies;
    std::vector<RowTable::Mark> marks;
    std::string injected;
    bool in_halves = false;
    std::shared_ptr<const RowSpec> spec;
  };
  // Masks take much more memory than all else, so not every command has room for some.
  struct MaskSet {
    std::vector<uint32_t> masks;
    uint64_t until = 0;  // as many commands are done, nobody reads it any more
  };
  struct Follower {
    std::unique_ptr<ModelRunner> runner;
    std::atomic<uint64_t> done{0};  // commands that it has carried out
    std::thread thread;
  };
  static constexpr uint64_t kCommands = 256;

  // Fills in the next command, once no follower reads what is in its place; drops it if the group
  // ends before that.
  template <typename Fill>
  void post(Kind kind, const Fill& fill);
  // False if the group ends before so many commands are done.
  bool await_done(uint64_t count) const;
  void run(Follower& follower);
  void carry_out(Follower& follower, const Command& command);
  bool all_done(uint64_t posted) const;
  // Waits for fn(), unless the group ends and what it waits for does not follow soon.
  template <typename Fn>
  void wait_for(const Fn& fn) const;

  const int leader_;
  std::vector<std::unique_ptr<Follower>> followers_;
  std::vector<Command> commands_{kCommands};  // a ring
  std::array<MaskSet, 4> mask_sets_;          // a ring
  uint64_t num_masked_ = 0;                   // steps that had masks
  bool any_draws_ = false;                    // a follower, as it has logits
  std::atomic<uint64_t> posted_{0};
};

// The runner of rank 0 of the last stage, which leads the others. A device, program and
// configuration for each rank, in the order of make_group(); programs differ in their layers from
// stage to stage, and in their weights' slices within one. One device makes a runner without ranks.
// Of ranks with requests of their own it is the first one's runner, which has the others
// (ModelRunner::rank_runner); all live as long as one of them is referred to.
//
// A device that does not end its work when the last reference is gone is left alone, with its
// memory: nobody waits for it.
std::shared_ptr<ModelRunner> make_runner(const std::vector<std::shared_ptr<Device>>& devices,
                                         std::vector<Program> programs,
                                         const std::vector<RunnerConfig>& configs);

// WeightStore::load of every rank, at the same time: each reads what it needs of its tensors.
// `progress` is called in the calling thread with the bytes that all have done.
void load_ranks(ModelRunner& leader, const MappedFile& file,
                std::span<const std::vector<TensorSource>> tensors,
                const std::function<void(size_t)>& progress);

}  // namespace mrv1
