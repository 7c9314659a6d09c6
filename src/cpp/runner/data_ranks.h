// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "runner/model_runner.h"

namespace mrv1 {

// Ranks that each have requests, rows and blocks of their own and compute the experts of all: a
// runner each, which is called by itself. All must run the same number of steps, as tokens travel
// between ranks in each: one without anything to compute runs an empty batch. Engines see to that
// (runner/step_agreement.h); whoever calls runners directly calls execute({}) on the idle ones.
//
// A step that fails on one rank ends all of them, as others have counted on it.
class DataRanks {
 public:
  // In the order of the ranks, which they know by their communicators.
  explicit DataRanks(std::vector<std::unique_ptr<ModelRunner>> runners);
  ~DataRanks();

  int size() const { return static_cast<int>(runners_.size()); }
  ModelRunner& runner(int rank) { return *runners_[static_cast<size_t>(rank)]; }

  // Launches a step on all ranks, of a batch each, at the same time; its numbers, by rank. Nothing
  // is launched if one of them refuses its batch. One thread at a time, and nobody else calls
  // execute() meanwhile.
  std::vector<uint64_t> execute(std::span<const std::vector<BatchItem>> batches);
  // Whether all ranks but one have ended their batches up to this number. Any thread.
  bool others_have_ended(int rank, uint64_t batch) const;
  // Whether one of the others has launched more batches than this rank. Any thread.
  bool is_behind(int rank) const;
  // ModelRunner::capture_graphs() of all, each in a thread of its own: the largest of the reports.
  CaptureReport capture_graphs();
  // Whether all work that was launched has ended, by then.
  bool settle(std::chrono::steady_clock::time_point until);

 private:
  // A thread of each rank but the first: what one rank launches may wait for what another one
  // launches, and a GPU takes only so many launches ahead.
  struct Worker {
    std::thread thread;
    std::atomic<uint64_t> posted{0}, done{0};
    std::exception_ptr error;
  };

  // fn(rank) for all ranks at the same time; throws what the first of them threw.
  void each_rank(const std::function<void(int)>& fn);
  void work(Worker& worker, int rank);
  void stop() noexcept;

  std::vector<std::unique_ptr<ModelRunner>> runners_;
  std::vector<std::unique_ptr<Worker>> workers_;
  const std::function<void(int)>* job_ = nullptr;  // null: to stop
};

}  // namespace mrv1
