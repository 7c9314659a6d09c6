// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// What the next step computes: admission, blocks, preemption.
#include <algorithm>

#include "core/error.h"
#include "engine/engine.h"

namespace mrv1 {
namespace {

// A head of the line that did not fit is looked at again after so many steps at the latest, as the
// prefix cache may hold more of it by then.
constexpr int32_t kBlockedSteps = 64;

}  // namespace

int32_t Engine::first_block(int32_t group, int32_t position) const {
  const int32_t window = windows_[group];
  return window == 0 ? 0 : std::max(0, position - window + 1) / block_size_;
}

// Upper bound of the blocks that a prompt of so many tokens needs besides those that it has.
int32_t Engine::missing_blocks(int32_t tokens, int32_t held) const {
  int32_t missing = 0;
  for (const int32_t window : windows_) {
    int32_t count = std::max(0, blocks_for(tokens) - held);
    if (window > 0) {
      // Blocks below the window come back while the prompt is computed.
      count = std::min(count, blocks_for(window + runner_->config().max_num_batched_tokens) + 1);
    }
    missing += count;
  }
  return missing;
}

int32_t Engine::missing_blocks(const Request& running) const {
  return missing_blocks(running.prefill_target, running.capacity / block_size_);
}

// The running request at or behind this place of the order.
size_t Engine::place_of(const Urgency& urgency) const {
  const auto less = [&](int32_t slot, const Urgency& other) {
    return details(slot).urgency < other;
  };
  return std::lower_bound(running_.begin(), running_.end(), urgency, less) - running_.begin();
}

// Tokens that a decoding request takes in a step: one and places for its drafts, unless those in
// flight will end it.
int32_t Engine::decode_tokens(const Request& running) const {
  const int32_t drafts = drafts_fit_ ? running.num_drafts : 0;
  return running.num_certain < running.max_total_len - 1 ? 1 + drafts : 0;
}

// False if a request must be preempted while steps are in flight: the batch is to be planned again
// when they have been taken in.
//
// A step of a pipeline with P stages waits in its first one for the tokens that its rows drew last,
// so of those that decode it takes none of the P - 1 newest steps' if others can run. With one
// stage all are due. Chunks of prompts wait for nothing.
bool Engine::plan_batch() {
  due_ = micro_batches_ == 1 ? kEverybody : launched_before(micro_batches_ - 1);
  for (;;) {
    if (!plan_due()) return false;
    if (!batch_.empty() || due_ == kEverybody) return true;
    // Those of the longest wait, and if none of them finds blocks, whoever does.
    due_ = due_ < longest_ago_ ? longest_ago_ : kEverybody;
  }
}

// One pass over prompts, decoding requests that are due, and waiting ones, the most urgent first,
// so that whoever lacks blocks takes them from requests that the pass has not come to. False as
// plan_batch().
bool Engine::plan_due() {
  batch_.clear();
  planned_.clear();
  touched_ = -1;
  wants_drain_ = false;
  promised_ = 0;
  drafts_fit_ = true;
  const RunnerConfig& config = runner_->config();
  const int32_t limit = config.max_num_batched_tokens;
  int64_t decode = 0;
  int32_t least = 0;     // of it, one token for each decoding request
  int32_t decoding = 0;  // requests, due or not
  longest_ago_ = kEverybody;
  decode_steps_.clear();
  bool prompts = false;  // that have a row, or could get one
  if (!waiting_.empty()) {
    prompts = static_cast<int32_t>(running_.size()) < config.max_num_seqs ||
              last_yields_to(request(waiting_.begin()->second));
  }
  for (size_t place = 0; place < running_.size(); ++place) {
    if (place + kPrefetch < running_.size()) prefetch(running_[place + kPrefetch]);
    const Request& running = request(running_[place]);
    if (running.num_launched < running.prefill_target) {
      promised_ += missing_blocks(running);
      prompts = true;
    } else if (const int32_t tokens = decode_tokens(running); tokens > 0) {
      longest_ago_ = std::min(longest_ago_, running.last_step);
      ++decoding;
      if (running.last_step > due_) continue;
      decode += tokens;
      ++least;
      if (micro_batches_ > 1) decode_steps_.push_back(running.last_step);
      if (running.num_launched + tokens > running.capacity) prefetch_details(running.slot);
    }
  }
  decodes_due_ = due_;
  ties_ = least;
  const int32_t share = (decoding + micro_batches_ - 1) / micro_batches_;
  if (due_ != kEverybody && least > share) {
    take_share(share, decode);
    least = share;
  }
  // Every decoding request gets its token before any gets drafts, and drafts leave prompts half of
  // what they would have without: a step full of drafts would let them wait until a row ends.
  const int32_t prefill = prompts ? (limit - least + 1) / 2 : 0;
  if (decode > limit - prefill) {
    drafts_fit_ = false;
    decode = least;
  }
  decode_budget_ = static_cast<int32_t>(decode);
  prefill_budget_ = limit - decode_budget_;
  score_budget_ = runner_->prompt_score_bytes();

  bool line_moves = true;
  // Where the head of the line belongs among the running ones; a preempted one belongs at the end.
  const auto place_of_head = [&] {
    return waiting_.empty() ? running_.size() : place_of(waiting_.begin()->first);
  };
  size_t next_admission = place_of_head();
  for (size_t place = 0;; ++place) {
    if (line_moves && place >= std::min(next_admission, running_.size()) && !waiting_.empty()) {
      line_moves = admit(waiting_.begin()->second, place);
      if (wants_drain_) return false;
      next_admission = place_of_head();
    }
    if (place >= running_.size()) return true;
    plan_running(running_[place], place);
    if (wants_drain_) return false;
  }
}

// Of the decoding requests that are due only so many go on, those that wait the longest: micro-
// batches of one size keep all stages busy. Of a step's equals the more urgent ones.
void Engine::take_share(int32_t share, int64_t& decode) {
  std::nth_element(decode_steps_.begin(), decode_steps_.begin() + share - 1, decode_steps_.end());
  decodes_due_ = decode_steps_[share - 1];
  const auto before = [&](uint64_t step) { return step < decodes_due_; };
  ties_ = share -
          static_cast<int32_t>(std::count_if(decode_steps_.begin(), decode_steps_.end(), before));
  decode = 0;
  int32_t ties = ties_;
  for (const int32_t slot : running_) {
    const Request& running = request(slot);
    if (running.num_launched < running.prefill_target) continue;
    const int32_t tokens = decode_tokens(running);
    if (tokens > 0 && in_share(running, ties)) decode += tokens;
  }
}

// Whether a decoding request goes on; `ties` counts those down that may of the last step's.
bool Engine::in_share(const Request& decoding, int32_t& ties) const {
  if (decoding.last_step != decodes_due_) return decoding.last_step < decodes_due_;
  return ties-- > 0;
}

void Engine::plan_running(int32_t slot, size_t place) {
  Request& running = request(slot);
  const bool prefill = running.num_launched < running.prefill_target;
  touched_ = slot;
  int32_t& budget = prefill ? prefill_budget_ : decode_budget_;
  const int32_t wanted =
      prefill ? running.prefill_target - running.num_launched : decode_tokens(running);
  int32_t tokens = std::min(wanted, budget);
  if (prefill) tokens = scorable_tokens(running, tokens);
  if (tokens <= 0 || (!prefill && !in_share(running, ties_))) return;
  tokens = cover(running, tokens, place);
  if (tokens <= 0) return;
  budget -= tokens;
  if (prefill) score_budget_ -= score_bytes(running, tokens);
  const bool draws = running.num_launched + tokens >= running.prefill_target;
  planned_.push_back({slot, tokens, running.handle, !prefill, draws});
  batch_.push_back({running.handle.row, tokens, running.handle.generation});
}

// How many of the request's next tokens the prompt's tokens after them are to be scored from.
int32_t Engine::tokens_to_score(const Request& running, int32_t tokens) const {
  const RowSpec& row = details(running).row;
  if (row.num_prompt_logprobs < 0) return 0;
  const int32_t first = std::max(running.num_launched, row.num_scored);
  const int32_t last = std::min(running.num_launched + tokens, row.prompt_len - 1);
  return std::max(0, last - first);
}

int64_t Engine::score_bytes(const Request& running, int32_t tokens) const {
  const int32_t count = tokens_to_score(running, tokens);
  return count == 0 ? 0 : count * logprob_record_bytes(details(running).row.num_prompt_logprobs);
}

// Of the next tokens of a prompt, as many as the step has room for the logprobs of.
int32_t Engine::scorable_tokens(const Request& running, int32_t tokens) const {
  const int64_t bytes = score_bytes(running, tokens);
  if (bytes <= score_budget_) return tokens;
  const int32_t count = tokens_to_score(running, tokens);
  const int64_t fit = score_budget_ / (bytes / count);
  const int32_t first = std::max(0, details(running).row.num_scored - running.num_launched);
  return first + static_cast<int32_t>(fit);
}

// Gives the request blocks for its next tokens; returns for how many it has them. The last token of
// its length is never computed, whatever may have been launched.
int32_t Engine::cover(Request& running, int32_t tokens, size_t place) {
  const int32_t goal = std::min(running.num_launched + tokens, running.max_total_len - 1);
  if (goal <= running.capacity) return tokens;
  const bool prefill = running.num_launched < running.prefill_target;
  if (prefill) promised_ -= missing_blocks(running);
  RequestDetails& its = details(running);
  const int32_t held = num_blocks(running);
  const int32_t needed = blocks_for(goal);
  while (num_blocks(running) < needed) {
    if (pool_.free() >= num_groups()) {
      for (auto& blocks : its.blocks) blocks.push_back(pool_.take());
      running.capacity += block_size_;
      continue;
    }
    if (running.capacity > running.num_launched) break;  // something can be computed
    if (running_.size() > place + 1) {
      if (!preempt_last()) break;
    } else if (running_.size() > 1 || !give_up_fork()) {
      break;
    }
  }
  if (prefill) promised_ += missing_blocks(running);
  if (num_blocks(running) > held) {
    for (int32_t group = 0; group < num_groups(); ++group) {
      runner_->append_blocks(running.handle, group, std::span(its.blocks[group]).subspan(held),
                             /*distinct=*/true);
    }
  }
  return goal <= running.capacity ? tokens : running.capacity - running.num_launched;
}

// --- admission ---------------------------------------------------------------------------------

// Gives the head of the line a row, at its place among the running ones, if one is free and there
// are blocks for all tokens that it knows, besides what running requests are about to need. Less
// urgent classes make room; nobody else is admitted before it.
bool Engine::admit(int32_t slot, size_t place) {
  Request& head = request(slot);
  if (prefill_budget_ <= 0) return false;
  const bool idle = running_.empty();
  if (slot == blocked_slot_ && !idle && pool_.free() < blocked_need_ &&
      ++blocked_steps_ < kBlockedSteps) {
    return false;
  }
  blocked_slot_ = -1;
  touched_ = slot;
  RequestDetails& its = details(slot);
  head.prefill_target = static_cast<int32_t>(its.row.token_ids.size());
  Hit hit;
  for (;;) {
    const bool alone = running_.empty();
    int32_t needed = 0;
    if (runner_->free_rows() > 0) {
      hit = its.forked ? Hit{} : find_prefix(head);
      needed = blocks_to_admit(head, hit);
      // Every running request may need another block in the next steps. A request that runs alone
      // starts with what there is.
      const int32_t enough = alone ? std::min(needed, hit.from_line + num_groups())
                                   : needed + promised_ + static_cast<int32_t>(running_.size());
      if (pool_.free() >= enough) break;
      needed = enough;
      if (alone) {
        if (give_up_fork()) continue;
        return false;
      }
    }
    if (running_.size() > place && last_yields_to(head) && preempt_last()) continue;
    if (!wants_drain_ && needed > 0) {
      blocked_slot_ = slot;
      blocked_need_ = needed;
      blocked_steps_ = 0;
    }
    return false;
  }
  if (its.forked) {
    own_last_block(head);
  } else {
    take_hit(head, hit);
  }
  place_row(slot, place);
  return true;
}

// The longest prefix that the cache holds in all groups: all blocks of full groups, those that the
// window reaches of the others. The last token is always computed.
Engine::Hit Engine::find_prefix(const Request& head) {
  Hit best;
  if (!head.keeps_blocks) return best;
  const RequestDetails& its = details(head);
  const int32_t* tokens = its.row.token_ids.data();
  int32_t most = (head.prefill_target - 1) / block_size_;
  // Tokens that the prompt's next ones are still to be scored from are computed.
  if (its.row.num_prompt_logprobs >= 0) most = its.row.num_scored / block_size_;
  table_.assign(num_groups(), 0);  // blocks in a row that are there, up to this one
  int32_t prefix = BlockPool::kRoot;
  for (int32_t count = 1; count <= most; ++count, tokens += block_size_) {
    prefix = pool_.find(prefix, its.scope, tokens);
    if (prefix == BlockPool::kNone) break;
    bool hits = true, ends = false;
    for (int32_t group = 0; group < num_groups(); ++group) {
      const bool there = pool_.block_of(prefix, group) != BlockPool::kNone;
      table_[group] = there ? table_[group] + 1 : 0;
      hits &= table_[group] >= count - first_block(group, count * block_size_);
      ends |= !there && windows_[group] == 0;
    }
    if (ends) break;
    if (hits) best = {prefix, count, 0};
  }
  each_block(best, [&](int32_t, int32_t, int32_t block) {
    best.from_line += pool_.references(block) == 0;
  });
  return best;
}

// Calls visit(group, index, block) for the blocks of a hit that a query after it may read.
template <typename Visit>
void Engine::each_block(const Hit& hit, Visit&& visit) const {
  int32_t prefix = hit.prefix;
  for (int32_t index = hit.num_blocks; index-- > 0; prefix = pool_.parent(prefix)) {
    for (int32_t group = 0; group < num_groups(); ++group) {
      if (index < first_block(group, hit.num_blocks * block_size_)) continue;
      visit(group, index, pool_.block_of(prefix, group));
    }
  }
}

// Free blocks that admission takes, or that the known tokens will.
int32_t Engine::blocks_to_admit(const Request& head, const Hit& hit) const {
  if (details(head).forked) return num_groups();  // a copy of the last block
  return missing_blocks(head.prefill_target, hit.num_blocks) + hit.from_line;
}

void Engine::take_hit(Request& head, const Hit& hit) {
  RequestDetails& its = details(head);
  for (int32_t group = 0; group < num_groups(); ++group) {
    its.blocks[group].assign(hit.num_blocks, 0);
    its.num_dropped[group] = first_block(group, hit.num_blocks * block_size_);
  }
  each_block(hit, [&](int32_t group, int32_t index, int32_t block) {
    pool_.share(block);
    its.blocks[group][index] = block;
  });
  pool_.pin(hit.prefix);
  its.prefix = hit.prefix;
  head.num_kept = hit.num_blocks;
  head.num_computed = hit.num_blocks * block_size_;
  stats_.prefix_hit_tokens += head.num_computed;
}

// A further sample computes the last token of the prompt again, for its logits. The block of that
// token is written then, so it must be the sample's own.
void Engine::own_last_block(Request& sample) {
  const bool partial = sample.num_computed % block_size_ > 0;
  copies_.clear();
  for (auto& blocks : details(sample).blocks) {
    const int32_t shared = blocks.back();
    if (pool_.references(shared) == 1 && !pool_.is_cached(shared)) continue;
    blocks.back() = pool_.take();
    if (partial) copies_.push_back({shared, blocks.back()});
    // The copy is in stream order before whatever may overwrite the block.
    pool_.release(shared);
  }
  if (!copies_.empty()) runner_->copy_blocks(copies_);
  details(sample).forked = false;
  std::erase(forked_, sample.slot);
}

void Engine::place_row(int32_t slot, size_t place) {
  Request& head = request(slot);
  RequestDetails& its = details(slot);
  head.num_launched = head.num_certain = head.num_computed;
  head.capacity = num_blocks(head) * block_size_;
  its.row.num_computed = head.num_computed;
  its.row.block_ids = its.blocks;
  head.handle = runner_->add_row(its.row);
  if (head.num_cached_tokens < 0) head.num_cached_tokens = head.num_computed;
  head.last_step = 0;
  waiting_.erase({its.urgency, slot});
  head.state = RequestState::kRunning;
  running_.insert(running_.begin() + static_cast<int64_t>(place), slot);
  promised_ += missing_blocks(head);
}

// --- preemption --------------------------------------------------------------------------------

// Whether the least urgent running request makes room for the head of the line.
bool Engine::last_yields_to(const Request& head) const {
  return !running_.empty() &&
         details(running_.back()).urgency.priority > details(head).urgency.priority;
}

// Sends the least urgent running request back to the line. Its blocks must be free at once and all
// its tokens known, so no step may be in flight.
bool Engine::preempt_last() {
  if (num_in_flight_ > 0) {
    wants_drain_ = true;
    return false;
  }
  const int32_t slot = running_.back();
  Request& victim = request(slot);
  if (victim.num_launched < victim.prefill_target) promised_ -= missing_blocks(victim);
  running_.pop_back();
  append_tail(victim);
  leave_row(victim);
  enqueue(slot);
  ++stats_.preemptions;
  return true;
}

// The least urgent sample that waits with blocks lets go of them. It is a request like any other
// then, and may find its prompt in the prefix cache.
bool Engine::give_up_fork() {
  if (forked_.empty()) return false;
  const auto least = std::max_element(forked_.begin(), forked_.end(), [&](int32_t a, int32_t b) {
    return details(a).urgency < details(b).urgency;
  });
  const int32_t slot = *least;
  forked_.erase(least);
  release_blocks(details(slot).blocks);
  reset_progress(request(slot));
  return true;
}

void Engine::enqueue(int32_t slot) {
  request(slot).state = RequestState::kWaiting;
  waiting_.emplace(details(slot).urgency, slot);
}

}  // namespace mrv1
