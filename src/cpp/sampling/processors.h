// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cfloat>
#include <cstdint>

#include "core/portable.h"
#include "sampling/math.h"
#include "state/row_state.h"

// What happens to a row's logits between the model and the token, in this order. Each processor has
// one entry in `Processors`, which gives the order, and one rule here; backends compute the same
// sets by whatever means suits them.
//
//  Stage kLogits edits logits:
//   min_tokens   applies while total_len < min_total_len. Every id in the row's stop list becomes
//                -inf. If that would leave no logit above -inf, the row stays as it is: its stop
//                tokens are drawn but do not end it, as the stop rule also waits for the length.
//                Ids outside the vocabulary and NaN logits are left alone.
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
//  where the word is keyed by the seed and the position of the new token. The token is the first
//  id, in ascending order, at which the running sum of q over kept tokens exceeds the target.
//
//  Draw from the whole row, where neither min_p nor top_k nor top_p applies: by tiles, so that one
//  read of the logits is enough to weigh a row whose largest logit is not known yet. A tile is
//  kDrawTile consecutive ids, the last one what is left. Its tokens weigh q' relative to the tile's
//  own largest logit, which in turn has the weight W relative to the row's. The tile's mass is
//  scale_weight(sum of q', W). total is the sum of masses and target as above; the tile is the
//  first at which the running sum of masses exceeds the target, and r is the target less the masses
//  before it. The token is the tile's first id at which scale_weight(running sum of q', W) > r.
namespace mrv1 {

enum class ProcessorStage { kLogits, kSet };

struct MinTokens {
  static constexpr const char* kName = "min_tokens";
  static constexpr ProcessorStage kStage = ProcessorStage::kLogits;
  MRV1_HD static bool applies(const Row& row, const SamplingRow& sampling) {
    return row.total_len < row.min_total_len && sampling.stop_ids.count > 0;
  }
};

struct Temperature {
  static constexpr const char* kName = "temperature";
  static constexpr ProcessorStage kStage = ProcessorStage::kSet;
  MRV1_HD static bool applies(const Row&, const SamplingRow& sampling) {
    return sampling.temperature > 0.0f;
  }
  // log2(e) / temperature, which makes powers of two of the weights.
  MRV1_HD static float scale(const SamplingRow& sampling) {
    constexpr double kLog2E = 0x1.71547652b82fep+0;
    const double scale = kLog2E / static_cast<double>(sampling.temperature);
    return scale < static_cast<double>(FLT_MAX) ? static_cast<float>(scale) : FLT_MAX;
  }
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

using Processors = ProcessorTable<MinTokens, Temperature, MinP, TopK, TopP>;

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
  if (logit_key(logit) <= kMinusInfKey) {
    return false;
  }
  for (int32_t i = 0; i < stop_count; ++i) {
    if (stop_ids[i] == id) {
      return false;
    }
  }
  return true;
}

}  // namespace mrv1
