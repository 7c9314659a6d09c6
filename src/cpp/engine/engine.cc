// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Requests in, steps launched and taken in, events out.
#include "engine/engine.h"

#include <algorithm>
#include <exception>
#include <new>
#include <span>

#include "core/clock.h"
#include "core/error.h"

namespace mrv1 {
namespace {

constexpr std::string_view kWhere = "engine";
// Outputs that a request's history has room for from the start; longer ones grow it.
constexpr int32_t kReservedOutputs = 4096;

RequestEnd end_of(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return RequestEnd::kStop;
    case FinishReason::kLength:
      return RequestEnd::kLength;
    case FinishReason::kError:
      return RequestEnd::kError;
    case FinishReason::kNone:
      break;
  }
  return RequestEnd::kNone;
}

std::vector<int32_t> group_windows(const ModelRunner& runner) {
  std::vector<int32_t> windows;
  for (const KvGroup& group : runner.kv_layout().groups) windows.push_back(group.window);
  return windows;
}

}  // namespace

Engine::Engine(std::shared_ptr<ModelRunner> runner, bool enable_prefix_caching,
               std::shared_ptr<MaskSource> mask_source, int32_t micro_batches,
               std::shared_ptr<StepAgreement> agreement)
    : runner_(std::move(runner)),
      agreement_(std::move(agreement)),
      enable_prefix_caching_(enable_prefix_caching),
      micro_batches_(micro_batches > 0 ? micro_batches : runner_->config().num_stages),
      block_size_(runner_->config().block_size),
      windows_(group_windows(*runner_)),
      has_windows_(std::any_of(windows_.begin(), windows_.end(), [](int32_t w) { return w > 0; })),
      pool_(runner_->config().num_blocks, block_size_, static_cast<int32_t>(windows_.size())),
      in_flight_(micro_batches_ + 1),
      mask_source_(std::move(mask_source)) {
  check_internal((agreement_ != nullptr) == runner_->config().data_parallel, kWhere,
                 "engines of ranks with requests of their own, and no others, agree on steps");
  const size_t rows = runner_->config().max_num_seqs;
  running_.reserve(rows);
  planned_.reserve(rows);
  batch_.reserve(rows);
  if (micro_batches_ > 1) decode_steps_.reserve(rows);
  for (InFlight& step : in_flight_) step.requests.reserve(rows);
}

// --- requests ----------------------------------------------------------------------------------

void Engine::check(const RequestSpec& spec) const {
  const RunnerConfig& config = runner_->config();
  runner_->check_ranks();
  const auto refuse = [&](const auto&... parts) {
    fail(ErrorKind::kRequest, "add_request", parts...);
  };
  const RowSpec& row = spec.row;
  const auto length = static_cast<int64_t>(row.token_ids.size());
  if (length == 0) refuse("the prompt is empty");
  if (length >= config.max_model_len) {
    refuse("the prompt has ", length, " tokens; with one to generate at most ",
           config.max_model_len - 1, " fit max_model_len ", config.max_model_len);
  }
  runner_->check_spec(row);
  check_internal(row.grammar == (spec.grammar != nullptr) &&
                     (spec.grammar == nullptr || mask_source_ != nullptr),
                 "add_request", "a request with a grammar needs a source of masks");
  const auto most =
      static_cast<int32_t>(std::min<int64_t>(length + row.max_tokens, config.max_model_len));
  // The last token is never computed, so it needs no slot.
  int32_t needed = 0;
  for (const int32_t window : windows_) {
    const int32_t all = blocks_for(most - 1);
    // A window and a new token, wherever block boundaries fall.
    needed += window == 0 ? all : std::min(all, blocks_for(window) + 1);
  }
  if (needed > pool_.total()) {
    refuse("prompt and max_tokens need ", needed, " KV blocks of ", config.block_size,
           " tokens; the cache has ", pool_.total());
  }
}

void Engine::add(RequestSpec spec, std::span<const int32_t> slots) {
  const RunnerConfig& config = runner_->config();
  ++arrivals_;
  const auto length = static_cast<int32_t>(spec.row.token_ids.size());
  spec.row.prompt_len = length;
  for (size_t i = 0; i < slots.size(); ++i) {
    const int32_t slot = slots[i];
    if (static_cast<size_t>(slot) >= requests_.size()) {
      requests_.resize(slot + 1);
      details_.resize(slot + 1);
    }
    if (details_[slot] == nullptr) {
      details_[slot] = std::make_unique<RequestDetails>();
      details_[slot]->blocks.resize(num_groups());
      details_[slot]->num_dropped.resize(num_groups());
    }
    Request& added = request(slot);
    RequestDetails& its = details(slot);
    check_internal(added.state == RequestState::kNone, kWhere, "slot ", slot, " is in use");
    added.slot = slot;
    its.urgency = {spec.priority, arrivals_, static_cast<int32_t>(i)};
    its.scope = spec.scope;
    if (i + 1 < slots.size()) {
      its.row = spec.row;
    } else {
      its.row = std::move(spec.row);
    }
    its.row.seed += i;
    its.grammar = spec.grammar;
    its.num_told = 0;
    if (its.row.grammar) its.row.num_speculative_tokens = 0;
    its.row.num_scored = 0;
    its.prompt_logprobs = {};
    added.keeps_blocks = enable_prefix_caching_ && spec.use_prefix_cache;
    added.num_drafts = its.row.num_speculative_tokens < 0 ? config.num_speculative_tokens
                                                          : its.row.num_speculative_tokens;
    added.max_total_len = static_cast<int32_t>(
        std::min<int64_t>(int64_t{length} + its.row.max_tokens, config.max_model_len));
    its.row.token_ids.reserve(std::min(added.max_total_len, length + kReservedOutputs));
    for (auto& blocks : its.blocks) blocks.reserve(blocks_for(added.max_total_len));
    added.num_cached_tokens = -1;
    its.num_draft_tokens = its.num_accepted_tokens = 0;
    reset_progress(added);
    ++num_requests_;
    if (i == 0) {
      enqueue(slot);
    } else {
      added.state = RequestState::kHeld;
      its.first_sample = slots[0];
      details(slots[0]).held.push_back(slot);
      request(slots[0]).has_held = true;
    }
  }
}

bool Engine::has_request(int32_t slot) const {
  return slot >= 0 && static_cast<size_t>(slot) < requests_.size() &&
         requests_[slot].state != RequestState::kNone;
}

void Engine::end(int32_t slot, RequestEnd reason, std::string_view error, EventBatch& out) {
  emit(request(slot), {}, reason, error, out);
  remove(slot, reason == RequestEnd::kError);
}

// Takes a request out; its last event was emitted. Blocks that an error may have spoilt leave the
// prefix cache.
void Engine::remove(int32_t slot, bool spoilt) {
  Request& ended = request(slot);
  RequestDetails& its = details(slot);
  if (spoilt) {
    for (const auto& blocks : its.blocks) {
      for (const int32_t block : blocks) {
        if (block != 0) pool_.forget(block);
      }
    }
  }
  switch (ended.state) {
    case RequestState::kNone:
      return;
    case RequestState::kHeld:
      std::erase(details(its.first_sample).held, slot);
      request(its.first_sample).has_held = !details(its.first_sample).held.empty();
      break;
    case RequestState::kWaiting:
      waiting_.erase({its.urgency, slot});
      if (its.forked) std::erase(forked_, slot);
      release_blocks(its.blocks);
      break;
    case RequestState::kRunning:
      running_.erase(running_.begin() + static_cast<int64_t>(place_of(its.urgency)));
      leave_row(ended);
      break;
  }
  reset_progress(ended);
  its.grammar.reset();
  ended.state = RequestState::kNone;
  --num_requests_;
  promote_held(ended);
  its.prompt_logprobs = {};
}

void Engine::end_all(RequestEnd reason, std::string_view error, EventBatch& out) {
  for (size_t slot = 0; slot < requests_.size(); ++slot) {
    if (has_request(static_cast<int32_t>(slot)))
      end(static_cast<int32_t>(slot), reason, error, out);
  }
}

// The first sample ended before it had computed the prompt: the next one does.
void Engine::promote_held(Request& first) {
  if (!first.has_held) return;
  first.has_held = false;
  auto& held = details(first).held;
  const int32_t slot = held.front();
  RequestDetails& next = details(slot);
  next.row.num_scored = details(first).row.num_scored;
  next.prompt_logprobs = std::move(details(first).prompt_logprobs);
  next.held.assign(held.begin() + 1, held.end());
  held.clear();
  for (const int32_t other : next.held) details(other).first_sample = slot;
  request(slot).has_held = !next.held.empty();
  next.first_sample = -1;
  enqueue(slot);
}

void Engine::reset_progress(Request& request) {
  RequestDetails& its = details(request);
  pool_.unpin(its.prefix);
  its.prefix = BlockPool::kRoot;
  its.forked = false;
  std::fill(its.num_dropped.begin(), its.num_dropped.end(), 0);
  request.num_kept = 0;
  request.num_computed = request.num_launched = request.num_certain = 0;
  request.capacity = 0;
  request.next_drop = 0;
  request.num_tail = 0;
}

// --- rows and blocks ---------------------------------------------------------------------------

void Engine::append_tail(Request& running) {
  auto& tokens = details(running).row.token_ids;
  tokens.insert(tokens.end(), running.tail, running.tail + running.num_tail);
  running.num_tail = 0;
}

// Gives row and blocks back: the row at once, as steps in flight keep its generation, the blocks
// when no launched step can write them any more.
void Engine::leave_row(Request& running) {
  runner_->free_row(running.handle);
  running.handle = {};
  auto& groups = details(running).blocks;
  if (running.last_step <= retired_) {
    release_blocks(groups);
  } else {
    draining_.push_back({running.last_step, groups});  // the slot keeps its capacity
    for (auto& blocks : groups) blocks.clear();
  }
  reset_progress(running);
}

// The last blocks first, so that a prefix outlives what continues it.
void Engine::release_blocks(std::vector<std::vector<int32_t>>& groups) {
  for (auto& blocks : groups) {
    for (size_t i = blocks.size(); i-- > 0;) {
      if (blocks[i] != 0) pool_.release(blocks[i]);
    }
    blocks.clear();
  }
}

void Engine::release_drained() {
  if (!dropped_.empty()) {
    std::erase_if(dropped_, [&](const Dropped& dropped) {
      if (dropped.last_step > retired_) return false;
      pool_.release(dropped.block);
      return true;
    });
  }
  if (draining_.empty()) return;
  std::erase_if(draining_, [&](Draining& ended) {
    if (ended.last_step > retired_) return false;
    release_blocks(ended.blocks);
    return true;
  });
}

// Blocks that retired steps have filled enter the prefix cache.
void Engine::keep_filled_blocks(Request& running) {
  RequestDetails& its = details(running);
  append_tail(running);
  while (fills_block(running, running.num_computed)) {
    const int32_t index = running.num_kept++;
    its.prefix =
        pool_.descend(its.prefix, its.scope, its.row.token_ids.data() + index * block_size_);
    for (int32_t group = 0; group < num_groups(); ++group) {
      const int32_t block = its.blocks[group][index];
      if (block != 0) pool_.keep(its.prefix, group, block);
    }
  }
}

// Adds what a step has scored; true if the prompt is complete.
bool Engine::keep_scores(Request& running, const PromptScores& scores) {
  RequestDetails& its = details(running);
  check_internal(scores.num_tokens == 0 || scores.position == its.row.num_scored + 1, kWhere,
                 "slot ", running.slot, " has scored its prompt from token ", scores.position,
                 " on, not ", its.row.num_scored + 1);
  auto& all = its.prompt_logprobs.tokens;
  its.prompt_logprobs.num_logprobs = scores.num_logprobs;
  if (all.empty()) {
    all.reserve(static_cast<size_t>(its.row.prompt_len - 1) * (1 + scores.num_logprobs));
  }
  all.insert(all.end(), scores.logprobs.begin(), scores.logprobs.end());
  its.row.num_scored += scores.num_tokens;
  return scores.complete;
}

// The first sample's prompt is in its blocks: the others share them, and wait for rows.
void Engine::fork_held(Request& running) {
  RequestDetails& first = details(running);
  const int32_t count = blocks_for(first.row.prompt_len);
  for (const int32_t slot : first.held) {
    RequestDetails& sample = details(slot);
    sample.first_sample = -1;
    sample.row.num_prompt_logprobs = -1;  // the first sample's are the request's
    request(slot).num_computed = first.row.prompt_len - 1;
    for (int32_t group = 0; group < num_groups(); ++group) {
      sample.blocks[group].assign(first.blocks[group].begin(), first.blocks[group].begin() + count);
      for (const int32_t block : sample.blocks[group]) {
        if (block != 0) pool_.share(block);
      }
      sample.num_dropped[group] = first.num_dropped[group];
    }
    sample.forked = true;
    forked_.push_back(slot);
    enqueue(slot);
  }
  first.held.clear();
  running.has_held = false;
}

// Lets go of blocks that no later query of the row can read. Steps in flight do not read them
// either, but still have them in their tables.
void Engine::drop_below_window(Request& running) {
  RequestDetails& its = details(running);
  running.next_drop = running.max_total_len;
  for (int32_t group = 0; group < num_groups(); ++group) {
    if (windows_[group] == 0) continue;
    int32_t& dropped = its.num_dropped[group];
    const int32_t first = first_block(group, running.num_computed);
    if (first > dropped) {
      for (int32_t index = dropped; index < first; ++index) {
        int32_t& block = its.blocks[group][index];
        if (block != 0) dropped_.push_back({running.last_step, block});
        block = 0;
      }
      runner_->drop_blocks(running.handle, group, dropped, first - dropped);
      dropped = first;
    }
    running.next_drop =
        std::min(running.next_drop, (dropped + 1) * block_size_ + windows_[group] - 1);
  }
}

// --- steps -------------------------------------------------------------------------------------

void Engine::step(EventBatch& out) {
  const bool idle = num_busy_ == 0;
  const size_t events = out.events.size();
  const Launch launched = launch(out);
  if (runner_->cut_step() != 0) finish_cut_step();
  const bool has_launched = launched == Launch::kBatch || launched == Launch::kEmptyBatch;
  if (num_in_flight_ == in_flight_.size() || (!has_launched && num_in_flight_ > 0)) {
    take_in(out);
  } else if ((launched == Launch::kNothing || launched == Launch::kEmptyBatch) && idle &&
             num_requests_ > 0 && out.events.size() == events) {
    end_all(RequestEnd::kError, "[engine] no request could be scheduled", out);
  }
  // Nobody is left to ask for the steps that still run: bring blocks home. Steps that have no
  // requests bring none, and other ranks need not wait for them.
  while (num_requests_ == 0 && num_busy_ > 0) take_in(out);
  if (!unmasked_.empty()) end_unmasked(out);
  release_drained();
}

bool Engine::is_wanted() const {
  return agreement_ != nullptr && agreement_->is_wanted(runner_->communicator()->rank());
}

void Engine::end_ranks(std::string_view reason) noexcept {
  if (agreement_ != nullptr) runner_->communicator()->abort(reason);
}

// False if something went wrong: there is no batch then.
bool Engine::plan(EventBatch& out) {
  try {
    release_drained();
    while (!plan_batch()) {
      take_in(out);
      release_drained();
    }
    touched_ = -1;
    return true;
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& error) {
    fail_touched(error.what(), out);
    end_with_ranks(out);
    batch_.clear();
    planned_.clear();
    return false;
  }
}

// Whether the batch, or an empty one, is to be launched: all ranks launch one, or none does.
Engine::Launch Engine::agree() {
  if (agreement_ == nullptr) return batch_.empty() ? Launch::kNothing : Launch::kBatch;
  if (batch_.empty() && !always_comes_ && !is_wanted()) return Launch::kNothing;
  StepLoad load;
  for (const BatchItem& item : batch_) load.tokens += item.num_tokens;
  load.has_prompts = std::any_of(planned_.begin(), planned_.end(),
                                 [](const Planned& planned) { return !planned.decode; });
  const StepLoads loads = agreement_->agree(runner_->communicator()->rank(), load, [this] {
    return runner_->communicator()->is_aborted();
  });
  in_halves_ = runs_in_halves(runner_->config().two_batch,
                              std::span(loads.ranks).first(static_cast<size_t>(loads.size)));
  if (loads.runs) return batch_.empty() ? Launch::kEmptyBatch : Launch::kBatch;
  runner_->check_ranks();
  return agreement_->is_closed() ? Launch::kClosed : Launch::kNothing;
}

Engine::Launch Engine::launch(EventBatch& out) {
  if (!plan(out) && agreement_ == nullptr) return Launch::kNothing;
  try {
    const Launch agreed = agree();
    if (agreed != Launch::kBatch && agreed != Launch::kEmptyBatch) return agreed;
    InFlight& next = in_flight(num_in_flight_);
    next.step = runner_->execute(batch_, in_halves_);
    next.requests.swap(planned_);
    ++num_in_flight_;
    num_busy_ += !next.requests.empty();
    for (const Planned& planned : next.requests) {
      Request& running = request(planned.slot);
      const bool prefill = running.num_launched < running.prefill_target;
      (prefill ? stats_.prefill_tokens : stats_.decode_tokens) += planned.tokens;
      const int32_t least = planned.least();
      running.num_launched += planned.tokens;
      running.num_certain += least;
      running.last_step = next.step;
    }
    ++stats_.steps;
    return agreed;
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& error) {
    // Others have begun a step that they cannot end without this rank.
    if (agreement_ != nullptr) {
      end_ranks(concat(runner_->communicator()->name(), " cannot launch a step: ", error.what()));
    }
    fail_touched(error.what(), out);
    end_with_ranks(out);
    return Launch::kNothing;
  }
}

// Something went wrong around a launch: the request that was worked on ends, such as one whose
// lists find no memory; the others are planned again. Where it was none, the batch ends, or all if
// there is no batch.
void Engine::fail_touched(std::string_view error, EventBatch& out) {
  if (has_request(touched_)) {
    end(touched_, RequestEnd::kError, error, out);
    return;
  }
  const size_t before = out.events.size();
  for (const Planned& planned : planned_) {
    if (has_request(planned.slot)) end(planned.slot, RequestEnd::kError, error, out);
  }
  if (out.events.size() == before) end_all(RequestEnd::kError, error, out);
}

// Between two steps other threads have used the caches.
void Engine::prefetch(int32_t slot) const {
  const auto* line = reinterpret_cast<const char*>(&requests_[slot]);
  for (size_t i = 0; i < sizeof(Request); i += 64) __builtin_prefetch(line + i, 1);
}

// Asked for together and ahead, the details of all requests that need a block cost one miss.
void Engine::prefetch_details(int32_t slot) const {
  const auto* line = reinterpret_cast<const char*>(details_[slot].get());
  for (size_t i = 0; i < 2 * 64; i += 64) __builtin_prefetch(line + i, 1);
}

// Waits for a step's output.
void Engine::read(const InFlight& step, StepOutput& output) {
  const uint64_t start = thread_cpu_ns();
  runner_->wait_step(step.step);
  stats_.device_wait_cpu_ns += thread_cpu_ns() - start;
  try {
    runner_->result(step.step, output);
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& error) {
    output.error = error.what();
    output.entries.clear();
  }
}

void Engine::take_in(EventBatch& out) {
  InFlight& oldest = in_flight(0);
  if (oldest.is_read) {
    std::swap(output_, oldest.output);
    oldest.is_read = false;
  } else {
    read(oldest, output_);
  }
  first_in_flight_ = (first_in_flight_ + 1) % in_flight_.size();
  --num_in_flight_;
  num_busy_ -= !oldest.requests.empty();
  retired_ = oldest.step;
  for (size_t i = 0; i < oldest.requests.size(); ++i) {
    if (i + 2 * kPrefetch < oldest.requests.size()) {
      prefetch(oldest.requests[i + 2 * kPrefetch].slot);
    }
    if (i + kPrefetch < oldest.requests.size()) {
      const Request& ahead = request(oldest.requests[i + kPrefetch].slot);
      if (fills_block(ahead, ahead.num_computed + 1)) prefetch_details(ahead.slot);
    }
    const Planned& planned = oldest.requests[i];
    // Ended since, perhaps with another request in the slot: nothing for it here.
    const RowHandle handle = request(planned.slot).handle;
    if (handle.row != planned.handle.row || handle.generation != planned.handle.generation) {
      const bool masked = i < output_.entries.size() && output_.entries[i].masked != 0;
      ++(masked ? stats_.masked_results : stats_.dropped_results);
      continue;
    }
    if (!output_.error.empty()) {
      end(planned.slot, RequestEnd::kError, output_.error, out);
      continue;
    }
    try {
      take_in_entry(planned, i, out);
    } catch (const std::bad_alloc&) {
      throw;
    } catch (const std::exception& error) {
      if (has_request(planned.slot)) end(planned.slot, RequestEnd::kError, error.what(), out);
    }
  }
  if (!output_.error.empty()) end_with_ranks(out);
}

// Nothing can be computed any more once the ranks have ended, by the other steps in flight either.
void Engine::end_with_ranks(EventBatch& out) {
  try {
    runner_->check_ranks();
  } catch (const Error& error) {
    end_all(RequestEnd::kError, error.what(), out);
  }
}

// What the step that was read says about one of its entries.
void Engine::take_in_entry(const Planned& planned, size_t index, EventBatch& out) {
  const OutputEntry& entry = output_.entries[index];
  const std::span<const int32_t> tokens = output_.tokens(index);
  const PromptScores* const scores = output_.scores_of(index);
  Request& running = request(planned.slot);
  if (entry.masked != 0) {
    // It ended in no step that was taken in, so the device never got it, or lost it.
    end(planned.slot, RequestEnd::kError, "the device lost the request's row", out);
    return;
  }
  if (scores != nullptr && scores->nan_position >= 0) {
    end(planned.slot, RequestEnd::kError,
        concat("token ", scores->nan_position,
               " of the prompt has no logprob: the logits hold a NaN, or nothing above -inf"),
        out);
    return;
  }
  const RequestEnd reason = end_of(entry.finish_reason);
  if (reason == RequestEnd::kError) {
    end(planned.slot, reason, "the logits hold no token to draw", out);
    return;
  }
  // By what the step was counted with, the bounds were too high or too low.
  const int32_t gained = entry.num_computed - running.num_computed;
  running.num_computed = entry.num_computed;
  running.num_launched += gained - planned.tokens;
  running.num_certain += gained - planned.least();
  if (entry.num_drafts > 0) {
    RequestDetails& its = details(running);
    its.num_draft_tokens += entry.num_drafts;
    its.num_accepted_tokens += entry.num_accepted;
    stats_.draft_tokens += entry.num_drafts;
    stats_.accepted_tokens += entry.num_accepted;
  }
  // First, as accepted drafts may be in a block that is full now.
  for (const int32_t token : tokens) {
    if (running.num_tail == Request::kTail) append_tail(running);
    running.tail[running.num_tail++] = token;
  }
  if (fills_block(running, running.num_computed)) keep_filled_blocks(running);
  if (running.has_held && running.num_computed >= details(running).row.prompt_len) {
    fork_held(running);
  }
  if (has_windows_ && running.num_computed >= running.next_drop && reason == RequestEnd::kNone) {
    drop_below_window(running);
  }
  const bool all_scored = scores != nullptr && keep_scores(running, *scores);
  if (tokens.empty()) return;
  emit(running, tokens, reason, "", out);
  RequestEvent& event = out.events.back();
  event.stop_sequence = entry.stop_sequence;
  const std::span<const TokenLogprob> logprobs = output_.token_logprobs(index);
  event.num_logprobs = static_cast<int32_t>(logprobs.size());
  out.logprobs.insert(out.logprobs.end(), logprobs.begin(), logprobs.end());
  if (all_scored) {
    event.prompt_logprobs = static_cast<int32_t>(out.prompt_logprobs.size());
    out.prompt_logprobs.push_back(std::move(details(running).prompt_logprobs));
    details(running).row.num_prompt_logprobs = -1;  // resumed, it scores nothing again
  }
  if (reason != RequestEnd::kNone) remove(planned.slot, false);
}

void Engine::emit(const Request& request, std::span<const int32_t> tokens, RequestEnd end,
                  std::string_view error, EventBatch& out) {
  RequestEvent event;
  event.slot = request.slot;
  event.end = end;
  event.num_tokens = static_cast<int32_t>(tokens.size());
  event.num_cached_tokens = std::max(0, request.num_cached_tokens);
  if (request.num_drafts > 0) {
    event.num_draft_tokens = details(request).num_draft_tokens;
    event.num_accepted_tokens = details(request).num_accepted_tokens;
  }
  if (end != RequestEnd::kNone) out.ends.push_back(static_cast<int32_t>(out.events.size()));
  if (!error.empty()) {
    event.error = static_cast<int32_t>(out.errors.size());
    out.errors.emplace_back(error);
  }
  out.tokens.insert(out.tokens.end(), tokens.begin(), tokens.end());
  out.events.push_back(event);
}

// --- looking at it -----------------------------------------------------------------------------

EngineStats Engine::stats() const {
  EngineStats stats = stats_;
  stats.running = static_cast<int32_t>(running_.size());
  stats.waiting = num_requests_ - stats.running;
  stats.free_blocks = pool_.free();
  stats.cached_blocks = pool_.cached();
  return stats;
}

void Engine::check_idle() const {
  check_internal(num_requests_ == 0 && num_busy_ == 0 && draining_.empty() && dropped_.empty(),
                 kWhere, "requests are still running");
  check_internal(pool_.free() == pool_.total(), kWhere, pool_.total() - pool_.free(),
                 " blocks leaked");
  check_internal(runner_->free_rows() == runner_->config().max_num_seqs, kWhere, "rows leaked");
  check_invariants();
}

void Engine::check_invariants() const {
  pool_.check_invariants();
  std::vector<int32_t> references(pool_.total() + 1, 0);
  const auto count = [&](const std::vector<std::vector<int32_t>>& groups) {
    for (const auto& blocks : groups) {
      for (const int32_t block : blocks) ++references[block];
    }
  };
  for (const Draining& ended : draining_) count(ended.blocks);
  for (const Dropped& dropped : dropped_) ++references[dropped.block];
  int32_t present = 0, held = 0;
  for (const Request& each : requests_) {
    if (each.slot < 0) continue;
    const RequestDetails& its = details(each);
    present += each.state != RequestState::kNone;
    count(its.blocks);
    for (const auto& blocks : its.blocks) {
      check_internal(blocks.size() == its.blocks[0].size(), kWhere, "slot ", each.slot,
                     " has more blocks in one group than in another");
    }
    const bool runs = each.state == RequestState::kRunning;
    check_internal(runs || its.forked || its.blocks[0].empty(), kWhere, "slot ", each.slot,
                   " holds blocks but neither runs nor waits with a copy");
    check_internal(
        each.num_computed <= std::max(each.num_launched, its.forked ? its.row.prompt_len : 0),
        kWhere, "slot ", each.slot, " has computed more than was launched");
    const auto scored = static_cast<size_t>(its.row.num_scored);
    const auto group = static_cast<size_t>(1 + its.prompt_logprobs.num_logprobs);
    check_internal(each.state == RequestState::kNone || its.row.num_prompt_logprobs < 0 ||
                       its.prompt_logprobs.tokens.size() == scored * group,
                   kWhere, "slot ", each.slot, " has other logprobs than those of ", scored,
                   " tokens of its prompt");
    check_internal(runs == (each.handle.row >= 0), kWhere, "slot ", each.slot,
                   " has a row but does not run, or runs without one");
    check_internal(runs || each.num_tail == 0, kWhere, "slot ", each.slot,
                   " has outputs apart that do not belong there");
    check_internal(
        its.row.token_ids.size() + each.num_tail > static_cast<size_t>(each.num_computed), kWhere,
        "slot ", each.slot, " has computed all tokens that it knows");
    switch (each.state) {
      case RequestState::kNone:
        break;
      case RequestState::kHeld: {
        ++held;
        const auto& siblings = details(its.first_sample).held;
        check_internal(std::count(siblings.begin(), siblings.end(), each.slot) == 1, kWhere,
                       "slot ", each.slot, " is held by nobody");
        break;
      }
      case RequestState::kWaiting:
        check_internal(waiting_.count({its.urgency, each.slot}) == 1, kWhere, "slot ", each.slot,
                       " waits but is not in line");
        break;
      case RequestState::kRunning:
        check_internal(std::count(running_.begin(), running_.end(), each.slot) == 1, kWhere,
                       "slot ", each.slot, " runs but is not listed");
        check_internal(std::min(each.num_launched, each.max_total_len - 1) <= each.capacity &&
                           each.capacity == num_blocks(each) * block_size_,
                       kWhere, "slot ", each.slot, " has launched past its blocks");
        break;
    }
  }
  check_internal(present == num_requests_ &&
                     present == held + static_cast<int32_t>(waiting_.size() + running_.size()),
                 kWhere, "lists of requests disagree");
  check_internal(
      std::is_sorted(running_.begin(), running_.end(),
                     [&](int32_t a, int32_t b) { return details(a).urgency < details(b).urgency; }),
      kWhere, "running requests are out of order");
  check_internal(runner_->free_rows() + static_cast<int32_t>(running_.size()) ==
                     runner_->config().max_num_seqs,
                 kWhere, "rows do not balance");
  for (int32_t block = 1; block <= pool_.total(); ++block) {
    check_internal(references[block] == pool_.references(block), kWhere, "block ", block, " has ",
                   pool_.references(block), " references, ", references[block], " are held");
  }
}

}  // namespace mrv1
