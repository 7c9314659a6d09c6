// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/device.h"
#include "dist/communicator.h"
#include "dist/stage_link.h"
#include "io/weight_store.h"
#include "program/executable.h"
#include "program/program.h"
#include "runner/grammar_masks.h"
#include "runner/graph_ladder.h"
#include "runner/prompt_scores.h"
#include "runner/row_table.h"
#include "runner/runner_config.h"
#include "runner/step.h"
#include "runner/step_log.h"
#include "runner/token_logprobs.h"
#include "runner/two_batch.h"
#include "state/infer_param_view.h"
#include "state/output_ring.h"
#include "state/step_context.h"

namespace mrv1 {

class DataRanks;      // runner/data_ranks.h
class RankFollowers;  // runner/rank_followers.h

// What the ranks of a runner must be able to send each other.
GroupOptions group_options(const Program& program, const RunnerConfig& config);
// Refuses sums of the program that the group does not carry, before a step would have to; kDevice
// naming what they need.
void check_sums(const Communicator& group, const Program& program, const RunnerConfig& config);

// Bytes a runner allocates, known before it is made.
struct MemoryPlan {
  int64_t weights = 0;
  int64_t experts = 0;      // of the weights, those of experts
  int64_t activations = 0;  // arena, rope tables, workspace, what ranks send each other
  int64_t two_batch = 0;    // what steps that run as two halves need beside (runner/two_batch.h)
  int64_t state = 0;        // rows, history, block tables, infer_params, rings, scored prompts
  int64_t per_block = 0;    // one KV block, for the layers of a group, scales included
  int64_t total(int64_t num_blocks) const {
    return weights + activations + two_batch + state + per_block * num_blocks;
  }
};

// What a retired step says: one entry an item of the batch, in the caller's order.
struct StepOutput {
  uint64_t step = 0;
  std::string error;  // not empty if the step failed: what went wrong
  StepMode mode = StepMode::kEager;
  int32_t cut_token = 0;  // StepShape::cut_token
  // Device clock when the step began and ended, in nanoseconds; steps of one device compare.
  uint64_t begin_ns = 0, end_ns = 0;
  std::vector<OutputEntry> entries;
  std::vector<int32_t> token_ids;  // [entries, tokens_per_entry]
  int32_t tokens_per_entry = 1;
  // Of the entries, one after the other, whose rows have logprobs: for each new token a group of
  // 1 + num_logprobs, the token itself first.
  std::vector<TokenLogprob> logprobs;
  std::vector<int32_t> logprobs_end;        // [entries] into logprobs; empty if no row has any
  std::vector<PromptScores> prompt_scores;  // of entries that score their prompts

  // The new tokens of an entry.
  std::span<const int32_t> tokens(size_t entry) const {
    return std::span(token_ids).subspan(entry * tokens_per_entry, entries[entry].num_tokens);
  }
  std::span<const TokenLogprob> token_logprobs(size_t entry) const {
    if (logprobs_end.empty()) return {};
    const int32_t start = entry == 0 ? 0 : logprobs_end[entry - 1];
    return std::span(logprobs).subspan(start, logprobs_end[entry] - start);
  }
  // Null if the entry has none.
  const PromptScores* scores_of(size_t entry) const {
    for (const PromptScores& scores : prompt_scores) {
      if (static_cast<size_t>(scores.entry) == entry) return &scores;
    }
    return nullptr;
  }
};

struct RunnerStats {
  uint64_t steps = 0;          // records submitted, those without a batch included
  uint64_t batches = 0;        // steps that ran the program
  uint64_t host_ns = 0;        // host time inside execute(), waiting for a free slot excluded
  uint64_t control_bytes = 0;  // sent to the device
  uint64_t output_bytes = 0;   // received
  uint64_t mask_bytes = 0;     // host memory of GrammarMasks
  uint64_t steps_by_mode[kNumStepModes] = {};  // batches, by StepMode
  uint64_t steps_in_halves = 0;                // batches that ran as two halves
  DeviceCounters device;
};

// What capture_graphs() made.
struct CaptureReport {
  int32_t full_graphs = 0, piecewise_graphs = 0;
  int64_t bytes = 0;  // of device memory, as far as the device tells
};

// Owns rows, block tables, buffers and the step; knows nothing of requests waiting or of text. The
// host side keeps upper bounds only: what a row really computed is in the device's row state.
// One thread at a time may call it, but for stats(), take_miss() and fail_next_step(), which any
// thread may call at any time. Steps run in order on the device's stream; execute() returns as
// soon as the step is queued, so a caller can run ahead by up to num_slots() steps.
//
// Where several ranks compute the model (runner/rank_followers.h), the runner that is called is
// that of rank 0 of the last stage, which leads: logits, hidden states and outputs are its own. The
// others have the same rows and launch the same steps. Those of earlier stages have no logits: they
// draw nothing, and take up what the last stage has drawn when a step needs it (state/adopt.h).
//
// Ranks with requests of their own (runner/data_ranks.h) are called by themselves, each in a thread
// or in turns. All of them must run as many batches: an empty one does nothing but go along.
class ModelRunner {
 public:
  // The program is copied. Memory is allocated here, before any request; kOutOfMemory says how
  // much which part needs. `communicator` is that of the runner's rank where there are several
  // (runner/rank_followers.h makes those).
  ModelRunner(std::shared_ptr<Device> device, Program program, const RunnerConfig& config,
              std::unique_ptr<Communicator> communicator = nullptr);
  ~ModelRunner();

  // From now on the other ranks do what this runner is asked to do.
  void lead(std::unique_ptr<RankFollowers> followers);
  // From now on the runner is one of these, each with requests of its own; they outlive it.
  void join_data_ranks(DataRanks& ranks) { data_ranks_ = &ranks; }
  // Null unless it is one of such ranks.
  DataRanks* data_ranks() const { return data_ranks_; }
  // Batches that were launched, those of capture_graphs() included; whether one of them has ended.
  // Any thread.
  uint64_t launched_batches() const { return launched_batches_.load(std::memory_order_acquire); }
  bool has_ended_batch(uint64_t batch) const;
  // Null where there is one rank.
  Communicator* communicator() const { return communicator_.get(); }
  // Throws kDevice if the ranks have ended: no step can succeed any more.
  void check_ranks() const {
    if (communicator_ != nullptr) communicator_->check_alive();
  }
  // The runner of a rank, counted over all stages; its own is this one.
  ModelRunner& rank_runner(int rank);
  // What ranks with requests of their own show each other, for link_experts(), of each set.
  std::vector<ExpertBuffers> expert_buffers() const;
  // What a stage of a pipeline shows the others, for link_stages().
  StageBuffers stage_buffers() const;

  static MemoryPlan plan_memory(const Program& program, const RunnerConfig& config, Device& device);
  static PlanLimits plan_limits(const RunnerConfig& config);

  WeightStore& weights() { return weights_; }
  const Program& program() const { return program_; }
  const RunnerConfig& config() const { return config_; }
  // Steps whose records and outputs have a place.
  int32_t num_slots() const { return step_slots(config_); }
  Device& device() { return *device_; }
  const std::shared_ptr<Device>& shared_device() const { return device_; }

  // Throws kInvalidArgument naming the field if add_row would refuse the spec, even with a free row
  // and memory. Any thread may call it for a spec without blocks.
  void check_spec(const RowSpec& spec) { rows_->check_spec(spec); }
  // Admits a request into a free row. Errors (kRequest, kInvalidArgument; kOutOfMemory if the lists
  // find no room on the device) leave everything as it was.
  RowHandle add_row(const RowSpec& spec);
  // Calls that name a generation are refused once the row has been given to another request.
  // Block ids that the row already holds are refused; rows may share blocks.
  // A block serves one KV group (Program::kv_layout). With `distinct` the caller has seen to it
  // that the row does not hold the blocks yet; else that is checked, which takes time for all it
  // holds.
  void append_blocks(RowHandle row, int32_t group, std::span<const int32_t> block_ids,
                     bool distinct = false);
  // Makes blocks [first, first + count) of a group null, all of whose positions lie below the
  // window of every token that is still to be launched. They may be reused once every step up to
  // last_step(row) has retired.
  void drop_blocks(RowHandle row, int32_t group, int32_t first, int32_t count);
  // The row may be given to another request at once: steps in flight keep their generation. Its
  // blocks may be reused once every step up to last_step(row) has retired.
  void free_row(RowHandle row);
  // Makes blocks equal to others, in stream order after what was launched before: for a row that is
  // to write a block which it shares. No target may be named twice or be a source.
  void copy_blocks(std::span<const BlockCopy> copies);
  // Last step that was launched with the row in its batch; steps count from 1, 0 = none.
  uint64_t last_step(RowHandle row) const { return rows_->last_step(row); }

  // Records the graphs of all sizes, largest first. Until then, and with StepMode::kEager, steps
  // run eagerly. Runs every size once first, with an empty batch: call it when weights are loaded
  // and no step is in flight. All ranks do so, whichever is called.
  CaptureReport capture_graphs();
  // Of one of several ranks with requests of their own, while the others do the same.
  CaptureReport capture_own_graphs();
  // Why steps do not run in the mode that was asked for, each reason once.
  GraphLadder::Miss take_miss() {
    std::lock_guard lock(side_mutex_);
    return ladder_.take_miss();
  }

  // Launches a step; returns its number. Each row at most once; the rows of a step that failed are
  // in an unknown state and must be freed. Decode rows take 1 token and up to as many more as they
  // may have drafts, prefill and extend rows up to what is left of their prefill target. Without a
  // batch it carries out what has changed; one of several ranks with requests of their own also
  // runs the program.
  //
  // A step that draws for rows with a grammar is *cut*: what comes before the draw is launched at
  // once, so that it runs while the masks are made; finish_step() launches the rest. Until then
  // only results of earlier steps can be had, and whatever changes rows or launches work is
  // refused.
  //
  // `in_halves`: whether the step runs as two halves, where that was decided for all ranks together
  // (runs_in_halves()). Else this runner decides; one of several ranks with requests of their own
  // cannot, and takes it whole.
  uint64_t execute(std::span<const BatchItem> batch, std::optional<bool> in_halves = {});
  // Throws what execute() would throw for the batch before anything is launched; what it brings.
  StepLoad check_batch(std::span<const BatchItem> batch);
  // The step that waits for finish_step(); 0 if there is none.
  uint64_t cut_step() const { return cut_step_; }
  // Places in its batch of the items whose rows need a mask.
  std::span<const int32_t> masked_items() const { return masked_items_; }
  int32_t masked_row(size_t index) const { return entries_[masked_items_[index]].row; }
  // Waits until no step reads masks, so that they can be written.
  void wait_masks() { wait_before(cut_step_); }
  // Launches the draw of the step that is cut; the masks of masked_items() must have been written.
  void finish_step();
  GrammarMasks& masks() { return masks_; }
  // Bytes of logprobs of prompt tokens that a step can hold; each token takes
  // logprob_record_bytes(num_prompt_logprobs) of its row.
  int64_t prompt_score_bytes() const {
    return scorer_ != nullptr ? PromptScorer::record_bytes(config_) : 0;
  }
  // Waits for the step and hands its output over, once. A failed step has no entries but an error.
  StepOutput result(uint64_t step);
  // The same into an output whose memory is used again.
  void result(uint64_t step, StepOutput& output);
  // Waits until result() would not; it tells if the device failed meanwhile.
  void wait_step(uint64_t step) noexcept;
  bool ready(uint64_t step) const;
  // Steps up to this number have retired.
  uint64_t retired_step() const;

  // Forgets the output of a step nobody will ask for. One that is cut is finished, with masks that
  // allow everything.
  void discard(uint64_t step);

  // Logits of the newest step for one item of its batch, [vocab] float32, as the sampler left them
  // (masked stop tokens are -inf); those after its last known token if there are drafts, too. Empty
  // if the item drew no token. Waits for the step.
  std::vector<float> logits(int32_t item);
  // Where they lie on the device until the next execute(); null if there are none.
  const float* device_logits(int32_t item);
  // What the head reads, for each token of one item of the newest step: [tokens, cols], on the
  // device until the next execute(). No tokens if the row was masked. Needs keep_hidden_states.
  struct HiddenStates {
    const void* data = nullptr;
    int64_t tokens = 0, cols = 0;
    DType dtype = DType::kF32;
  };
  HiddenStates hidden_states(int32_t item);
  // infer_params of the newest step, copied to the host: name -> values; if it ran as two halves,
  // those that halves have of their own, too: name.half0, name.half1. Waits for the step.
  std::vector<std::pair<std::string, std::vector<int32_t>>> infer_params();
  // Row state as the device holds it; waits.
  Row row_state(int32_t row);

  int32_t free_rows() const { return rows_->free_rows(); }
  RunnerStats stats() const;
  const MemoryPlan& memory_plan() const { return memory_plan_; }
  const KvLayout& kv_layout() const { return kv_layout_; }

  // Whether all ranks note down what each of their steps takes, from the next one on. As
  // take_step_log(), once no step is in flight.
  void log_steps(bool on);
  // The steps of a rank, in order, since log_steps() or the last call: those without a batch, which
  // only change rows, too, but none that failed.
  std::vector<StepTime> take_step_log(int rank);

  // Fills the KV cache with random values (program/kv_store.h): timing without a prefill. The first
  // of ranks with requests of their own fills those of all.
  void fill_kv_random(uint64_t seed);

  // Makes the next step fail with this message after it is launched: for testing error paths. All
  // ranks fail alike, or one of them alone.
  static constexpr int kAllRanks = -1;
  void fail_next_step(std::string message, int rank = kAllRanks);

  // Whether all work that was launched has ended, by then. For a runner that nobody calls any more.
  bool settles(std::chrono::steady_clock::time_point until);

 private:
  friend class RankFollowers;

  struct Slot {
    ModelRunner* runner = nullptr;
    ControlHeader* control = nullptr;
    OutputHeader* output = nullptr;
    uint64_t step = 0;      // newest step in this slot, 0 = never used
    bool delivered = true;  // its output was handed over or kept
    StepShape shape;
    std::vector<RowTable::Mark> marks;  // of the batch's rows, if they speculate
    std::vector<int32_t> num_logprobs;  // of the batch's rows, if any has logprobs
    std::vector<ScoredTokens> scored;   // of the batch's prompts
    std::string error;                  // set by the stream when the step failed
    std::string injected;               // test failure
    bool alone = false;                 // other ranks do not have it
    uint64_t batch = 0;                 // that was launched last with it, or before it
    StepTime time;                      // requests and tokens, for the log
  };

  // Of batches so far back their steps are known.
  static constexpr size_t kRememberedBatches = 64;

  static void check_limits(const Program& program, const RunnerConfig& config);
  // The program as the runner runs it: with the outputs that the configuration asks for.
  static Program prepared(Program program, const RunnerConfig& config);
  static RunnerConfig checked_config(const Program& program, RunnerConfig config, Device& device);
  static void run_step(void* slot);
  static void run_rest(void* slot);
  // Not so on stages of a pipeline before the last.
  bool has_logits() const { return program_.logits_value() >= 0; }
  // Results are the business of whoever leads.
  bool follows() const {
    return communicator_ != nullptr && followers_ == nullptr && data_ranks_ == nullptr;
  }
  int global_rank() const { return communicator_ == nullptr ? 0 : communicator_->global_rank(); }
  void check_no_cut(const char* where) const {
    if (cut_step_ != 0) refuse_cut(where);
  }
  [[noreturn]] void refuse_cut(const char* where) const;
  void wait_before(uint64_t step) const;
  void fail_step(Slot& slot, const char* what) noexcept;
  void warm_up(const StepShape& shape);
  void begin_allocation();
  void end_allocation();
  void allocate_state();
  void allocate_rings();
  struct BatchWork {
    int64_t tokens = 0;
    int32_t samples = 0;
    PrefillWork prefill;
  };
  BatchWork prepare(std::span<const BatchItem> batch);
  uint64_t execute(std::span<const BatchItem> batch, const std::string& injected,
                   std::optional<bool> in_halves);
  StepShape choose_shape(StepSizes exact, bool scores, const PrefillWork& prefill,
                         std::optional<bool> in_halves);
  std::vector<int32_t> cuts_of_graphs(const StepSizes& sizes) const;
  uint64_t adopt_through(std::span<const BatchEntry> entries) const;
  std::string take_injected(std::span<const BatchItem> batch);
  bool has_written(uint64_t step) const;
  bool others_have_ended(const Slot& slot) const;
  void count_batch(Slot& slot);
  void abort_ranks(const Slot& slot, const char* what) noexcept;
  void wait_among_ranks(const Slot& slot) const;
  uint64_t submit(std::span<const BatchEntry> entries, const StepShape& shape,
                  std::span<const ScoredTokens> scored = {}, const std::string& injected = {});
  void send_changes();
  void wait(const Slot& slot) const;
  void keep_output(Slot& slot);
  void log_step(const Slot& slot);
  void read_output(const Slot& slot, StepOutput& output);
  // What a result says of rows that speculate: num_computed at each mark, -1 where the row was
  // masked.
  void retire_rows(std::span<const RowTable::Mark> marks, std::span<const int32_t> num_computed);
  void read_logprobs(const Slot& slot, StepOutput& output) const;
  Slot& slot_of(uint64_t step) { return slots_[step % slots_.size()]; }
  const Slot& slot_of(uint64_t step) const { return slots_[step % slots_.size()]; }
  template <typename T>
  T* state_array(int64_t count, const char* name);
  void wait_newest() const;
  int32_t batch_of(int32_t item, const char* where);
  std::vector<int32_t> read_ints(const int32_t* data, int64_t count);

  std::shared_ptr<Device> device_;
  std::unique_ptr<Communicator> communicator_;
  Program program_;
  RunnerConfig config_;
  WeightStore weights_;
  KvLayout kv_layout_;
  std::unique_ptr<KvStore> kv_;
  std::unique_ptr<Executable> executable_;
  std::unique_ptr<TwoBatch> halves_;  // null: no step runs as two halves
  std::vector<Buffer> state_buffers_;
  Buffer control_buffer_, output_buffer_;
  Buffer adopted_buffer_;  // StageBuffers::outputs
  Buffer workspace_;
  StepContext ctx_;
  std::unique_ptr<Step> step_;
  std::unique_ptr<PromptScorer> scorer_;  // if rows may have logprobs
  GraphLadder ladder_;
  bool captured_ = false;
  std::optional<InferParamView> view_;
  InferParamInputs view_inputs_{};
  GrammarMasks masks_;
  std::unique_ptr<RowTable> rows_;
  std::vector<Slot> slots_;
  std::vector<BatchEntry> entries_;
  std::vector<ScoredTokens> scored_;
  std::vector<int32_t> num_computed_;  // scratch
  // Outputs of steps whose slot was needed before they were asked for.
  std::unordered_map<uint64_t, StepOutput> kept_;
  uint64_t next_step_ = 1;
  std::atomic<uint64_t> launched_batches_{0};
  std::array<std::atomic<uint64_t>, kRememberedBatches> batch_steps_{};  // by batch
  StepSizes newest_sizes_;
  int32_t newest_cut_ = 0;
  int32_t newest_entries_ = 0;
  RunnerStats stats_;
  StepLog log_;
  mutable std::mutex side_mutex_;  // of stats_, injected_failure_ and the ladder's miss
  std::string injected_failure_;
  bool fails_alone_ = false;
  std::string failed_copy_;  // by the stream: fails the next step
  uint64_t newest_batch_step_ = 0;
  uint64_t cut_step_ = 0;
  std::vector<int32_t> masked_items_;
  std::vector<int32_t> masked_rows_;  // scratch
  uint64_t batch_mark_ = 0;
  uint64_t waited_ns_ = 0;
  MemoryPlan memory_plan_;
  size_t control_slot_bytes_ = 0, output_slot_bytes_ = 0;
  mutable bool given_up_ = false;             // on steps of a group that has ended
  std::unique_ptr<RankFollowers> followers_;  // of the leader, where there are others
  DataRanks* data_ranks_ = nullptr;
};

}  // namespace mrv1
