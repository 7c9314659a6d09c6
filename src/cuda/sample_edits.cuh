// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The processors that change single logits, by a block, in place: bias, min_tokens, penalties, bad
// words. Each changes few logits of a row, so what a row pays is its lists, not its vocabulary. A
// row that reports logprobs, or may have to take min_tokens back, saves what was there before any
// of them (SamplingRow::saved), and gets it back in any order.
#pragma once

#include <cstdint>

#include "block.cuh"
#include "sampling/penalties.h"
#include "sampling/processors.h"

namespace mrv1::cuda {

// Edits the ids of a row from `first` to `end`. Every method is called by all threads of a block of
// kThreads and ends with a barrier.
template <int kThreads>
class RowEditor {
 public:
  // `row` is as long as it is at the place.
  __device__ RowEditor(const RowState& state, const Row& row, const SamplingRow& sampling,
                       int32_t index, int32_t place, float* logits, int32_t first, int32_t end)
      : row_(row),
        sampling_(sampling),
        history_(state.tokens + int64_t{index} * state.max_model_len),
        place_(place),
        logits_(logits),
        first_(first),
        end_(end) {
    if (sampling.saved.count > 0) {
      saved_ = reinterpret_cast<float*>(sampling.words + sampling.saved.offset) +
               int64_t{place} * sampling.saved.count;
    }
  }

  // False if the row has nothing that changes single logits at this place.
  __device__ static bool applies(const Row& row, const SamplingRow& sampling) {
    return LogitBias::applies(row, sampling) || MinTokens::applies(row, sampling) ||
           Penalties::applies(row, sampling) || BadWords::applies(row, sampling);
  }

  __device__ bool can_restore() const { return saved_ != nullptr; }

  // Before the first edit. `edited` is null, or gets a bit for every id that edits name, from the
  // first of the range on; it is in shared memory and zero.
  __device__ __noinline__ void save(uint32_t* edited) {
    each([&](int32_t slot, int32_t id, const auto&) {
      saved_[slot] = logits_[id];
      const int32_t bit = id - first_;
      if (edited != nullptr) atomicOr(&edited[bit / 32], 1u << (bit % 32));
    });
    __syncthreads();
  }

  // Calls visit(id, logit) for every id that edits name, once or more; logits as they are now.
  template <typename Visit>
  __device__ void each_edited(const Visit& visit) {
    each([&](int32_t, int32_t id, const auto&) { visit(id, logits_[id]); });
    __syncthreads();
  }

  // After the last one. What was saved at the scan's length is put back, whichever edits were made.
  __device__ __noinline__ void restore() {
    each([&](int32_t slot, int32_t id, const auto&) { logits_[id] = saved_[slot]; });
    __syncthreads();
  }

  // The stages, in their order.
  __device__ void apply_bias() {
    if (LogitBias::applies(row_, sampling_)) each_bias(change());
    __syncthreads();
  }

  __device__ void mask_stop_ids() {
    if (MinTokens::applies(row_, sampling_)) each_stop_id(change());
    __syncthreads();
  }

  __device__ __noinline__ void apply_all() {
    apply_bias();
    mask_stop_ids();
    apply_penalties_and_bad_words();
  }

  __device__ void apply_penalties_and_bad_words() {
    if (Penalties::applies(row_, sampling_)) each_penalty(change());
    __syncthreads();
    // Several words may ban one id, and make the same of it.
    if (BadWords::applies(row_, sampling_)) each_bad_word(change());
    __syncthreads();
  }

 private:
  // Slots of `saved`: bias, stop ids, penalties (entries, then drafts), bad words.
  __device__ int32_t stop_slots() const { return sampling_.bias.count; }
  __device__ int32_t penalty_slots() const { return stop_slots() + sampling_.stop_ids.count; }
  __device__ int32_t draft_slots() const { return penalty_slots() + sampling_.penalties.count; }
  __device__ int32_t bad_word_slots() const {
    return draft_slots() + (sampling_.penalties.count > 0 ? sampling_.num_speculative_tokens : 0);
  }

  __device__ auto change() {
    return [this](int32_t, int32_t id, const auto& edit) { logits_[id] = edit(logits_[id]); };
  }

  template <typename Visit>
  __device__ void each(const Visit& visit) {
    if (BadWords::applies(row_, sampling_)) each_bad_word(visit);
    if (LogitBias::applies(row_, sampling_)) each_bias(visit);
    if (MinTokens::applies(row_, sampling_)) each_stop_id(visit);
    if (Penalties::applies(row_, sampling_)) each_penalty(visit);
  }

  __device__ bool in_range(int32_t id) const { return id >= first_ && id < end_; }

  // Each calls visit(slot, id, edit) for the ids in the range; edit(logit) is the new logit.
  template <typename Visit>
  __device__ void each_bias(const Visit& visit) {
    for (int32_t i = threadIdx.x; i < sampling_.bias.count; i += kThreads) {
      const int32_t id = LogitBias::id(sampling_, i);
      if (!in_range(id)) continue;
      const float bias = LogitBias::bias(sampling_, i);
      visit(i, id, [=](float logit) { return logit + bias; });
    }
  }

  template <typename Visit>
  __device__ void each_stop_id(const Visit& visit) {
    const int32_t* ids = sampling_.words + sampling_.stop_ids.offset;
    for (int32_t i = threadIdx.x; i < sampling_.stop_ids.count; i += kThreads) {
      if (in_range(ids[i])) visit(stop_slots() + i, ids[i], banned_logit);
    }
  }

  // Tokens of the table, then those drafts before the place that it lacks, each once.
  template <typename Visit>
  __device__ void each_penalty(const Visit& visit) {
    const PenaltyTable table = PenaltyTable::of(sampling_);
    const int32_t count = table.header->num_entries;
    const int32_t total_len = row_.total_len - place_;
    const auto penalise = [&](int32_t slot, int32_t id, uint32_t uses) {
      visit(slot, id, [=, this](float logit) { return penalised_logit(logit, uses, sampling_); });
    };
    for (int32_t at = threadIdx.x; at < count; at += kThreads) {
      const auto [token, uses] = table.entries[at];
      if (!in_range(token)) continue;
      penalise(penalty_slots() + at, token, place_ == 0 ? uses : uses + uses_in_drafts(token));
    }
    static_assert(kMaxSpeculativeTokens <= kThreads);
    const auto i = static_cast<int32_t>(threadIdx.x);
    if (i >= place_) return;
    const int32_t token = history_[total_len + i];
    const bool is_first = draft_uses(history_, total_len, i, token) == 0;
    if (in_range(token) && is_first && table.uses(token) == 0) {
      penalise(draft_slots() + i, token, uses_in_drafts(token));
    }
  }

  __device__ __noinline__ uint32_t uses_in_drafts(int32_t token) const {
    return draft_uses(history_, row_.total_len - place_, place_, token);
  }

  // Only its end tells where a word begins, so that the list has to be walked: by one warp.
  template <typename Visit>
  __device__ void each_bad_word(const Visit& visit) {
    if (threadIdx.x / kWarpSize != kThreads / kWarpSize - 1) return;
    const int32_t* word = sampling_.words + sampling_.bad_words.offset;
    for (int32_t i = 0; i < sampling_.bad_words.count; ++i) {
      const int32_t length = *word++;
      if (i % kWarpSize == static_cast<int32_t>(threadIdx.x) % kWarpSize) {
        const int32_t id = word[length - 1];
        if (in_range(id) && bans_last_token(word, length, history_, row_)) {
          visit(bad_word_slots() + i, id, banned_logit);
        }
      }
      word += length;
    }
  }

  const Row& row_;
  const SamplingRow& sampling_;
  const int32_t* history_;
  int32_t place_;
  float* logits_;
  int32_t first_, end_;
  float* saved_ = nullptr;
};

}  // namespace mrv1::cuda
