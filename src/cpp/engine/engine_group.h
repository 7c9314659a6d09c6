// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/engine_thread.h"

namespace mrv1 {

// The engine of a model: an EngineThread over its runner, or where ranks have requests of their own
// (runner/data_ranks.h) one over the runner of each, among which requests are spread. Methods are
// those of EngineThread.
class EngineGroup {
 public:
  // `runner` is that of the first rank.
  EngineGroup(std::shared_ptr<ModelRunner> runner, const EngineOptions& options,
              std::shared_ptr<MaskSource> mask_source = nullptr);
  ~EngineGroup();  // as stop()
  EngineGroup(const EngineGroup&) = delete;
  EngineGroup& operator=(const EngineGroup&) = delete;

  int size() const { return static_cast<int>(ranks_.size()); }

  // A request goes to the rank with the fewest samples that are unfinished, of several the first,
  // or to `rank` if it is not negative.
  void add_request(NamedRequest request, int rank = -1);
  bool abort(const std::string& id, int32_t index, bool report);
  // All ranks take one step, at the same time.
  std::vector<RequestOutput> step();
  std::vector<RequestOutput> wait_outputs(double timeout_s);
  void wake();
  bool has_unfinished();

  // Sums over the ranks, but for steps, which are those of one.
  EngineThreadStats stats();
  EngineThreadStats rank_stats(int rank);
  void check_idle();
  void check_invariants();
  void stop();
  bool is_own_thread() const;

 private:
  std::vector<RequestOutput> take_ready();
  EngineThread& rank_at(int rank);

  const bool background_;
  std::mutex add_mutex_;  // names are unique among all ranks

  // Held for moments only, and never while a method of a rank is called: ranks tell of news under
  // locks of theirs.
  std::mutex mutex_;
  std::condition_variable news_;
  uint64_t num_news_ = 0;
  bool woken_ = false;

  std::vector<std::unique_ptr<EngineThread>> ranks_;  // last: they tell of news
};

}  // namespace mrv1
