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

// logit -> exponent of its weight, in [-inf, 0]. Infinite logits: those equal to the maximum get 0,
// so +inf entries share the mass equally and all else weighs nothing.
MRV1_HD float weight_exponent(float logit, float max_logit, float inverse_temperature) {
  const float exponent = (logit - max_logit) * inverse_temperature;
  // A mask instead of a choice: compilers turn the choice into a branch and give up vectorising.
  const uint32_t mask = logit == max_logit ? 0u : 0xffffffffu;
  return bits_to_float(float_to_bits(exponent) & mask);
}

// exp(exponent) * 2^43 as an integer, for an exponent <= 0; relative error below 2^-24 plus one
// unit. exp(0) is 2^43 exactly; below about -29.8 and for NaN the result is 0. Never decreases when
// the exponent grows (checked over all floats), so that sets cut by weight are cut by logit as
// well. exp(x) = 2^n (1 + s), n = round(x / ln 2), r = x - n ln 2 in two steps (Cody and Waite), s
// = exp(r) - 1 = r + r^2 P(r) with P of degree 4 fitted for the least relative error of exp(r),
// 2^-28, on |r| <= ln(2) / 2. The sum 1 + s is taken in integers, which keeps 26 bits of it.
MRV1_HD uint64_t fixed_point_exp(float exponent) {
  constexpr float kLowest = -32.0f;        // becomes 0
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kLog2E = 0x1.715476p+0f;
  constexpr float kLn2High = 0x1.62e4p-1f;
  constexpr float kLn2Low = 0x1.7f7d1cp-20f;
  constexpr int32_t kFractionBits = 26;
  const float x = exponent > kLowest ? exponent : kLowest;
  const float rounded = fmaf(x, kLog2E, kRounder);
  const float n = rounded - kRounder;
  const float r = fmaf(n, -kLn2Low, fmaf(n, -kLn2High, x));
  float series = fmaf(0x1.6a23d0p-10f, r, 0x1.123a20p-7f);
  series = fmaf(series, r, 0x1.5558f2p-5f);
  series = fmaf(series, r, 0x1.555492p-3f);
  series = fmaf(series, r, 0x1.fffffcp-2f);
  const float square = r * r;
  const float fraction = fmaf(square, series, r) * static_cast<float>(1 << kFractionBits);
  const uint32_t mantissa =
      static_cast<uint32_t>((1 << kFractionBits) + static_cast<int32_t>(fraction));
  const uint32_t shift = static_cast<uint32_t>(-static_cast<int32_t>(n));  // 0 to 46
  return (uint64_t{mantissa} << (kWeightBits - kFractionBits)) >> shift;
}

MRV1_HD uint64_t multiply_high(uint64_t a, uint64_t b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>((static_cast<Wide>(a) * b) >> 64);
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
