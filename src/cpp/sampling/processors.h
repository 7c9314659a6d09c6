// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "core/portable.h"
#include "sampling/math.h"
#include "sampling/penalties.h"
#include "state/row_state.h"

// What happens to a row's logits between the model and the token, in this order. Each processor has
// one entry in `Processors`, which gives the order, and one rule here; backends compute the same
// values and sets by whatever means suits them.
//
// "The row" is a row of the table at one place: its history is prompt, then outputs, total_len
// tokens in all. Place j of a row with drafts is the row once j tokens longer, its drafts up to
// there being outputs (row_at_place).
//
//  NaN: where the model gives a NaN anywhere in the row, the token is kErrorToken, whatever masks
//  and edits say of its id. Edits leave a NaN as it is. They leave -inf as it is, too: no edit
//  brings an id back that another one took out. So the two masks may as well be applied first.
//
//  Stage kRaw:
//   grammar            ids without a bit in SamplingRow::grammar_mask become -inf.
//   raw_logprobs       what LogprobRecord says of the token and of candidates is about the logits
//                      as they are now: see sampling/logprobs.h. Nothing below changes it.
//
//  Stage kLogits edits logits:
//   logit_bias         logit + bias for the ids of SamplingRow::bias, one float addition.
//   allowed_token_ids  ids without a bit in SamplingRow::allowed become -inf.
//   min_tokens         while total_len < min_total_len the ids in the row's stop list become -inf.
//                      If that would leave no logit above -inf, the row stays as it is: its stop
//                      tokens are drawn but do not end it, as the stop rule also waits for the
//                      length. Ids outside the vocabulary are left alone.
//   penalties          for each token of the history, by the number of its uses: penalised_logit.
//                      repetition_penalty counts prompt and outputs, presence_penalty and
//                      frequency_penalty outputs alone.
//   bad_words          the last token of a word becomes -inf where the outputs end with the tokens
//                      before it; that of a word of one token always. The prompt does not count.
//
//  Scan: a NaN anywhere, or no logit above -inf, makes the row's token kErrorToken.
//  Greedy rows (temperature not above 0) take the lowest id among the largest logits; +inf is an
//  ordinary largest value and -0 equals +0. The processors below do not apply to them.
//
//  Stage kSet narrows the set of tokens. Tokens are ordered by (logit descending, id ascending).
//   temperature  weight q = 2^43 * exp((logit - max) / temperature), rounded down, an integer: see
//                weight_exponent and fixed_point_exp2. q = 2^43 for the largest logit. Tokens with
//                q = 0 are out. +inf logits share the mass equally. The quotient is a product with
//                float(log2(e) / double(temperature)), which is clamped to the largest float.
//   min_p        keeps q >= ceil(min_p * 2^43).
//   top_k        keeps the first k tokens of what is left; at an edge of equal logits those of
//                lower ids.
//   top_p        keeps the shortest prefix of what is left whose sum of q is at least
//                ceil(top_p * total), total being the sum of what is left. (top_p is read in 2^-63
//                units, rounded down: exact for top_p >= 2^-40.)
//  At least the first token is always kept.
//
//  Draw: total is the sum of q over the kept set and target = floor(random_word * total / 2^64),
//  where the word is keyed by the seed and the position of the new token, which is total_len. The
//  token is the first id, in ascending order, at which the running sum of q over kept tokens
//  exceeds the target.
//
//  Draw from the whole row, where neither min_p nor top_k nor top_p applies: by tiles, so that one
//  read of the logits is enough to weigh a row whose largest logit is not known yet. A tile is
//  kDrawTile consecutive ids, the last one what is left. Its tokens weigh q' relative to the tile's
//  own largest logit, which in turn has the weight W relative to the row's. The tile's mass is
//  scale_weight(sum of q', W). total is the sum of masses and target as above; the tile is the
//  first at which the running sum of masses exceeds the target, and r is the target less the masses
//  before it. The token is the tile's first id at which scale_weight(running sum of q', W) > r.
//
//  Forced tokens (forced_token in sampling/sample.h) take the place of what was drawn.
namespace mrv1 {

enum class ProcessorStage { kRaw, kLogits, kSet };

// The row as it draws the token of a place.
MRV1_HD Row row_at_place(Row row, int32_t place) {
  row.total_len += place;
  return row;
}

struct GrammarMask {
  static constexpr const char* kName = "grammar";
  static constexpr ProcessorStage kStage = ProcessorStage::kRaw;
  MRV1_HD static bool applies(const Row&, const SamplingRow& sampling) {
    return sampling.grammar_mask != nullptr;
  }
};

struct RawLogprobs {
  static constexpr const char* kName = "raw_logprobs";
  static constexpr ProcessorStage kStage = ProcessorStage::kRaw;
  MRV1_HD static bool applies(const Row&, const SamplingRow& sampling) {
    return sampling.num_logprobs >= 0;
  }
  // Candidates of each token.
  MRV1_HD static int32_t count(const SamplingRow& sampling, int64_t vocab_size) {
    return sampling.num_logprobs < vocab_size ? sampling.num_logprobs
                                              : static_cast<int32_t>(vocab_size);
  }
};

struct LogitBias {
  static constexpr const char* kName = "logit_bias";
  static constexpr ProcessorStage kStage = ProcessorStage::kLogits;
  MRV1_HD static bool applies(const Row&, const SamplingRow& sampling) {
    return sampling.bias.count > 0;
  }
  // The i-th of SamplingRow::bias. Biases are finite, so that no sum is a NaN.
  MRV1_HD static int32_t id(const SamplingRow& sampling, int32_t i) {
    return sampling.words[sampling.bias.offset + 2 * i];
  }
  MRV1_HD static float bias(const SamplingRow& sampling, int32_t i) {
    return bits_to_float(static_cast<uint32_t>(sampling.words[sampling.bias.offset + 2 * i + 1]));
  }
};

struct AllowedTokens {
  static constexpr const char* kName = "allowed_token_ids";
  static constexpr ProcessorStage kStage = ProcessorStage::kLogits;
  MRV1_HD static bool applies(const Row&, const SamplingRow& sampling) {
    return sampling.allowed.count > 0;
  }
  MRV1_HD static const uint32_t* mask(const SamplingRow& sampling) {
    return reinterpret_cast<const uint32_t*>(sampling.words + sampling.allowed.offset);
  }
};

struct MinTokens {
  static constexpr const char* kName = "min_tokens";
  static constexpr ProcessorStage kStage = ProcessorStage::kLogits;
  MRV1_HD static bool applies(const Row& row, const SamplingRow& sampling) {
    return row.total_len < row.min_total_len && sampling.stop_ids.count > 0;
  }
};

struct Penalties {
  static constexpr const char* kName = "penalties";
  static constexpr ProcessorStage kStage = ProcessorStage::kLogits;
  MRV1_HD static bool applies(const Row&, const SamplingRow& sampling) {
    return sampling.penalties.count > 0;
  }
};

struct BadWords {
  static constexpr const char* kName = "bad_words";
  static constexpr ProcessorStage kStage = ProcessorStage::kLogits;
  MRV1_HD static bool applies(const Row&, const SamplingRow& sampling) {
    return sampling.bad_words.count > 0;
  }
};

struct Temperature {
  static constexpr const char* kName = "temperature";
  static constexpr ProcessorStage kStage = ProcessorStage::kSet;
  MRV1_HD static bool applies(const Row&, const SamplingRow& sampling) {
    return sampling.temperature > 0.0f;
  }
  // log2(e) / temperature, which makes powers of two of the weights.
  MRV1_HD static float scale(float temperature) {
    constexpr double kLog2E = 0x1.71547652b82fep+0;
    const double scale = kLog2E / static_cast<double>(temperature);
    return scale < static_cast<double>(FLT_MAX) ? static_cast<float>(scale) : FLT_MAX;
  }
  MRV1_HD static float scale(const SamplingRow& sampling) { return scale(sampling.temperature); }
};

struct MinP {
  static constexpr const char* kName = "min_p";
  static constexpr ProcessorStage kStage = ProcessorStage::kSet;
  MRV1_HD static bool applies(const Row& row, const SamplingRow& sampling) {
    return Temperature::applies(row, sampling) && sampling.min_p > 0.0f;
  }
  // The smallest weight that is kept.
  MRV1_HD static uint64_t min_weight(const SamplingRow& sampling) {
    if (sampling.min_p >= 1.0f) {
      return kMaxWeight;
    }
    const double scaled = static_cast<double>(sampling.min_p) * static_cast<double>(kMaxWeight);
    const uint64_t floor = static_cast<uint64_t>(scaled);
    return floor + (static_cast<double>(floor) < scaled ? 1 : 0);
  }
};

struct TopK {
  static constexpr const char* kName = "top_k";
  static constexpr ProcessorStage kStage = ProcessorStage::kSet;
  MRV1_HD static bool applies(const Row& row, const SamplingRow& sampling) {
    return Temperature::applies(row, sampling) && sampling.top_k > 0;
  }
  // What a SamplingRow holds for a top_k that was asked for: 0 for one that keeps everything.
  MRV1_HD static int32_t effective(int32_t top_k, int64_t vocab_size) {
    return top_k < vocab_size ? top_k : 0;
  }
};

struct TopP {
  static constexpr const char* kName = "top_p";
  static constexpr ProcessorStage kStage = ProcessorStage::kSet;
  MRV1_HD static bool applies(const Row& row, const SamplingRow& sampling) {
    return Temperature::applies(row, sampling) && sampling.top_p < 1.0f;
  }
  // The sum of weights that the kept prefix has to reach: ceil(top_p * total), at least 1.
  MRV1_HD static uint64_t target(const SamplingRow& sampling, uint64_t total) {
    const float top_p = sampling.top_p > 0.0f ? sampling.top_p : 0.0f;
    const uint64_t scaled =
        static_cast<uint64_t>(static_cast<double>(top_p) * 9223372036854775808.0);  // 2^63
    const uint64_t low = scaled * total;
    const uint64_t target =
        (multiply_high(scaled, total) << 1) + (low >> 63) + ((low << 1) != 0 ? 1 : 0);
    return target > 0 ? target : 1;
  }
};

template <typename... Processor>
struct ProcessorTable {
  // Calls visit(processor) for each processor, in order.
  template <typename Visit>
  MRV1_HD static void for_each(Visit&& visit) {
    (visit(Processor{}), ...);
  }

  // Runs the processors of a stage that apply to the row: backend.apply(processor, row, sampling).
  // A backend without an overload for one of them does not compile.
  template <ProcessorStage kStage, typename Backend>
  MRV1_HD static void run(const Row& row, const SamplingRow& sampling, Backend& backend) {
    (run_one<kStage, Processor>(row, sampling, backend), ...);
  }

 private:
  template <ProcessorStage kStage, typename P, typename Backend>
  MRV1_HD static void run_one(const Row& row, const SamplingRow& sampling, Backend& backend) {
    if constexpr (P::kStage == kStage) {
      if (P::applies(row, sampling)) {
        backend.apply(P{}, row, sampling);
      }
    }
  }
};

using Processors = ProcessorTable<GrammarMask, RawLogprobs, LogitBias, AllowedTokens, MinTokens,
                                  Penalties, BadWords, Temperature, MinP, TopK, TopP>;

// Whether the logits that are drawn from differ from those that raw logprobs are about.
MRV1_HD bool edits_logits(const Row& row, const SamplingRow& sampling) {
  return LogitBias::applies(row, sampling) || AllowedTokens::applies(row, sampling) ||
         MinTokens::applies(row, sampling) || Penalties::applies(row, sampling) ||
         BadWords::applies(row, sampling);
}

constexpr float kMinusInf = -INFINITY;

// An edited logit that is taken out.
MRV1_HD float banned_logit(float logit) { return logit != logit ? logit : kMinusInf; }

// A logit under a mask of ids: bit id % 32 of word id / 32 is 1 for those that stay.
MRV1_HD bool has_bit(const uint32_t* mask, int32_t id) {
  return (mask[id / 32] >> (id % 32) & 1u) != 0;
}
MRV1_HD float masked_logit(float logit, int32_t id, const uint32_t* mask) {
  return has_bit(mask, id) ? logit : banned_logit(logit);
}

// The logit of a token of the history that has these PenaltyEntry::uses. In vLLM's order:
// repetition (Keskar et al.: "CTRL", 2019), frequency, presence. Penalties are finite, and that of
// repetition is above 0.
MRV1_HD float penalised_logit(float logit, uint32_t uses, const SamplingRow& sampling) {
  const float repetition = sampling.repetition_penalty;
  logit = logit > 0.0f ? logit / repetition : logit * repetition;
  const uint32_t outputs = uses & ~PenaltyEntry::kInPrompt;
  if (outputs > 0) {
    logit = fmaf(-sampling.frequency_penalty, static_cast<float>(outputs), logit);
    logit -= sampling.presence_penalty;
  }
  return logit;
}

// Uses of a token among the drafts before a place: outputs from total_len on of a history that is
// `place` tokens longer.
MRV1_HD uint32_t draft_uses(const int32_t* history, int32_t total_len, int32_t place,
                            int32_t token) {
  uint32_t uses = 0;
  for (int32_t i = 0; i < place; ++i) uses += history[total_len + i] == token ? 1 : 0;
  return uses;
}

// Whether the outputs of a history end with all tokens of a bad word but its last, which is then
// banned.
MRV1_HD bool bans_last_token(const int32_t* word, int32_t length, const int32_t* history,
                             const Row& row) {
  const int32_t start = row.total_len - (length - 1);
  if (start < row.prompt_len) return false;
  for (int32_t i = 0; i < length - 1; ++i) {
    if (history[start + i] != word[i]) return false;
  }
  return true;
}

// The weight rule that the kSet processors agree on for a row.
struct WeightRule {
  float reference;      // whose weight is 2^43; no logit is larger
  float scale;          // Temperature::scale
  uint64_t min_weight;  // at least 1: weights below it count as 0
};

MRV1_HD uint64_t token_weight(float logit, const WeightRule& rule) {
  const uint64_t weight = fixed_point_exp2(weight_exponent(logit, rule.reference, rule.scale));
  return weight >= rule.min_weight ? weight : 0;
}

// Ids of a tile when a token is drawn from the whole row.
constexpr int32_t kDrawTile = 1024;

// True if a token is drawn from the whole row.
MRV1_HD bool draws_whole_row(const Row& row, const SamplingRow& sampling) {
  return !MinP::applies(row, sampling) && !TopK::applies(row, sampling) &&
         !TopP::applies(row, sampling);
}

// End of a prefix of the tokens in (logit descending, id ascending) order, the last one included.
struct SetEdge {
  int32_t key = INT32_MIN;  // logit_key; INT32_MIN keeps everything
  int32_t id = INT32_MAX;   // largest id kept among logits of this key
};

MRV1_HD bool is_kept(float logit, int32_t id, SetEdge edge) {
  const int32_t key = logit_key(logit);
  return key > edge.key || (key == edge.key && id <= edge.id);
}

// True if `id` is a token that min_tokens leaves alive. A row has to hold one before its stop
// tokens may be masked; a search from id 0 finds it within stop_count + 1 live ids.
MRV1_HD bool survives_stop_mask(float logit, int32_t id, const int32_t* stop_ids,
                                int32_t stop_count) {
  return logit_key(logit) > kMinusInfKey && !holds_id(stop_ids, stop_count, id);
}

}  // namespace mrv1
