// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The processors that change single logits, by a block, in place: bias, min_tokens, penalties, bad
// words. Each changes few logits of a row, so what a row pays is its lists, not its vocabulary. A
// row that reports logprobs, or may have to take min_tokens back, keeps what was there before
// (SamplingRow::saved), and gets it back in the reverse order.
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

  // The stages, in their order.
  __device__ void apply_bias() {
    if (LogitBias::applies(row_, sampling_)) each_bias(change());
    __syncthreads();
  }

  __device__ void mask_stop_ids() {
    if (MinTokens::applies(row_, sampling_)) each_stop_id(change());
    __syncthreads();
  }

  __device__ void apply_penalties_and_bad_words() {
    if (Penalties::applies(row_, sampling_)) {
      each_penalty(change());
      __syncthreads();
    }
    if (BadWords::applies(row_, sampling_)) {
      // Several words may ban one id: all see what was there before any of them.
      if (saved_ != nullptr) {
        each_bad_word([&](int32_t slot, int32_t id, const auto&) { saved_[slot] = logits_[id]; });
        __syncthreads();
      }
      each_bad_word(
          [&](int32_t, int32_t id, const auto& edit) { logits_[id] = edit(logits_[id]); });
    }
    __syncthreads();
  }

  // Takes the stages back, mask_stop_ids() among them if it was called. Needs can_restore().
  __device__ void restore(bool masks_stop_ids) {
    const auto put_back = [&](int32_t slot, int32_t id, const auto&) {
      logits_[id] = saved_[slot];
    };
    if (BadWords::applies(row_, sampling_)) {
      each_bad_word(put_back);
      __syncthreads();
    }
    if (Penalties::applies(row_, sampling_)) {
      each_penalty(put_back);
      __syncthreads();
    }
    if (masks_stop_ids && MinTokens::applies(row_, sampling_)) {
      each_stop_id(put_back);
      __syncthreads();
    }
    if (LogitBias::applies(row_, sampling_)) each_bias(put_back);
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
    return [this](int32_t slot, int32_t id, const auto& edit) {
      const float old = logits_[id];
      if (saved_ != nullptr) saved_[slot] = old;
      logits_[id] = edit(old);
    };
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
    // Several are asked for at a time: most lie outside of the range.
    constexpr int kAtOnce = 4;
    for (int32_t first = threadIdx.x; first < count; first += kAtOnce * kThreads) {
      PenaltyEntry entries[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int32_t at = first + i * kThreads;
        entries[i] = at < count ? table.entries[at] : PenaltyEntry{-1, 0};
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const auto [token, uses] = entries[i];
        if (!in_range(token)) continue;
        penalise(penalty_slots() + first + i * kThreads, token,
                 uses + draft_uses(history_, total_len, place_, token));
      }
    }
    static_assert(kMaxSpeculativeTokens <= kThreads);
    const auto i = static_cast<int32_t>(threadIdx.x);
    if (i >= place_) return;
    const int32_t token = history_[total_len + i];
    const bool is_first = draft_uses(history_, total_len, i, token) == 0;
    if (in_range(token) && is_first && table.uses(token) == 0) {
      penalise(draft_slots() + i, token, draft_uses(history_, total_len, place_, token));
    }
  }

  // Every thread walks the list, as only its end tells where a word begins.
  template <typename Visit>
  __device__ void each_bad_word(const Visit& visit) {
    const int32_t* word = sampling_.words + sampling_.bad_words.offset;
    for (int32_t i = 0; i < sampling_.bad_words.count; ++i) {
      const int32_t length = *word++;
      if (i % kThreads == static_cast<int32_t>(threadIdx.x)) {
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
