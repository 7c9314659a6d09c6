// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Steps that are cut: the masks of their rows follow from the tokens of the steps before, and are
// made while what comes before the draw runs on the device.
#include <algorithm>
#include <exception>
#include <new>

#include "core/error.h"
#include "engine/engine.h"

namespace mrv1 {

// Finishes the newest step.
void Engine::finish_cut_step() {
  const InFlight& newest = in_flight(num_in_flight_ - 1);
  const size_t num_read = read_for_masks(newest);
  masked_.clear();
  mask_requests_.clear();
  for (const int32_t item : runner_->masked_items()) {
    ask_for_mask(newest.requests[item], num_read);
  }
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

// Reads the steps in flight up to the last one that draws for a row whose mask is to be written, if
// only for whom the row was before: no step that may still run then reads the mask. What comes of
// them waits until the device has its work. Returns how many they are.
size_t Engine::read_for_masks(const InFlight& cut) {
  const size_t rows = runner_->config().max_num_seqs;
  row_is_masked_.assign(rows, 0);
  for (const int32_t item : runner_->masked_items()) {
    row_is_masked_[cut.requests[item].handle.row] = 1;
  }
  size_t count = num_in_flight_ - 1;
  const auto counts = [&](const Planned& each) {
    return each.draws && row_is_masked_[each.handle.row] != 0;
  };
  while (count > 0 && std::ranges::none_of(in_flight(count - 1).requests, counts)) --count;
  read_entries_.assign(count * rows, -1);
  for (size_t place = 0; place < count; ++place) {
    InFlight& step = in_flight(place);
    if (!step.is_read) read(step, step.output);
    step.is_read = true;
    for (size_t i = 0; i < step.output.entries.size(); ++i) {
      read_entries_[place * rows + step.requests[i].handle.row] = static_cast<int32_t>(i);
    }
  }
  return count;
}

// Notes that a sample needs a mask, and the tokens that its grammar has not heard of.
void Engine::ask_for_mask(const Planned& planned, size_t num_read) {
  const Request& running = request(planned.slot);
  RequestDetails& its = details(planned.slot);
  const size_t rows = runner_->config().max_num_seqs;
  // Its entry in a step that was read, or -1.
  const auto entry_in = [&](size_t place) {
    const int32_t entry = read_entries_[place * rows + planned.handle.row];
    const auto& entries = in_flight(place).output.entries;
    return entry >= 0 && entries[entry].generation == planned.handle.generation ? entry : -1;
  };
  for (size_t place = 0; place < num_read; ++place) {
    const int32_t entry = entry_in(place);
    // It has ended, so that the device masks it.
    if (entry >= 0 && in_flight(place).output.entries[entry].finish_reason != FinishReason::kNone) {
      return;
    }
  }
  if (told_.size() == masked_.size()) told_.emplace_back();
  std::vector<int32_t>& tokens = told_[masked_.size()];
  tokens.clear();
  // What it has heard of may end within any of them, as after a preemption.
  auto heard = static_cast<size_t>(its.row.prompt_len + its.num_told);
  const auto tell = [&](std::span<const int32_t> outputs) {
    const size_t skipped = std::min(heard, outputs.size());
    heard -= skipped;
    tokens.insert(tokens.end(), outputs.begin() + skipped, outputs.end());
  };
  tell(its.row.token_ids);
  tell(std::span(running.tail).first(running.num_tail));
  for (size_t place = 0; place < num_read; ++place) {
    const int32_t entry = entry_in(place);
    if (entry >= 0) tell(in_flight(place).output.tokens(entry));
  }
  its.num_told += static_cast<int32_t>(tokens.size());
  masked_.push_back(planned);
  mask_requests_.push_back({its.grammar.get(), its.urgency.sample, planned.handle.row});
}

// No step that is on the device draws for a row whose mask is written (read_for_masks).
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
