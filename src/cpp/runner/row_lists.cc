// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/row_lists.h"

#include <algorithm>
#include <cmath>

#include "core/dtype.h"
#include "core/error.h"
#include "sampling/penalties.h"
#include "sampling/processors.h"

namespace mrv1 {
namespace {

constexpr const char* kWhere = "add_row";

void check_id(int32_t id, const char* what, int32_t vocab_size) {
  check(id >= 0 && id < vocab_size, kWhere, what, " ", id, " is outside [0, ", vocab_size, ")");
}

void check_sequences(const std::vector<std::vector<int32_t>>& sequences, const char* what,
                     int32_t vocab_size) {
  for (size_t i = 0; i < sequences.size(); ++i) {
    check(!sequences[i].empty(), kWhere, what, "[", i, "] is empty");
    for (const int32_t id : sequences[i]) {
      check(id >= 0 && id < vocab_size, kWhere, what, "[", i, "] holds ", id,
            ", which is outside [0, ", vocab_size, ")");
    }
  }
}

}  // namespace

void check_row_lists(const RowSpec& spec, int32_t vocab_size, int32_t max_logprobs) {
  for (const int32_t id : spec.stop_ids) check_id(id, "stop id", vocab_size);
  check_sequences(spec.stop_sequences, "stop_sequences", vocab_size);
  check_sequences(spec.bad_words, "bad_words", vocab_size);
  check(std::isfinite(spec.presence_penalty), kWhere, "presence_penalty ", spec.presence_penalty,
        " must be finite");
  check(std::isfinite(spec.frequency_penalty), kWhere, "frequency_penalty ", spec.frequency_penalty,
        " must be finite");
  check(std::isfinite(spec.repetition_penalty) && spec.repetition_penalty > 0.0f, kWhere,
        "repetition_penalty ", spec.repetition_penalty, " must be finite and positive");
  std::vector<int32_t> ids;
  for (const auto& [id, bias] : spec.logit_bias) {
    check_id(id, "logit_bias of token id", vocab_size);
    check(std::isfinite(bias), kWhere, "logit_bias of token id ", id, " is ", bias,
          ", must be finite");
    ids.push_back(id);
  }
  std::sort(ids.begin(), ids.end());
  const auto twice = std::adjacent_find(ids.begin(), ids.end());
  if (twice != ids.end()) {
    fail(ErrorKind::kInvalidArgument, kWhere, "logit_bias names token id ", *twice, " twice");
  }
  for (const int32_t id : spec.allowed_token_ids) check_id(id, "allowed token id", vocab_size);
  check(spec.num_logprobs >= -1 && spec.num_logprobs <= max_logprobs, kWhere, "num_logprobs ",
        spec.num_logprobs, " is outside [-1, ", max_logprobs,
        "], the most that the runner was made for (max_logprobs)");
}

SamplingRow plain_sampling_row(const RowSpec& spec, int32_t vocab_size,
                               int32_t num_speculative_tokens) {
  SamplingRow sampling;
  sampling.temperature = spec.temperature;
  sampling.top_p = spec.top_p;
  sampling.min_p = spec.min_p;
  sampling.top_k = TopK::effective(spec.top_k, vocab_size);
  sampling.seed = spec.seed;
  sampling.presence_penalty = spec.presence_penalty;
  sampling.frequency_penalty = spec.frequency_penalty;
  sampling.repetition_penalty = spec.repetition_penalty;
  sampling.num_logprobs = spec.num_logprobs;
  sampling.num_speculative_tokens = num_speculative_tokens;
  const auto forced = static_cast<int32_t>(spec.forced_token_ids.size());
  sampling.forced_end = forced > 0 ? spec.prompt_len + forced : 0;
  return sampling;
}

WordList RowLists::add_ascending(const std::vector<int32_t>& ids) {
  const auto offset = static_cast<int32_t>(words.size());
  words.insert(words.end(), ids.begin(), ids.end());
  std::sort(words.begin() + offset, words.end());
  words.erase(std::unique(words.begin() + offset, words.end()), words.end());
  return {offset, static_cast<int32_t>(words.size()) - offset};
}

WordList RowLists::add_sequences(const std::vector<std::vector<int32_t>>& sequences) {
  const WordList list{static_cast<int32_t>(words.size()), static_cast<int32_t>(sequences.size())};
  for (const std::vector<int32_t>& sequence : sequences) {
    words.push_back(static_cast<int32_t>(sequence.size()));
    words.insert(words.end(), sequence.begin(), sequence.end());
  }
  return list;
}

void RowLists::build(const RowSpec& spec, int32_t vocab_size, int32_t max_total_len,
                     SamplingRow& sampling) {
  words.clear();
  sampling.stop_ids = add_ascending(spec.stop_ids);
  sampling.stop_sequences = add_sequences(spec.stop_sequences);
  sampling.bad_words = add_sequences(spec.bad_words);
  sampling.bias = {static_cast<int32_t>(words.size()),
                   static_cast<int32_t>(spec.logit_bias.size())};
  for (const auto& [id, bias] : spec.logit_bias) {
    words.push_back(id);
    words.push_back(static_cast<int32_t>(float_to_bits(bias)));
  }
  const auto align = [&] { words.resize((words.size() + 3) / 4 * 4); };
  align();
  sampling.allowed = {static_cast<int32_t>(words.size()), 0};
  if (!spec.allowed_token_ids.empty()) {
    sampling.allowed.count = (vocab_size + 31) / 32;
    words.resize(words.size() + sampling.allowed.count);
    for (const int32_t id : spec.allowed_token_ids) {
      words[sampling.allowed.offset + id / 32] |= static_cast<int32_t>(1u << (id % 32));
    }
    align();
  }
  zeros_offset = num_zeros = 0;
  num_words = static_cast<int64_t>(words.size());
  sampling.penalties = {static_cast<int32_t>(words.size()), 0};
  if (sampling.presence_penalty != 0.0f || sampling.frequency_penalty != 0.0f ||
      sampling.repetition_penalty != 1.0f) {
    const int32_t capacity = std::min(max_total_len, vocab_size);
    sampling.penalties.count = capacity;
    PenaltyTableHeader header{};
    header.index_mask = static_cast<int32_t>(penalty_index_words(capacity) - 1);
    const auto* header_words = reinterpret_cast<const int32_t*>(&header);
    words.insert(words.end(), header_words, header_words + kPenaltyHeaderWords);
    zeros_offset = sampling.penalties.offset + penalty_index_offset(capacity);
    num_zeros = penalty_index_words(capacity);
    num_words = zeros_offset + num_zeros;
  }
  // Drafts may be tokens that the table does not have.
  const int64_t penalised = sampling.penalties.count > 0 ? int64_t{sampling.penalties.count} +
                                                               sampling.num_speculative_tokens
                                                         : 0;
  const bool masks_stops = spec.min_tokens > 0 && sampling.stop_ids.count > 0;
  const int64_t edits = sampling.bias.count + penalised + sampling.bad_words.count;
  if (masks_stops || (edits > 0 && sampling.num_logprobs >= 0)) {
    const int64_t count = edits + sampling.stop_ids.count;
    sampling.saved = {static_cast<int32_t>(num_words), static_cast<int32_t>(count)};
    num_words += count * (1 + int64_t{sampling.num_speculative_tokens});
  }
  check(num_words < (int64_t{1} << 31), kWhere, "the lists of the request need ", num_words,
        " words, fewer than 2**31 are allowed");
}

}  // namespace mrv1
