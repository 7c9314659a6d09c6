// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "engine/engine_thread.h"

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <new>
#include <system_error>
#include <utility>

#include "core/clock.h"
#include "core/error.h"

namespace mrv1 {
namespace {

constexpr const char* kWhere = "engine";
constexpr double kLongestWait = 1e6;  // seconds
constexpr const char* kOutOfMemory = "ran out of host memory and has ended; close it";

}  // namespace

EngineThread::EngineThread(std::shared_ptr<ModelRunner> runner, const EngineOptions& options,
                           std::shared_ptr<MaskSource> mask_source, EngineRanks ranks)
    : options_(options),
      ranks_(std::move(ranks)),
      engine_(std::move(runner), options.enable_prefix_caching, std::move(mask_source),
              options.micro_batches, ranks_.agreement) {
  static_cast<EngineStats&>(stats_) = engine_.stats();
  if (!options_.background) {
    engine_.always_come();
    return;
  }
  try {
    thread_ = std::thread([this] { run(); });
    pthread_setname_np(thread_.native_handle(), "mrv1-engine");
  } catch (const std::system_error& error) {
    fail(ErrorKind::kDevice, kWhere, "cannot start the engine's thread: ", error.what());
  }
  if (ranks_.agreement == nullptr) return;
  ranks_.agreement->set_wake(rank(), [this] {
    std::lock_guard lock(mutex_);
    work_.notify_one();
  });
}

EngineThread::~EngineThread() { stop(); }

// --- any thread --------------------------------------------------------------------------------

int32_t EngineThread::new_slot() {
  if (free_slots_.empty()) {
    free_slots_.push_back(static_cast<int32_t>(samples_.size()));
    samples_.emplace_back();
  }
  const int32_t slot = free_slots_.back();
  free_slots_.pop_back();
  ++num_samples_;
  return slot;
}

void EngineThread::add_request(NamedRequest request) {
  if (request.samples < 1 || request.samples > kMaxSamples) {
    fail(ErrorKind::kRequest, "add_request", "n is ", request.samples, "; allowed are 1 to ",
         kMaxSamples);
  }
  engine_.check(request.spec);
  {
    std::lock_guard lock(mutex_);
    if (stopping_) fail(ErrorKind::kClosed, kWhere, "is closed");
    if (out_of_memory_) fail(ErrorKind::kOutOfMemory, kWhere, kOutOfMemory);
    const auto [place, is_new] = names_.try_emplace(std::move(request.id));
    if (!is_new) fail(ErrorKind::kRequest, "add_request", "an unfinished request has this id");
    Name& name = place->second;
    name.unheard = request.samples;
    Command command;
    for (int32_t index = 0; index < request.samples; ++index) {
      const int32_t slot = new_slot();
      samples_[slot] = {&place->first, index, true, false};
      name.slots.push_back(slot);
    }
    command.slots = name.slots;
    command.spec = std::move(request.spec);
    commands_.push_back(std::move(command));
    queued_samples_ += request.samples;
    called_.store(true, std::memory_order_release);
  }
  work_.notify_one();
  apply_now();
}

bool EngineThread::abort(const std::string& id, int32_t index, bool report) {
  bool any = false;
  {
    std::lock_guard lock(mutex_);
    const auto place = names_.find(id);
    if (place == names_.end()) return false;
    Name& name = place->second;
    for (const int32_t slot : name.slots) {
      Sample& sample = samples_[slot];
      if (!sample.in_use || sample.id != &place->first) continue;
      if (index >= 0 && sample.index != index) continue;
      if (!sample.ended) {
        any = true;
        sample.ended = true;
        Command command;
        command.slots = {slot};
        command.is_abort = true;
        commands_.push_back(std::move(command));
        called_.store(true, std::memory_order_release);
      }
      if (!report) {
        sample.id = nullptr;
        ++num_unheard_of_;
        --name.unheard;
        drop_outputs(slot);
      }
    }
    if (name.unheard == 0) names_.erase(place);
    if (!report) tell();
  }
  work_.notify_one();
  apply_now();
  return any;
}

// Without a thread, what was queued takes effect at once, unless a step runs in another thread.
void EngineThread::apply_now() {
  if (options_.background) return;
  std::unique_lock engine(engine_mutex_, std::try_to_lock);
  if (engine.owns_lock()) turn(/*step=*/false);
}

std::vector<RequestOutput> EngineThread::step() {
  check(!options_.background, "step", "the engine steps in a thread of its own; use wait_outputs");
  {
    std::lock_guard engine(engine_mutex_);
    turn(/*step=*/true);
  }
  std::lock_guard lock(mutex_);
  return take_outputs();
}

std::vector<RequestOutput> EngineThread::wait_outputs(double timeout_s) {
  check(options_.background, "wait_outputs", "the engine has no thread; use step");
  check(!std::isnan(timeout_s) && timeout_s >= 0, "wait_outputs", "timeout_s is ", timeout_s,
        "; it must not be negative");
  const std::chrono::duration<double> timeout(std::min(timeout_s, kLongestWait));
  std::unique_lock lock(mutex_);
  news_.wait_for(lock, timeout, [&] {
    return woken_ || out_of_memory_ || !outputs_.events.empty() || num_samples_ == 0;
  });
  woken_ = false;
  return take_outputs();
}

std::vector<RequestOutput> EngineThread::take_ready() {
  std::lock_guard lock(mutex_);
  return take_outputs();
}

int32_t EngineThread::num_unfinished() {
  std::lock_guard lock(mutex_);
  return num_samples_;
}

bool EngineThread::has_request(const std::string& id) {
  std::lock_guard lock(mutex_);
  return names_.count(id) > 0;
}

void EngineThread::wake() {
  {
    std::lock_guard lock(mutex_);
    woken_ = true;
  }
  tell();
}

bool EngineThread::has_unfinished() {
  std::lock_guard lock(mutex_);
  return num_samples_ > 0 || engine_has_work_;
}

// What may throw comes first, so that outputs which find no memory are still there.
std::vector<RequestOutput> EngineThread::take_outputs() {
  std::vector<RequestOutput> outputs;
  outputs.reserve(outputs_.events.size());
  free_slots_.reserve(samples_.size());
  auto token = outputs_.tokens.begin();
  auto logprob = outputs_.logprobs.begin();
  for (const RequestEvent& event : outputs_.events) {
    const auto tokens = token;
    token += event.num_tokens;
    const auto logprobs = logprob;
    logprob += event.num_logprobs;
    if (event.slot < 0) continue;  // dropped
    const Sample& sample = samples_[event.slot];
    RequestOutput& output = outputs.emplace_back();
    output.id = *sample.id;
    output.index = sample.index;
    output.token_ids.assign(tokens, token);
    output.logprobs.assign(logprobs, logprob);
    output.stop_sequence = event.stop_sequence;
    output.end = event.end;
    if (event.error >= 0) output.error = outputs_.errors[event.error];
    output.num_cached_tokens = event.num_cached_tokens;
    output.num_draft_tokens = event.num_draft_tokens;
    output.num_accepted_tokens = event.num_accepted_tokens;
  }
  if (out_of_memory_ && outputs_.events.empty()) {
    end_unfinished(outputs);
    return outputs;
  }
  auto output = outputs.begin();
  for (const RequestEvent& event : outputs_.events) {
    if (event.slot < 0) continue;
    if (event.prompt_logprobs >= 0) {
      output->prompt_logprobs = std::move(outputs_.prompt_logprobs[event.prompt_logprobs]);
    }
    ++output;
    if (event.end != RequestEnd::kNone) hear_end(event.slot);
  }
  outputs_.clear();
  return outputs;
}

// Every sample that is left ends with an error, as the engine has.
void EngineThread::end_unfinished(std::vector<RequestOutput>& outputs) {
  for (const Sample& sample : samples_) {
    if (sample.id == nullptr) continue;
    RequestOutput& output = outputs.emplace_back();
    output.id = *sample.id;
    output.index = sample.index;
    output.end = RequestEnd::kError;
    output.error = concat("[", kWhere, "] ", kOutOfMemory);
  }
  for (size_t slot = 0; slot < samples_.size(); ++slot) {
    if (samples_[slot].in_use) hear_end(static_cast<int32_t>(slot));
  }
}

// Wakes whoever waits for outputs, or for nothing to be unfinished.
void EngineThread::tell() {
  news_.notify_all();
  if (ranks_.on_news) ranks_.on_news();
}

// The last output of a slot's sample was handed out, or nobody may hear of it.
void EngineThread::hear_end(int32_t slot) {
  if (const std::string* id = samples_[slot].id) {
    const auto place = names_.find(*id);
    if (--place->second.unheard == 0) names_.erase(place);
  }
  free_slot(slot);
}

// Nobody may hear what waits to be taken of a slot: the slot's next sample would be taken for it.
void EngineThread::drop_outputs(int32_t slot) {
  for (RequestEvent& event : outputs_.events) {
    if (event.slot != slot) continue;
    event.slot = -1;
    if (event.end != RequestEnd::kNone) free_slot(slot);
  }
}

void EngineThread::free_slot(int32_t slot) {
  free_slots_.push_back(slot);  // first, as it may find no memory
  num_unheard_of_ -= samples_[slot].id == nullptr;
  samples_[slot] = {};
  if (--num_samples_ == 0) tell();
}

// --- the engine's thread -----------------------------------------------------------------------

void EngineThread::run() {
  bool more = false;
  for (;;) {
    if (!more || called_.load(std::memory_order_acquire)) {
      std::unique_lock lock(mutex_);
      work_.wait(lock, [&] {
        return stopping_ || (!out_of_memory_ && visitors_ == 0 &&
                             (!commands_.empty() || engine_has_work_ || engine_.is_wanted()));
      });
      if (stopping_) return;
    }
    std::lock_guard engine(engine_mutex_);
    turn(/*step=*/true);
    more = engine_.has_work() && !out_of_memory_;
  }
}

void EngineThread::turn(bool step) {
  if (out_of_memory_) return;  // set under both locks, so either may read it
  // A thread of its own counts all that it does.
  const bool counts_turns = step && !options_.background;
  const uint64_t start = counts_turns ? thread_cpu_ns() : 0;
  const uint64_t waited = engine_.device_wait_cpu_ns();
  try {
    // By themselves: other ranks wait for the step, whatever becomes of the commands.
    const auto guarded = [&](const auto& fn) {
      try {
        fn();
      } catch (const std::bad_alloc&) {
        throw;
      } catch (const std::exception& error) {
        engine_.end_all(RequestEnd::kError, error.what(), events_);
      }
    };
    guarded([&] { carry_out_commands(); });
    if (step) guarded([&] { engine_.step(events_); });
    if (options_.background) cpu_ns_ = thread_cpu_ns() - engine_.device_wait_cpu_ns();
    publish();
  } catch (const std::exception&) {
    give_up();
  }
  if (counts_turns) cpu_ns_ += thread_cpu_ns() - start - (engine_.device_wait_cpu_ns() - waited);
}

// A turn was left in the middle, and there may be no memory to say so with.
void EngineThread::give_up() noexcept {
  engine_.end_ranks("a rank's engine ran out of host memory");
  {
    std::lock_guard lock(mutex_);
    out_of_memory_ = true;
    engine_has_work_ = false;
  }
  tell();
}

void EngineThread::carry_out_commands() {
  if (!called_.load(std::memory_order_acquire)) return;
  {
    std::lock_guard lock(mutex_);
    called_.store(visitors_ > 0 || stopping_, std::memory_order_relaxed);
    if (commands_.empty()) return;
    taken_commands_.swap(commands_);
    queued_samples_ = 0;
  }
  for (Command& command : taken_commands_) {
    if (!command.is_abort) {
      engine_.add(std::move(command.spec), command.slots);
    } else if (engine_.has_request(command.slots[0])) {
      engine_.end(command.slots[0], RequestEnd::kAbort, "", events_);
    }
  }
  taken_commands_.clear();
}

// Hands over what became known.
void EngineThread::publish() {
  const EngineStats stats = engine_.stats();
  const bool has_work = engine_.has_work();
  bool news = false;
  {
    std::lock_guard lock(mutex_);
    static_cast<EngineStats&>(stats_) = stats;
    stats_.thread_cpu_ns = cpu_ns_;
    engine_has_work_ = has_work;
    for (const int32_t index : events_.ends) samples_[events_.events[index].slot].ended = true;
    if (num_unheard_of_ == 0 && outputs_.events.empty()) {
      std::swap(outputs_, events_);
    } else {
      hand_over_each();
    }
    news = !outputs_.events.empty();
  }
  events_.clear();
  if (news) tell();
}

// Adds the events to outputs that wait already, but for those of samples that nobody may hear of.
void EngineThread::hand_over_each() {
  auto token = events_.tokens.begin();
  auto logprob = events_.logprobs.begin();
  for (RequestEvent event : events_.events) {
    const auto tokens = token;
    token += event.num_tokens;
    const auto logprobs = logprob;
    logprob += event.num_logprobs;
    if (samples_[event.slot].id == nullptr) {
      if (event.end != RequestEnd::kNone) free_slot(event.slot);
      continue;
    }
    if (event.error >= 0) {
      outputs_.errors.push_back(std::move(events_.errors[event.error]));
      event.error = static_cast<int32_t>(outputs_.errors.size()) - 1;
    }
    if (event.prompt_logprobs >= 0) {
      outputs_.prompt_logprobs.push_back(std::move(events_.prompt_logprobs[event.prompt_logprobs]));
      event.prompt_logprobs = static_cast<int32_t>(outputs_.prompt_logprobs.size()) - 1;
    }
    outputs_.tokens.insert(outputs_.tokens.end(), tokens, token);
    outputs_.logprobs.insert(outputs_.logprobs.end(), logprobs, logprob);
    outputs_.events.push_back(event);
  }
}

// --- looking at it, and the end ----------------------------------------------------------------

EngineThreadStats EngineThread::stats() {
  std::lock_guard lock(mutex_);
  EngineThreadStats stats = stats_;
  stats.waiting += queued_samples_;
  return stats;
}

// Calls fn() between two turns.
template <typename Fn>
void EngineThread::visit_engine(Fn&& fn) {
  {
    std::lock_guard lock(mutex_);
    ++visitors_;
    called_.store(true, std::memory_order_release);
  }
  const auto leave = [&] {
    {
      std::lock_guard lock(mutex_);
      --visitors_;
    }
    work_.notify_one();
  };
  try {
    std::lock_guard engine(engine_mutex_);
    fn();
  } catch (...) {
    leave();
    throw;
  }
  leave();
}

void EngineThread::check_idle() {
  visit_engine([&] { engine_.check_idle(); });
}

void EngineThread::check_invariants() {
  visit_engine([&] { engine_.check_invariants(); });
}

void EngineThread::stop() {
  std::lock_guard stop(stop_mutex_);
  if (ranks_.agreement != nullptr) {
    ranks_.agreement->close();
    ranks_.agreement->set_wake(rank(), nullptr);
  }
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    called_.store(true, std::memory_order_release);
  }
  work_.notify_all();
  if (thread_.joinable()) thread_.join();
  std::lock_guard engine(engine_mutex_);
  if (!out_of_memory_) {
    try {
      carry_out_commands();
      engine_.end_all(RequestEnd::kAbort, "", events_);
      // With nothing left to run it takes in the steps that do.
      engine_.step(events_);
      publish();
    } catch (const std::exception&) {
      give_up();
    }
  }
  tell();
}

}  // namespace mrv1
