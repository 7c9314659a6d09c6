// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "engine/engine_group.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <iterator>
#include <system_error>
#include <thread>
#include <utility>

#include "core/error.h"
#include "runner/data_ranks.h"

namespace mrv1 {
namespace {

constexpr std::string_view kWhere = "engine";
constexpr double kLongestWait = 1e6;  // seconds

}  // namespace

EngineGroup::EngineGroup(std::shared_ptr<ModelRunner> runner, const EngineOptions& options,
                         std::shared_ptr<MaskSource> mask_source)
    : background_(options.background) {
  DataRanks* const data_ranks = runner->data_ranks();
  if (data_ranks == nullptr) {
    ranks_.push_back(std::make_unique<EngineThread>(runner, options, std::move(mask_source)));
    return;
  }
  EngineRanks ranks;
  ranks.agreement = std::make_shared<StepAgreement>(data_ranks->size());
  ranks.on_news = [this] {
    {
      std::lock_guard lock(mutex_);
      ++num_news_;
    }
    news_.notify_all();
  };
  for (int rank = 0; rank < data_ranks->size(); ++rank) {
    // The first one's owner is that of all.
    const std::shared_ptr<ModelRunner> own(runner, &data_ranks->runner(rank));
    ranks_.push_back(std::make_unique<EngineThread>(own, options, mask_source, ranks));
  }
}

EngineGroup::~EngineGroup() { stop(); }

EngineThread& EngineGroup::rank_at(int rank) {
  check(rank >= 0 && rank < size(), kWhere, "there is no rank ", rank);
  return *ranks_[static_cast<size_t>(rank)];
}

void EngineGroup::add_request(NamedRequest request, int rank) {
  if (size() == 1) return ranks_[0]->add_request(std::move(request));
  std::lock_guard lock(add_mutex_);
  for (const auto& each : ranks_) {
    if (each->has_request(request.id)) {
      fail(ErrorKind::kRequest, "add_request", "an unfinished request has this id");
    }
  }
  if (rank < 0) {
    std::vector<int32_t> counts;
    for (const auto& each : ranks_) counts.push_back(each->num_unfinished());
    rank = static_cast<int>(std::min_element(counts.begin(), counts.end()) - counts.begin());
  }
  rank_at(rank).add_request(std::move(request));
}

bool EngineGroup::abort(const std::string& id, int32_t index, bool report) {
  return std::any_of(ranks_.begin(), ranks_.end(),
                     [&](const auto& rank) { return rank->abort(id, index, report); });
}

std::vector<RequestOutput> EngineGroup::take_ready() {
  std::vector<RequestOutput> all;
  for (const auto& rank : ranks_) {
    std::vector<RequestOutput> outputs = rank->take_ready();
    std::move(outputs.begin(), outputs.end(), std::back_inserter(all));
  }
  return all;
}

std::vector<RequestOutput> EngineGroup::step() {
  if (size() == 1) return ranks_[0]->step();
  check(!background_, "step", "the engine steps in threads of its own; use wait_outputs");
  std::vector<std::vector<RequestOutput>> outputs(ranks_.size());
  std::vector<std::exception_ptr> errors(ranks_.size());
  const auto take_step = [&](size_t rank) {
    try {
      outputs[rank] = ranks_[rank]->step();
    } catch (...) {
      errors[rank] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  try {
    for (size_t rank = 1; rank < ranks_.size(); ++rank) {
      threads.emplace_back([&, rank] { take_step(rank); });
    }
  } catch (const std::system_error& error) {
    // Those that have begun wait for the others.
    ranks_[0]->end_ranks("a rank's thread could not be started");
    for (std::thread& thread : threads) thread.join();
    fail(ErrorKind::kDevice, kWhere, "cannot start the thread of a rank: ", error.what());
  }
  take_step(0);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  std::vector<RequestOutput> all;
  for (std::vector<RequestOutput>& each : outputs) {
    std::move(each.begin(), each.end(), std::back_inserter(all));
  }
  return all;
}

std::vector<RequestOutput> EngineGroup::wait_outputs(double timeout_s) {
  if (size() == 1) return ranks_[0]->wait_outputs(timeout_s);
  check(background_, "wait_outputs", "the engine has no threads; use step");
  check(!std::isnan(timeout_s) && timeout_s >= 0, "wait_outputs", "timeout_s is ", timeout_s,
        "; it must not be negative");
  const auto until = std::chrono::steady_clock::now() +
                     std::chrono::duration_cast<std::chrono::nanoseconds>(
                         std::chrono::duration<double>(std::min(timeout_s, kLongestWait)));
  for (;;) {
    uint64_t seen = 0;
    bool woken = false;
    {
      std::lock_guard lock(mutex_);
      seen = num_news_;
      woken = std::exchange(woken_, false);
    }
    std::vector<RequestOutput> outputs = take_ready();
    const auto is_done = [](const auto& rank) { return rank->num_unfinished() == 0; };
    if (woken || !outputs.empty() || std::all_of(ranks_.begin(), ranks_.end(), is_done)) {
      return outputs;
    }
    std::unique_lock lock(mutex_);
    if (!news_.wait_until(lock, until, [&] { return num_news_ != seen || woken_; })) return {};
  }
}

void EngineGroup::wake() {
  if (size() == 1) return ranks_[0]->wake();
  {
    std::lock_guard lock(mutex_);
    woken_ = true;
  }
  news_.notify_all();
}

bool EngineGroup::has_unfinished() {
  return std::any_of(ranks_.begin(), ranks_.end(),
                     [](const auto& rank) { return rank->has_unfinished(); });
}

EngineThreadStats EngineGroup::rank_stats(int rank) { return rank_at(rank).stats(); }

EngineThreadStats EngineGroup::stats() {
  EngineThreadStats sum = ranks_[0]->stats();
  for (size_t rank = 1; rank < ranks_.size(); ++rank) {
    const EngineThreadStats stats = ranks_[rank]->stats();
    sum.prefill_tokens += stats.prefill_tokens;
    sum.decode_tokens += stats.decode_tokens;
    sum.running += stats.running;
    sum.waiting += stats.waiting;
    sum.free_blocks += stats.free_blocks;
    sum.cached_blocks += stats.cached_blocks;
    sum.preemptions += stats.preemptions;
    sum.prefix_hit_tokens += stats.prefix_hit_tokens;
    sum.draft_tokens += stats.draft_tokens;
    sum.accepted_tokens += stats.accepted_tokens;
    sum.masked_results += stats.masked_results;
    sum.dropped_results += stats.dropped_results;
    sum.device_wait_cpu_ns += stats.device_wait_cpu_ns;
    sum.thread_cpu_ns += stats.thread_cpu_ns;
  }
  return sum;
}

void EngineGroup::check_idle() {
  for (const auto& rank : ranks_) rank->check_idle();
}

void EngineGroup::check_invariants() {
  for (const auto& rank : ranks_) rank->check_invariants();
}

void EngineGroup::stop() {
  for (const auto& rank : ranks_) rank->stop();
}

bool EngineGroup::is_own_thread() const {
  return std::any_of(ranks_.begin(), ranks_.end(),
                     [](const auto& rank) { return rank->is_own_thread(); });
}

}  // namespace mrv1
