// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Steps that are cut: the masks of their rows follow from the tokens of the step before, and are
// made while what comes before the draw runs on the device.
#include <algorithm>
#include <exception>
#include <new>

#include "core/error.h"
#include "engine/engine.h"

namespace mrv1 {

// Finishes the newest step. Of the step before, only the output is read: what comes of it waits
// until the device has its work.
void Engine::finish_cut_step() {
  const InFlight& newest = in_flight_[(first_in_flight_ + num_in_flight_ - 1) % kRunAhead];
  read_entries_.assign(runner_->config().max_num_seqs, -1);
  if (num_in_flight_ > 1) {
    read_oldest();
    const InFlight& oldest = in_flight_[first_in_flight_];
    for (size_t i = 0; i < output_.entries.size(); ++i) {
      read_entries_[oldest.requests[i].handle.row] = static_cast<int32_t>(i);
    }
  }
  masked_.clear();
  mask_requests_.clear();
  for (const int32_t item : runner_->masked_items()) ask_for_mask(newest.requests[item]);
  for (size_t i = 0; i < masked_.size(); ++i) mask_requests_[i].tokens = told_[i];
  fill_masks();
  try {
    runner_->finish_step();
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& error) {
    for (const Planned& planned : newest.requests) unmasked_.push_back({planned, error.what()});
  }
}

// Notes that a sample needs a mask, and the tokens that its grammar has not heard of.
void Engine::ask_for_mask(const Planned& planned) {
  const Request& running = request(planned.slot);
  RequestDetails& its = details(planned.slot);
  const int32_t read = read_entries_[planned.handle.row];
  std::span<const int32_t> newest;
  if (read >= 0 && output_.entries[read].generation == planned.handle.generation) {
    // It has ended, so that the device masks it.
    if (output_.entries[read].finish_reason != FinishReason::kNone) return;
    newest = output_.tokens(read);
  }
  if (told_.size() == masked_.size()) told_.emplace_back();
  std::vector<int32_t>& tokens = told_[masked_.size()];
  const std::vector<int32_t>& known = its.row.token_ids;
  // Of what was known before, it lacks the token that was drawn last before a preemption.
  const auto first = static_cast<size_t>(its.row.prompt_len + its.num_told);
  tokens.clear();
  if (first < known.size()) tokens.assign(known.begin() + first, known.end());
  const size_t skipped = first - std::min(first, known.size());
  tokens.insert(tokens.end(), running.tail + skipped, running.tail + running.num_tail);
  tokens.insert(tokens.end(), newest.begin(), newest.end());
  its.num_told += static_cast<int32_t>(tokens.size());
  masked_.push_back(planned);
  mask_requests_.push_back({its.grammar.get(), its.urgency.sample, planned.handle.row});
}

// No step that is on the device draws for a row whose mask is written: the one before was read.
void Engine::fill_masks() {
  if (mask_requests_.empty()) return;
  GrammarMasks& masks = runner_->masks();
  try {
    mask_source_->fill(mask_requests_, masks.all(), masks.num_rows(), masks.words());
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& error) {
    for (MaskRequest& request : mask_requests_) request.error = error.what();
  }
  for (size_t i = 0; i < mask_requests_.size(); ++i) {
    if (mask_requests_[i].error.empty()) continue;
    masks.allow_all(mask_requests_[i].row);  // it draws with the others, for nobody
    unmasked_.push_back({masked_[i], std::move(mask_requests_[i].error)});
  }
}

void Engine::end_unmasked(EventBatch& out) {
  for (const Unmasked& each : unmasked_) {
    const RowHandle handle = request(each.planned.slot).handle;
    if (handle.row != each.planned.handle.row ||
        handle.generation != each.planned.handle.generation) {
      continue;  // it has ended otherwise
    }
    end(each.planned.slot, RequestEnd::kError, each.error, out);
  }
  unmasked_.clear();
}

}  // namespace mrv1
