// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "engine/engine.h"

namespace mrv1 {

struct EngineOptions {
  bool enable_prefix_caching = true;
  bool background = true;     // a thread of the engine's own takes the steps
  int32_t micro_batches = 0;  // as Engine has them
};

// What the engine threads of several ranks have in common.
struct EngineRanks {
  std::shared_ptr<StepAgreement> agreement;
  // Called where a rank has news, or nothing unfinished any more; any thread, any lock of the rank
  // may be held.
  std::function<void()> on_news;
};

// A request by name. Names are the caller's, unique among the requests whose last output was not
// handed out yet.
struct NamedRequest {
  std::string id;
  RequestSpec spec;
  int32_t samples = 1;
};

// News of one sample of a request. Its last one has an end other than kNone.
struct RequestOutput {
  std::string id;
  int32_t index = 0;  // of the sample
  std::vector<int32_t> token_ids;
  // For each token a group of 1 + num_logprobs, the token itself first; empty without logprobs.
  std::vector<TokenLogprob> logprobs;
  int32_t stop_sequence = -1;  // which of RowSpec::stop_sequences stopped it
  RequestEnd end = RequestEnd::kNone;
  std::string error;
  int32_t num_cached_tokens = 0;
  int32_t num_draft_tokens = 0, num_accepted_tokens = 0;  // of the request so far
  PromptLogprobs prompt_logprobs;  // of the request, with the first token of one of its samples
};

struct EngineThreadStats : EngineStats {
  uint64_t thread_cpu_ns = 0;  // of scheduling, without waiting for the device
};

// An Engine with names and queues around it, and a thread that steps it (or, without `background`,
// the caller of step()). Any thread may call any method. Requests and aborts wait in a queue until
// the next step; outputs wait in one until somebody takes them.
//
// Without host memory for a turn the engine ends: whatever is unfinished gets an error from whoever
// takes outputs, on whose thread it is made, and requests are refused as kOutOfMemory.
class EngineThread {
 public:
  static constexpr int32_t kMaxSamples = 1024;

  EngineThread(std::shared_ptr<ModelRunner> runner, const EngineOptions& options,
               std::shared_ptr<MaskSource> mask_source = nullptr, EngineRanks ranks = {});
  ~EngineThread();  // as stop()
  EngineThread(const EngineThread&) = delete;
  EngineThread& operator=(const EngineThread&) = delete;

  // Queues a request. kRequest and kInvalidArgument errors name what does not fit; nothing is
  // queued then.
  void add_request(NamedRequest request);
  // Ends a sample, or all of them with index -1. Its last output is a kAbort; without `report` none
  // of its outputs is handed out from now on. False if there is nothing left to end.
  bool abort(const std::string& id, int32_t index, bool report);
  // Takes one step and returns the outputs; without `background` only.
  std::vector<RequestOutput> step();
  // Waits for outputs and returns them; with `background` only. Empty if nothing is unfinished,
  // after the timeout, and after wake().
  std::vector<RequestOutput> wait_outputs(double timeout_s);
  // What there is of outputs, without waiting.
  std::vector<RequestOutput> take_ready();
  // Samples whose last output was not handed out yet.
  int32_t num_unfinished();
  // Whether a request of that name is among them.
  bool has_request(const std::string& id);
  // Ends one wait_outputs() early, the next one if nobody waits.
  void wake();
  // Whether outputs are still to come, or something is left to bring home.
  bool has_unfinished();

  EngineThreadStats stats();
  void check_idle();
  void check_invariants();
  // Ends all requests with a kAbort, waits for the steps in flight and joins the thread. Later
  // calls find an engine without requests that takes no new ones. Not from the engine's own thread.
  // Other ranks run no step any more: they end with this one.
  void stop();
  // Ends all ranks, as it cannot come to their next step. Any thread.
  void end_ranks(std::string_view reason) noexcept { engine_.end_ranks(reason); }
  // Whether the engine's own thread calls this, as from within a mask source.
  bool is_own_thread() const { return thread_.get_id() == std::this_thread::get_id(); }

 private:
  // A sample, by the slot that it has in the engine.
  struct Sample {
    const std::string* id = nullptr;  // the key in names_, or null once nobody may hear of it
    int32_t index = 0;
    bool in_use = false;
    bool ended = false;  // its end is known, or an abort is on its way
  };
  struct Command {
    std::vector<int32_t> slots;  // of a new request's samples, or of one that is aborted
    bool is_abort = false;
    RequestSpec spec;
  };
  struct Name {
    std::vector<int32_t> slots;
    int32_t unheard = 0;  // samples whose last output was not handed out
  };

  void run();
  // One turn: commands, a step, outputs. Holds engine_mutex_.
  void turn(bool step);
  void carry_out_commands();
  void publish();
  void hand_over_each();
  void give_up() noexcept;
  void apply_now();
  std::vector<RequestOutput> take_outputs();
  void end_unfinished(std::vector<RequestOutput>& outputs);
  void hear_end(int32_t slot);
  int32_t new_slot();
  void drop_outputs(int32_t slot);
  void tell();
  int rank() { return engine_.runner().communicator()->rank(); }
  void free_slot(int32_t slot);
  template <typename Fn>
  void visit_engine(Fn&& fn);

  const EngineOptions options_;

  const EngineRanks ranks_;
  // Held by whoever works on the engine. Taken before mutex_, never while holding it.
  std::mutex engine_mutex_;
  Engine engine_;
  std::vector<Command> taken_commands_;
  EventBatch events_;
  uint64_t cpu_ns_ = 0;  // of turns, without waiting for the device

  // Commands, visitors or the end are there to be looked at: set under mutex_, so that a turn
  // without any takes that lock only once.
  std::atomic<bool> called_{false};

  std::mutex mutex_;  // of all below
  std::condition_variable work_, news_;
  std::unordered_map<std::string, Name> names_;
  std::vector<Sample> samples_;  // by slot
  std::vector<int32_t> free_slots_;
  int32_t num_samples_ = 0;     // in use
  int32_t num_unheard_of_ = 0;  // of them, those without an id
  std::vector<Command> commands_;
  int32_t queued_samples_ = 0;  // in commands_
  EventBatch outputs_;
  EngineThreadStats stats_;
  bool engine_has_work_ = false;
  int32_t visitors_ = 0;
  bool woken_ = false;
  bool stopping_ = false;
  bool out_of_memory_ = false;  // no turn is taken any more; outputs are whole up to here

  std::thread thread_;
  std::mutex stop_mutex_;
};

}  // namespace mrv1
