// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/block_pool.h"
#include "engine/mask_source.h"
#include "engine/request.h"
#include "runner/model_runner.h"
#include "runner/step_agreement.h"

namespace mrv1 {

// Requests over a ModelRunner: which of them a step computes, with which blocks. Requests are known
// by slots, small numbers of the caller's. engine/README.md has states, rules and invariants.
// One thread at a time, but for check().
//
// Of ranks that have requests of their own each has an engine over its runner, in a thread of its
// own: they run the same steps, and one without requests goes along with an empty batch.
class Engine {
 public:
  // `mask_source` serves requests with a grammar; without one they are refused. Requests are spread
  // over `micro_batches`, 0 = one for each stage of the runner's pipeline. `agreement` is what the
  // engines of several ranks have in common; null where there is one.
  Engine(std::shared_ptr<ModelRunner> runner, bool enable_prefix_caching,
         std::shared_ptr<MaskSource> mask_source = nullptr, int32_t micro_batches = 0,
         std::shared_ptr<StepAgreement> agreement = nullptr);

  // Throws kRequest or kInvalidArgument if the request could never run, and kDevice if nothing can
  // any more, as the ranks have ended. Any thread.
  void check(const RequestSpec& spec) const;
  // Queues a request that passed check(), one sample a slot; slots must be free. Sample i draws
  // with seed + i.
  void add(RequestSpec spec, std::span<const int32_t> slots);
  // Ends the request in a slot; the slot is free afterwards, as after any event with an end.
  void end(int32_t slot, RequestEnd reason, std::string_view error, EventBatch& out);
  void end_all(RequestEnd reason, std::string_view error, EventBatch& out);
  bool has_request(int32_t slot) const;

  // Launches the next step if there is work, then takes in the oldest one if as many are in flight
  // as may be, or if nothing was launched. Adds what became known to `out`. What goes wrong ends
  // the requests that it touched. Throws std::bad_alloc only, and the engine may then only be
  // destroyed.
  void step(EventBatch& out);
  // Whether step() has something to do by itself.
  bool has_work() const {
    return num_requests_ > 0 || num_busy_ > 0 || !draining_.empty() || !dropped_.empty();
  }
  // Whether other ranks wait for this one to come to their next step. Any thread.
  bool is_wanted() const;
  // Ends the other ranks with this one, if there are any: it will not come to their next step.
  void end_ranks(std::string_view reason) noexcept;
  // From now on every step() comes to one step of the ranks, whether one is wanted or not: for
  // whoever has all of them step at once.
  void always_come() { always_comes_ = true; }

  EngineStats stats() const;
  uint64_t device_wait_cpu_ns() const { return stats_.device_wait_cpu_ns; }
  // Throws kInternal unless rows and blocks are all back; call when nothing runs.
  void check_idle() const;
  // Throws kInternal unless lists, blocks and rows agree. Slow: for tests.
  void check_invariants() const;
  ModelRunner& runner() { return *runner_; }

 private:
  // As due_: no step is too new.
  static constexpr uint64_t kEverybody = ~uint64_t{0};
  // Requests ahead whose memory is asked for.
  static constexpr size_t kPrefetch = 8;

  struct Planned {
    int32_t slot, tokens;
    RowHandle handle;
    bool decode;  // drafts may be among its tokens
    bool draws;   // not so a chunk of a prompt that is not its last

    // Tokens that are computed for certain, unless the row stops.
    int32_t least() const { return decode ? 1 : tokens; }
  };
  struct InFlight {
    uint64_t step = 0;
    std::vector<Planned> requests;  // one a batch entry
    bool is_read = false;
    StepOutput output;  // if it was read before its turn
  };
  struct Draining {
    uint64_t last_step;
    std::vector<std::vector<int32_t>> blocks;
  };
  struct Dropped {
    uint64_t last_step;
    int32_t block;
  };
  // Leading tokens that need no computing.
  struct Hit {
    int32_t prefix = BlockPool::kRoot, num_blocks = 0;
    int32_t from_line = 0;  // of the hit's blocks, those without a reference now
  };

  // scheduler.cc: what the next step computes.
  bool plan_batch();
  bool plan_due();
  void take_share(int32_t share, int64_t& decode);
  bool in_share(const Request& decoding, int32_t& ties) const;
  void plan_running(int32_t slot, size_t place);
  int32_t decode_tokens(const Request& running) const;
  int32_t tokens_to_score(const Request& running, int32_t tokens) const;
  int32_t scorable_tokens(const Request& running, int32_t tokens) const;
  int64_t score_bytes(const Request& running, int32_t tokens) const;
  size_t place_of(const Urgency& urgency) const;
  int32_t cover(Request& running, int32_t tokens, size_t place);
  bool admit(int32_t slot, size_t place);
  Hit find_prefix(const Request& head);
  template <typename Visit>
  void each_block(const Hit& hit, Visit&& visit) const;
  int32_t blocks_to_admit(const Request& head, const Hit& hit) const;
  void take_hit(Request& head, const Hit& hit);
  void own_last_block(Request& sample);
  void place_row(int32_t slot, size_t place);
  bool last_yields_to(const Request& head) const;
  bool preempt_last();
  bool give_up_fork();
  void enqueue(int32_t slot);
  int32_t missing_blocks(int32_t tokens, int32_t held) const;
  int32_t missing_blocks(const Request& running) const;
  // First block of a group that a query at a position may read.
  int32_t first_block(int32_t group, int32_t position) const;

  // engine.cc: steps, and what comes of them.
  enum class Launch { kNothing, kBatch, kEmptyBatch, kClosed };
  Launch launch(EventBatch& out);
  bool plan(EventBatch& out);
  Launch agree();
  void take_in(EventBatch& out);
  void read(const InFlight& step, StepOutput& output);
  void prefetch(int32_t slot) const;
  void prefetch_details(int32_t slot) const;
  void end_with_ranks(EventBatch& out);
  void take_in_entry(const Planned& planned, size_t index, EventBatch& out);
  void keep_filled_blocks(Request& running);
  void fork_held(Request& first);
  bool keep_scores(Request& running, const PromptScores& scores);
  void drop_below_window(Request& running);
  void fail_touched(std::string_view error, EventBatch& out);
  void emit(const Request& request, std::span<const int32_t> tokens, RequestEnd end,
            std::string_view error, EventBatch& out);
  // masks.cc: steps that are cut.
  void finish_cut_step();
  size_t read_for_masks(const InFlight& cut);
  void ask_for_mask(const Planned& planned, size_t num_read);
  void fill_masks();
  void end_unmasked(EventBatch& out);

  void append_tail(Request& running);
  void leave_row(Request& running);
  void release_blocks(std::vector<std::vector<int32_t>>& blocks);
  void release_drained();
  void remove(int32_t slot, bool spoilt);
  void reset_progress(Request& request);
  void promote_held(Request& first);

  // The step in flight at a place, 0 = the oldest.
  InFlight& in_flight(size_t place) {
    return in_flight_[(first_in_flight_ + place) % in_flight_.size()];
  }
  // The step with a batch that was launched so many before the newest one, at most as many as
  // micro-batches; 0 = there was none.
  uint64_t launched_before(size_t count) const {
    const size_t newest = first_in_flight_ + num_in_flight_ + in_flight_.size() - 1;
    return in_flight_[(newest - count) % in_flight_.size()].step;
  }
  Request& request(int32_t slot) { return requests_[slot]; }
  const Request& request(int32_t slot) const { return requests_[slot]; }
  RequestDetails& details(int32_t slot) { return *details_[slot]; }
  const RequestDetails& details(int32_t slot) const { return *details_[slot]; }
  RequestDetails& details(const Request& request) { return *details_[request.slot]; }
  const RequestDetails& details(const Request& request) const { return *details_[request.slot]; }
  int32_t num_groups() const { return static_cast<int32_t>(windows_.size()); }
  int32_t num_blocks(const Request& request) const {
    return static_cast<int32_t>(details(request).blocks[0].size());
  }
  // Whether a block is full with so many tokens computed that the prefix cache was not offered yet.
  bool fills_block(const Request& running, int32_t num_computed) const {
    return running.keeps_blocks && (running.num_kept + 1) * block_size_ <= num_computed;
  }
  int32_t blocks_for(int32_t tokens) const { return (tokens + block_size_ - 1) / block_size_; }

  std::shared_ptr<ModelRunner> runner_;
  const std::shared_ptr<StepAgreement> agreement_;
  bool always_comes_ = false;
  std::optional<bool> in_halves_;  // whether the step that was agreed on runs so
  const bool enable_prefix_caching_;
  const int32_t micro_batches_;
  const int32_t block_size_;
  const std::vector<int32_t> windows_;  // [group] 0 = full
  const bool has_windows_;
  BlockPool pool_;
  std::vector<Request> requests_;                         // by slot
  std::vector<std::unique_ptr<RequestDetails>> details_;  // by slot
  int32_t num_requests_ = 0;
  uint64_t arrivals_ = 0;
  std::set<std::pair<Urgency, int32_t>> waiting_;
  std::vector<int32_t> running_;  // by urgency
  std::vector<int32_t> forked_;   // waiting ones that hold blocks
  int32_t num_held_ = 0;
  std::vector<Dropped> dropped_;    // blocks below windows, until no step in flight has them
  std::vector<Draining> draining_;  // blocks of ended requests that a launched step may write

  std::vector<InFlight> in_flight_;  // a ring: one more than micro-batches
  size_t first_in_flight_ = 0, num_in_flight_ = 0;
  size_t num_busy_ = 0;   // steps in flight that have requests
  uint64_t retired_ = 0;  // newest step that was taken in

  // The batch that is planned.
  std::vector<Planned> planned_;
  std::vector<BatchItem> batch_;
  int32_t decode_budget_ = 0, prefill_budget_ = 0;
  int64_t score_budget_ = 0;  // bytes of logprobs of prompts
  bool drafts_fit_ = true;
  // Of the decoding requests, those may take part whose last step is none after this one. Of these,
  // if they are more than their share, those up to decodes_due_, and the first ties_ of that step.
  uint64_t due_ = 0, decodes_due_ = 0;
  int32_t ties_ = 0;
  uint64_t longest_ago_ = 0;            // least last step of those that decode
  std::vector<uint64_t> decode_steps_;  // scratch
  int32_t promised_ = 0;       // blocks that running requests need for tokens known at admission
  int32_t touched_ = -1;       // slot that is worked on, in the batch or not yet
  bool wants_drain_ = false;   // a request must be preempted, so nothing may be in flight
  int32_t blocked_slot_ = -1;  // head of the line that did not fit
  int32_t blocked_need_ = 0;   // free blocks it lacked
  int32_t blocked_steps_ = 0;  // since
  StepOutput output_;          // of the step that is taken in

  // The masks of the step that is cut.
  const std::shared_ptr<MaskSource> mask_source_;
  std::vector<MaskRequest> mask_requests_;
  std::vector<Planned> masked_;             // one a mask request
  std::vector<std::vector<int32_t>> told_;  // their new tokens
  std::vector<int32_t> read_entries_;       // [step in flight, row] entry in its output, -1 = none
  std::vector<uint8_t> row_is_masked_;      // [row]
  struct Unmasked {
    Planned planned;
    std::string error;
  };
  std::vector<Unmasked> unmasked_;  // to end, as there was no mask
  std::vector<int32_t> table_;      // scratch
  std::vector<BlockCopy> copies_;   // scratch
  EngineStats stats_;
};

}  // namespace mrv1
