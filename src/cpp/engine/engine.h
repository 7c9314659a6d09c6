// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/block_allocator.h"
#include "runner/model_runner.h"

namespace mrv1 {

// A request as the engine takes it: ids are the caller's, unique among the requests whose last
// output was not returned yet.
struct EngineRequest {
  std::string id;
  RowSpec row;  // block_ids and num_computed are the engine's to fill
};

enum class RequestEnd { kNone, kStop, kLength, kAbort, kError };

// One event of one request. A request's last output has an end other than kNone.
struct RequestOutput {
  std::string id;
  int32_t token = -1;  // -1: no token (an abort or an error)
  RequestEnd end = RequestEnd::kNone;
  std::string error;
};

struct EngineStats {
  uint64_t prefill_tokens = 0, decode_tokens = 0;  // computed
  uint64_t steps = 0;
  int32_t running = 0, waiting = 0, free_blocks = 0;
};

// Requests over a ModelRunner, with one scheduling rule: first come, first served, each request
// admitted when a row is free and its whole length can be reserved in KV blocks, so that a running
// request never waits for memory. A step takes one token of every decoding request, then prefill
// chunks in order of arrival up to the token budget. One step runs ahead: step N + 1 is launched
// before the tokens of step N are read. See engine/README.md for states and invariants.
class Engine {
 public:
  explicit Engine(std::shared_ptr<ModelRunner> runner);

  // Queues a request; kRequest and kInvalidArgument errors name what does not fit. Nothing is
  // queued on error.
  void add_request(EngineRequest request);
  // Ends a request; its kAbort output comes with the next step(), or never if the caller does not
  // want a report. False if it is not there.
  bool abort(const std::string& id, bool report = true);
  // Whether step() has something to launch, to return or to bring home.
  bool has_unfinished() const {
    return !requests_.empty() || !pending_outputs_.empty() || !launched_.empty() ||
           !draining_.empty();
  }

  // Launches the next step if there is work, then takes in the oldest step when one is running
  // ahead (or nothing more could be launched). Returns what became known.
  std::vector<RequestOutput> step();

  EngineStats stats() const;
  // Throws kInternal unless rows and blocks balance; call when nothing runs.
  void check_idle() const;
  ModelRunner& runner() { return *runner_; }

 private:
  enum class State { kWaiting, kRunning, kEnded };
  struct Request {
    RowSpec spec;
    State state = State::kWaiting;
    RowHandle handle;
    int32_t num_launched = 0;  // tokens whose computation was launched
    int32_t max_total_len = 0;
    std::vector<int32_t> blocks;
    int32_t blocks_reserved = 0;  // still to come out of the pool
    uint64_t last_step = 0;
  };
  struct Launched {
    uint64_t step;
    std::vector<std::pair<std::string, RowHandle>> requests;  // one a batch entry
  };

  int32_t blocks_for(int32_t tokens) const;
  void admit();
  bool launch();
  void take_in(std::vector<RequestOutput>& outputs);
  void end(const std::string& id, RequestEnd end, std::string error,
           std::vector<RequestOutput>& outputs);
  void release_ended();
  void cover_with_blocks(Request& request, int32_t tokens);

  std::shared_ptr<ModelRunner> runner_;
  BlockAllocator blocks_;
  std::unordered_map<std::string, Request> requests_;  // not ended
  std::deque<std::string> waiting_;
  std::vector<std::string> running_;  // in order of admission
  std::vector<Request> draining_;     // ended, a launched step still names the row
  std::deque<Launched> launched_;
  std::vector<RequestOutput> pending_outputs_;  // aborts between steps
  std::vector<BatchItem> batch_;
  EngineStats stats_;
};

}  // namespace mrv1
