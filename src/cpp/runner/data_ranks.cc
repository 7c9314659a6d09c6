// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/data_ranks.h"

#include <pthread.h>

#include <algorithm>
#include <system_error>
#include <utility>

#include "core/error.h"
#include "dist/communicator.h"
#include "runner/two_batch.h"

namespace mrv1 {

DataRanks::DataRanks(std::vector<std::unique_ptr<ModelRunner>> runners)
    : runners_(std::move(runners)) {
  for (const std::unique_ptr<ModelRunner>& runner : runners_) runner->join_data_ranks(*this);
  try {
    for (int rank = 1; rank < size(); ++rank) {
      Worker& worker = *workers_.emplace_back(std::make_unique<Worker>());
      worker.thread = std::thread([this, &worker, rank] { work(worker, rank); });
      pthread_setname_np(worker.thread.native_handle(), "mrv1-rank");
    }
  } catch (const std::system_error& error) {
    stop();
    fail(ErrorKind::kDevice, "ranks", "cannot start the thread of a rank: ", error.what());
  }
}

DataRanks::~DataRanks() { stop(); }

void DataRanks::stop() noexcept {
  job_ = nullptr;
  for (const std::unique_ptr<Worker>& worker : workers_) {
    if (!worker->thread.joinable()) continue;
    worker->posted.fetch_add(1, std::memory_order_release);
    worker->posted.notify_one();
    worker->thread.join();
  }
}

void DataRanks::work(Worker& worker, int rank) {
  for (uint64_t done = 0;; ++done) {
    worker.posted.wait(done, std::memory_order_acquire);
    if (job_ == nullptr) return;
    try {
      (*job_)(rank);
    } catch (...) {
      worker.error = std::current_exception();
    }
    worker.done.store(done + 1, std::memory_order_release);
    worker.done.notify_one();
  }
}

void DataRanks::each_rank(const std::function<void(int)>& fn) {
  job_ = &fn;
  for (const std::unique_ptr<Worker>& worker : workers_) {
    worker->error = nullptr;
    worker->posted.fetch_add(1, std::memory_order_release);
    worker->posted.notify_one();
  }
  std::exception_ptr first;
  try {
    fn(0);
  } catch (...) {
    first = std::current_exception();
  }
  for (const std::unique_ptr<Worker>& worker : workers_) {
    const uint64_t posted = worker->posted.load(std::memory_order_relaxed);
    for (uint64_t done = 0; done < posted; done = worker->done.load(std::memory_order_acquire)) {
      worker->done.wait(done, std::memory_order_acquire);
    }
    if (!first) first = worker->error;
  }
  if (first) std::rethrow_exception(first);
}

std::vector<uint64_t> DataRanks::execute(std::span<const std::vector<BatchItem>> batches) {
  check(static_cast<int>(batches.size()) == size(), "execute", "there are ", batches.size(),
        " batches, must be one for each of ", size(), " ranks");
  std::vector<StepLoad> loads;
  for (int rank = 0; rank < size(); ++rank) {
    loads.push_back(runner(rank).check_batch(batches[static_cast<size_t>(rank)]));
  }
  const bool in_halves = runs_in_halves(runner(0).config().two_batch, loads);
  std::vector<uint64_t> steps(batches.size());
  each_rank([&](int rank) {
    const auto at = static_cast<size_t>(rank);
    try {
      steps[at] = runner(rank).execute(batches[at], in_halves);
    } catch (const std::exception& error) {
      // Others have begun a step that they cannot end without this rank.
      Communicator& communicator = *runner(rank).communicator();
      communicator.abort(concat(communicator.name(), " cannot launch a step: ", error.what()));
      throw;
    }
  });
  return steps;
}

bool DataRanks::others_have_ended(int rank, uint64_t batch) const {
  for (size_t other = 0; other < runners_.size(); ++other) {
    if (other != static_cast<size_t>(rank) && !runners_[other]->has_ended_batch(batch)) {
      return false;
    }
  }
  return true;
}

bool DataRanks::is_behind(int rank) const {
  const uint64_t own = runners_[static_cast<size_t>(rank)]->launched_batches();
  return std::any_of(runners_.begin(), runners_.end(),
                     [&](const auto& runner) { return runner->launched_batches() > own; });
}

CaptureReport DataRanks::capture_graphs() {
  // Here nobody has begun anything yet.
  for (int rank = 0; rank < size(); ++rank) {
    check(!is_behind(rank) && runner(rank).cut_step() == 0, "capture_graphs", "rank ", rank,
          " has a step to launch or to finish first");
  }
  std::vector<CaptureReport> reports(runners_.size());
  each_rank([&](int rank) {
    try {
      reports[static_cast<size_t>(rank)] = runner(rank).capture_own_graphs();
    } catch (const std::exception& error) {
      // Others wait for what it would have run.
      Communicator& communicator = *runner(rank).communicator();
      communicator.abort(concat(communicator.name(), " cannot capture graphs: ", error.what()));
      throw;
    }
  });
  return *std::max_element(reports.begin(), reports.end(),
                           [](const auto& a, const auto& b) { return a.bytes < b.bytes; });
}

bool DataRanks::settle(std::chrono::steady_clock::time_point until) {
  return std::all_of(runners_.begin(), runners_.end(),
                     [&](const auto& runner) { return runner->settles(until); });
}

}  // namespace mrv1
