// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "sampling/edits_cpu.h"

#include <algorithm>

namespace mrv1 {

void LogitEdits::mask(const uint32_t* mask) {
  static_assert(kSampleBlock % 32 == 0);
  for (int64_t first = 0; first < vocab_; first += kSampleBlock) {
    loops_.mask(logits_ + first, std::min(kSampleBlock, vocab_ - first), mask + first / 32);
  }
}

void LogitEdits::ban(int32_t id) {
  if (id >= 0 && id < vocab_) {
    logits_[id] = banned_logit(logits_[id]);
  }
}

void LogitEdits::apply(GrammarMask, const Row&, const SamplingRow& sampling) {
  mask(sampling.grammar_mask);
}

void LogitEdits::apply(RawLogprobs, const Row& row, const SamplingRow& sampling) {
  raw_ = logits_;
  if (edits_logits(row, sampling)) {
    std::copy(logits_, logits_ + vocab_, scratch_);
    raw_ = scratch_;
  }
}

void LogitEdits::apply(LogitBias, const Row&, const SamplingRow& sampling) {
  for (int32_t i = 0; i < sampling.bias.count; ++i) {
    logits_[LogitBias::id(sampling, i)] += LogitBias::bias(sampling, i);
  }
}

void LogitEdits::apply(AllowedTokens, const Row&, const SamplingRow& sampling) {
  mask(AllowedTokens::mask(sampling));
}

void LogitEdits::apply(MinTokens, const Row&, const SamplingRow& sampling) {
  const int32_t* stop_ids = sampling.words + sampling.stop_ids.offset;
  int64_t survivor = 0;
  while (survivor < vocab_ && !survives_stop_mask(logits_[survivor], static_cast<int32_t>(survivor),
                                                  stop_ids, sampling.stop_ids.count)) {
    ++survivor;
  }
  if (survivor == vocab_) {
    return;
  }
  for (int32_t i = 0; i < sampling.stop_ids.count; ++i) {
    ban(stop_ids[i]);
  }
}

void LogitEdits::apply(Penalties, const Row& row, const SamplingRow& sampling) {
  const PenaltyTable table = PenaltyTable::of(sampling);
  const int32_t total_len = row.total_len - place_;
  for (int32_t i = 0; i < table.header->num_entries; ++i) {
    const PenaltyEntry& entry = table.entries[i];
    const uint32_t uses = entry.uses + draft_uses(history_, total_len, place_, entry.token);
    logits_[entry.token] = penalised_logit(logits_[entry.token], uses, sampling);
  }
  for (int32_t i = 0; i < place_; ++i) {
    const int32_t token = history_[total_len + i];
    const bool is_first = draft_uses(history_, total_len, i, token) == 0;
    if (is_first && table.uses(token) == 0) {
      const uint32_t uses = draft_uses(history_, total_len, place_, token);
      logits_[token] = penalised_logit(logits_[token], uses, sampling);
    }
  }
}

void LogitEdits::apply(BadWords, const Row& row, const SamplingRow& sampling) {
  const int32_t* word = sampling.words + sampling.bad_words.offset;
  for (int32_t i = 0; i < sampling.bad_words.count; ++i) {
    const int32_t length = *word++;
    if (bans_last_token(word, length, history_, row)) {
      ban(word[length - 1]);
    }
    word += length;
  }
}

}  // namespace mrv1
