// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/portable.h"

// Arithmetic of the sampler, shared by every backend. It consists of integer operations, single
// IEEE float operations and explicit fmaf only: no product feeds a sum, so a compiler finds nothing
// to contract and host, vector and device code give the same bits.
namespace mrv1 {

// Weights are fixed-point numbers with this many fraction bits: the largest logit weighs 2^43, so
// the sum over 2^20 tokens is at most 2^63. So sums neither round nor wrap, and their order does
// not matter. What is cut off below the last bit is less than 2^20 * 2^-43 = 2^-23 of the largest
// weight, for a whole row: as much as one unit of a float32.
constexpr int32_t kWeightBits = 43;
constexpr uint64_t kMaxWeight = uint64_t{1} << kWeightBits;
constexpr int64_t kMaxSampledVocab = int64_t{1} << 20;
static_assert(kMaxSampledVocab <= int64_t{1} << (63 - kWeightBits));

// Order of logits as integers: larger logit, larger key; -0 and +0 are equal. A NaN is above
// kPlusInfKey or below kMinusInfKey.
constexpr int32_t kPlusInfKey = 0x7f800000;
constexpr int32_t kMinusInfKey = -0x7f800000;

MRV1_HD int32_t logit_key(float logit) {
  const int32_t bits = static_cast<int32_t>(float_to_bits(logit));
  const int32_t sign = bits >> 31;
  return ((bits & 0x7fffffff) ^ sign) - sign;
}

// A logit of this key, which is no NaN's.
MRV1_HD float logit_of_key(int32_t key) {
  return bits_to_float(key < 0 ? static_cast<uint32_t>(-key) | 0x80000000u
                               : static_cast<uint32_t>(key));
}

// Weights are powers of two: exp(d / temperature) = 2^(d * scale), with log2(e) in the scale.
// log2 of a logit's weight relative to a reference that is no smaller, less 1: -1 for the reference
// itself, and down to -inf. The 1 keeps every exponent at or below -1, where floats are at least
// 2^-23 apart; closer together, the rounding of the polynomial below would not keep their order.
// Infinite logits: those equal to the reference get -1, so +inf entries share the mass equally and
// all else weighs nothing.
MRV1_HD float weight_exponent(float logit, float reference, float scale) {
  // A mask instead of a choice: compilers turn the choice into a branch and give up vectorising.
  const uint32_t mask = logit == reference ? 0u : 0xffffffffu;
  const float distance = bits_to_float(float_to_bits(logit - reference) & mask);
  return fmaf(distance, scale, -1.0f);
}

// 2^f for |f| <= 1/2: a polynomial of degree 6 with P(0) = 1, fitted for the least relative error,
// 2^-28.9.
MRV1_HD float exp2_fraction(float f) {
  float power = fmaf(0x1.41fbbcp-13f, f, 0x1.5f3e52p-10f);
  power = fmaf(power, f, 0x1.3b2d4cp-7f);
  power = fmaf(power, f, 0x1.c6aee8p-5f);
  power = fmaf(power, f, 0x1.ebfbdcp-3f);
  power = fmaf(power, f, 0x1.62e43p-1f);
  return fmaf(power, f, 1.0f);
}

// 2^(exponent + 1) as a float with a relative error below 2^-23, for exponents in [-inf, -1]: 1 for
// an exponent of -1; about 2^-47 below -48 and for NaN. Never decreases when the exponent grows
// (checked over all floats). It is 2^n 2^f, n = exponent + 1 rounded to an integer.
MRV1_HD float exp2_float(float exponent) {
  constexpr float kLowest = -48.0f;
  constexpr float kRounder = 12582913.0f;  // 1.5 * 2^23 + 1: adding it rounds to an integer, plus 1
  const float x = exponent > kLowest ? exponent : kLowest;
  const float rounded = x + kRounder;
  const float power = exp2_fraction(x - (rounded - kRounder));
  // The low bits of `rounded` are those of n, which is added to the exponent of the power.
  return bits_to_float(float_to_bits(power) + (float_to_bits(rounded) << 23));
}

// floor(2^43 * exp2_float(exponent)): 2^43 for an exponent of -1; 0 below -44 and for NaN. Never
// decreases when the exponent grows, so that sets cut by weight are cut by logit as well.
MRV1_HD uint64_t fixed_point_exp2(float exponent) {
  const uint32_t bits = float_to_bits(exp2_float(exponent));
  const uint64_t mantissa = (bits & 0x7fffffu) | 0x800000u;
  return (mantissa << (kWeightBits - 23)) >> (127u - (bits >> 23));  // by 0 to 48
}

MRV1_HD uint64_t multiply_high(uint64_t a, uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>((static_cast<Wide>(a) * b) >> 64);
}

// floor(weight * share / 2^43): a weight, or a sum of weights up to 2^53, relative to a reference
// that itself has the weight `share`.
MRV1_HD uint64_t scale_weight(uint64_t weight, uint64_t share) {
  return multiply_high(weight, share) << (64 - kWeightBits) | (weight * share) >> kWeightBits;
}

// ln(total / 2^43) for a total in [2^43, 2^63], the sum of a row's weights: within 2^-40 of it.
// total / 2^43 = 2^k m with m in [1 / sqrt(2), sqrt(2)]; ln m = 2 artanh((m - 1) / (m + 1)).
MRV1_HD double fixed_point_log(uint64_t total) {
  constexpr double kLn2 = 0x1.62e42fefa39efp-1;
  constexpr double kSqrt2 = 0x1.6a09e667f3bcdp+0;
  constexpr int32_t kTerms = 10;
  double m = static_cast<double>(total) * (1.0 / static_cast<double>(kMaxWeight));
  double k = 0.0;
  for (; m > kSqrt2; m *= 0.5) k += 1.0;
  const double s = (m - 1.0) / (m + 1.0);
  const double square = s * s;
  double series = 1.0 / (2 * kTerms + 1);
  for (int32_t term = kTerms - 1; term >= 0; --term) {
    series = fma(series, square, 1.0 / (2 * term + 1));
  }
  return fma(k, kLn2, 2.0 * s * series);
}

// ln of a token's probability at temperature 1, in a row with this largest logit, above -inf, and
// this fixed_point_log of its weights.
MRV1_HD float token_logprob(float logit, float max_logit, double log_total) {
  const double distance =
      logit == max_logit ? 0.0 : static_cast<double>(logit) - static_cast<double>(max_logit);
  return static_cast<float>(distance - log_total);
}

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011).
struct PhiloxBlock {
  uint32_t word[4];
};

MRV1_HD PhiloxBlock philox4x32(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  for (int32_t round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = PhiloxBlock{{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                           static_cast<uint32_t>(product1),
                           static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                           static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The random word of the token at `position` of a request with this seed: the first 64 bits of
// Philox at counter (position, 0, 0, 0).
MRV1_HD uint64_t random_word(uint64_t seed, uint32_t position) {
  const PhiloxBlock block =
      philox4x32(PhiloxBlock{{position, 0, 0, 0}}, static_cast<uint32_t>(seed),
                 static_cast<uint32_t>(seed >> 32));
  return (uint64_t{block.word[1]} << 32) | block.word[0];
}

}  // namespace mrv1
