// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "ops/cpu_isa.h"
#include "sampling/math.h"
#include "sampling/processors.h"
#include "sampling/sample_loops.h"

namespace mrv1 {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<CpuIsa> vector_isas() {
  std::vector<CpuIsa> isas;
  for (CpuIsa isa : {CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAvx512Bf16, CpuIsa::kAmxBf16}) {
    if (isa <= detect_cpu_isa()) {
      isas.push_back(isa);
    }
  }
  return isas;
}

// Every second row has special values in it; the others spread over the weights' whole range.
std::vector<float> awkward_logits(std::mt19937& random, int64_t count) {
  const float specials[] = {0.0f, -0.0f, 1e-45f, -1e-45f, 3.4028235e38f, -3.4028235e38f,
                            kInf, -kInf, NAN,    -NAN,    31.9f,         -31.9f};
  std::normal_distribution<float> normal(0.0f, 6.0f);
  std::vector<float> logits(static_cast<size_t>(count));
  const bool special = random() % 2 == 0;
  for (float& logit : logits) {
    logit =
        special && random() % 4 == 0 ? specials[random() % std::size(specials)] : normal(random);
  }
  return logits;
}

TEST_CASE("philox gives the known answers of its authors") {
  const PhiloxBlock zeros = philox4x32(PhiloxBlock{{0, 0, 0, 0}}, 0, 0);
  CHECK(zeros.word[0] == 0x6627e8d5u);
  CHECK(zeros.word[1] == 0xe169c58du);
  CHECK(zeros.word[2] == 0xbc57ac4cu);
  CHECK(zeros.word[3] == 0x9b00dbd8u);
  const uint32_t ones = 0xffffffffu;
  const PhiloxBlock full = philox4x32(PhiloxBlock{{ones, ones, ones, ones}}, ones, ones);
  CHECK(full.word[0] == 0x408f276du);
  CHECK(full.word[1] == 0x41c83b0eu);
  CHECK(full.word[2] == 0xa20bc7c6u);
  CHECK(full.word[3] == 0x6d5451fdu);
  const PhiloxBlock digits_of_pi = philox4x32(
      PhiloxBlock{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}, 0xa4093822u, 0x299f31d0u);
  CHECK(digits_of_pi.word[0] == 0xd16cfe09u);
  CHECK(digits_of_pi.word[1] == 0x94fdccebu);
  CHECK(digits_of_pi.word[2] == 0x5001e420u);
  CHECK(digits_of_pi.word[3] == 0x24126ea1u);
  CHECK(random_word(0, 0) == 0xe169c58d6627e8d5u);
  CHECK(random_word(1, 0) != random_word(0, 1));
}

TEST_CASE("fixed_point_exp2 is a power of two, and exact at its ends") {
  CHECK(fixed_point_exp2(-1.0f) == kMaxWeight);
  CHECK(fixed_point_exp2(-2.0f) == kMaxWeight / 2);
  CHECK(fixed_point_exp2(-44.0f) == 1);
  CHECK(fixed_point_exp2(-44.1f) == 0);
  CHECK(fixed_point_exp2(-3.4028235e38f) == 0);
  CHECK(fixed_point_exp2(-kInf) == 0);
  CHECK(fixed_point_exp2(NAN) == 0);
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(-46.0f, -1.0f);
  double worst = 0.0;
  for (int i = 0; i < 200000; ++i) {
    const float exponent = uniform(random);
    const double exact = std::exp2(static_cast<double>(exponent) + 1 + kWeightBits);
    const double error = std::fabs(static_cast<double>(fixed_point_exp2(exponent)) - exact);
    worst = std::max(worst, (error - 1.0) / exact);
  }
  CHECK(worst < std::ldexp(1.0, -23));
}

TEST_CASE("weight_exponent is -1 for the reference, infinite ones included") {
  for (const float logit : {0.0f, -0.0f, 7.5f, -3.4028235e38f, kInf, -kInf}) {
    CHECK(weight_exponent(logit, logit, 1.4f) == -1.0f);
    CHECK(weight_exponent(logit, logit, 3.4028235e38f) == -1.0f);
  }
  CHECK(weight_exponent(-0.0f, 0.0f, 1.0f) == -1.0f);
  CHECK(weight_exponent(3.0f, kInf, 1.0f) == -kInf);
  CHECK(weight_exponent(-kInf, 3.0f, 1.0f) == -kInf);
  CHECK(weight_exponent(-3.4028235e38f, 3.4028235e38f, 1e-30f) == -kInf);
  CHECK(weight_exponent(2.0f, 4.0f, 3.0f) == -7.0f);
}

// Every float from -1 to -49, in the vectorised loop: sets cut by weight must be prefixes of the
// logits' order. weight_exponent rounds once, so it keeps the logits' order itself.
TEST_CASE("fixed_point_exp2 never decreases") {
  const SampleLoops& loops = sample_loops(detect_cpu_isa());
  const WeightRule rule = {0.0f, 1.0f, 1};
  std::vector<float> logits(kSampleBlock);
  std::vector<uint64_t> weights(kSampleBlock);
  uint64_t previous = kMaxWeight;
  bool ordered = true;
  bool exact = true;
  // A build for another processor has only the slow portable loop: it samples the range.
  const uint32_t step = detect_cpu_isa() == CpuIsa::kPortable ? 64 : 1;
  for (uint32_t bits = float_to_bits(-1.0f); bits < float_to_bits(-49.0f);
       bits += kSampleBlock * step) {
    for (uint32_t i = 0; i < kSampleBlock; ++i) {
      const float exponent = bits_to_float(bits + i);
      logits[i] = exponent + 1.0f;
      exact &= weight_exponent(logits[i], 0.0f, 1.0f) == exponent;
    }
    loops.weights(logits.data(), kSampleBlock, rule, weights.data());
    for (uint64_t weight : weights) {
      ordered &= weight <= previous;
      previous = weight;
    }
  }
  CHECK(exact);
  CHECK(ordered);
  CHECK(previous == 0);
}

TEST_CASE("scale_weight is the product's upper part") {
  CHECK(scale_weight(kMaxWeight, kMaxWeight) == kMaxWeight);
  CHECK(scale_weight(uint64_t{1} << 53, kMaxWeight) == uint64_t{1} << 53);
  CHECK(scale_weight(uint64_t{1} << 53, 1) == 1024);
  CHECK(scale_weight(kMaxWeight - 1, 1) == 0);
  CHECK(scale_weight(0, kMaxWeight) == 0);
  std::mt19937_64 random(4);
  for (int i = 0; i < 100000; ++i) {
    const uint64_t weight = random() >> (11 + random() % 50);
    const uint64_t share = random() >> (21 + random() % 40);
    __extension__ using Wide = unsigned __int128;
    REQUIRE(scale_weight(weight, share) ==
            static_cast<uint64_t>((static_cast<Wide>(weight) * share) >> kWeightBits));
  }
}

TEST_CASE("fixed_point_log is the logarithm") {
  CHECK(fixed_point_log(kMaxWeight) == 0.0);
  const auto error = [](uint64_t total) {
    const long double exact = std::log(static_cast<long double>(total)) - 43 * std::log(2.0L);
    // Near 1 the difference above would lose digits.
    const long double near = std::log1p(static_cast<long double>(total - kMaxWeight) /
                                        static_cast<long double>(kMaxWeight));
    const long double expected = total < kMaxWeight * 2 ? near : exact;
    return std::fabs(static_cast<double>((fixed_point_log(total) - expected) / expected));
  };
  double worst = 0.0;
  for (uint64_t total = kMaxWeight + 1; total < kMaxWeight + 1000; ++total) {
    worst = std::max(worst, error(total));
  }
  std::mt19937_64 random(5);
  for (int i = 0; i < 200000; ++i) {
    worst = std::max(worst, error(kMaxWeight + 1 + (random() >> (1 + random() % 60))));
  }
  worst = std::max(worst, error(uint64_t{1} << 63));
  CHECK(worst < std::ldexp(1.0, -44));
}

TEST_CASE("token_logprob of infinite logits") {
  CHECK(token_logprob(kInf, kInf, 0.5) == -0.5f);
  CHECK(token_logprob(3.0f, kInf, 0.5) == -kInf);
  CHECK(token_logprob(-kInf, 3.0f, 0.5) == -kInf);
  CHECK(token_logprob(1.0f, 3.0f, 0.5) == -2.5f);
}

TEST_CASE("logit_key orders floats and finds NaN") {
  CHECK(logit_key(0.0f) == logit_key(-0.0f));
  CHECK(logit_key(kInf) == kPlusInfKey);
  CHECK(logit_key(-kInf) == kMinusInfKey);
  CHECK(logit_key(NAN) > kPlusInfKey);
  CHECK(logit_key(-NAN) < kMinusInfKey);
  std::mt19937 random(2);
  for (int i = 0; i < 200000; ++i) {
    const float a = bits_to_float(static_cast<uint32_t>(random()));
    const float b = i % 8 == 0 ? a : bits_to_float(static_cast<uint32_t>(random()));
    if (a != a || b != b) {
      continue;
    }
    REQUIRE((logit_key(a) < logit_key(b)) == (a < b));
    REQUIRE((logit_key(a) == logit_key(b)) == (a == b));
  }
}

TEST_CASE("vectorised loops give the bits of the portable ones") {
  const SampleLoops& portable = sample_loops(CpuIsa::kPortable);
  std::mt19937 random(3);
  for (CpuIsa isa : vector_isas()) {
    CAPTURE(cpu_isa_name(isa));
    const SampleLoops& loops = sample_loops(isa);
    for (int round = 0; round < 400; ++round) {
      const int64_t count = 1 + static_cast<int64_t>(random() % kSampleBlock);
      const std::vector<float> logits = awkward_logits(random, count);
      const float* data = logits.data();
      WeightRule rule;
      rule.reference = round % 5 == 0 ? kInf : -kInf;
      for (float logit : logits) {
        rule.reference = logit > rule.reference ? logit : rule.reference;
      }
      const float scales[] = {1.442695f, 1.0f / 0.7f, 0.01f, 3.4028235e38f, 0.0f};
      rule.scale = scales[random() % std::size(scales)];
      rule.min_weight = round % 2 == 0 ? 1 : kMaxWeight >> (random() % 40);
      const SetEdge edge = {logit_key(logits[random() % logits.size()]),
                            static_cast<int32_t>(1000 + random() % kSampleBlock)};

      const KeyRange expected_range = portable.key_range(data, count);
      const KeyRange range = loops.key_range(data, count);
      REQUIRE(range.low == expected_range.low);
      REQUIRE(range.high == expected_range.high);
      std::vector<uint64_t> expected(kSampleBlock), weights(kSampleBlock);
      std::vector<int32_t> expected_classes(kSampleBlock), classes(kSampleBlock);
      portable.weights(data, count, rule, expected.data());
      loops.weights(data, count, rule, weights.data());
      REQUIRE(weights == expected);
      portable.classify(data, count, rule, expected.data(), expected_classes.data());
      loops.classify(data, count, rule, weights.data(), classes.data());
      REQUIRE(weights == expected);
      REQUIRE(classes == expected_classes);
      REQUIRE(loops.weight_sum(data, count, rule) == portable.weight_sum(data, count, rule));
      const int32_t key = edge.key;
      REQUIRE(loops.count_above(data, count, key) == portable.count_above(data, count, key));
      std::vector<uint32_t> mask(kSampleBlock / 32);
      for (uint32_t& word : mask) {
        word = random() % 3 == 0 ? 0xffffffffu : static_cast<uint32_t>(random());
      }
      std::vector<float> masked = logits;
      loops.mask(masked.data(), count, mask.data());
      for (int64_t i = 0; i < count; ++i) {
        const float expected = masked_logit(logits[i], static_cast<int32_t>(i), mask.data());
        REQUIRE(float_to_bits(masked[i]) == float_to_bits(expected));
      }
      REQUIRE(loops.kept_sum(data, count, 1000, rule, edge) ==
              portable.kept_sum(data, count, 1000, rule, edge));
    }
  }
}

TEST_CASE("masks and bans leave a NaN") {
  const uint32_t mask[] = {0x80000001u, 0x2u};
  CHECK(has_bit(mask, 0));
  CHECK(!has_bit(mask, 1));
  CHECK(has_bit(mask, 31));
  CHECK(!has_bit(mask, 32));
  CHECK(has_bit(mask, 33));
  CHECK(masked_logit(2.0f, 31, mask) == 2.0f);
  CHECK(masked_logit(2.0f, 32, mask) == -kInf);
  CHECK(masked_logit(kInf, 32, mask) == -kInf);
  CHECK(std::isnan(masked_logit(NAN, 32, mask)));
  CHECK(std::isnan(banned_logit(-NAN)));
}

TEST_CASE("penalties apply in order, to outputs or to all uses") {
  SamplingRow sampling = {};
  sampling.repetition_penalty = 2.0f;
  sampling.frequency_penalty = 0.25f;
  sampling.presence_penalty = 0.5f;
  CHECK(penalised_logit(4.0f, PenaltyEntry::kInPrompt, sampling) == 2.0f);
  CHECK(penalised_logit(4.0f, PenaltyEntry::kInPrompt | 3, sampling) == 0.75f);
  CHECK(penalised_logit(4.0f, 1, sampling) == 1.25f);
  CHECK(penalised_logit(-4.0f, 1, sampling) == -8.75f);
  CHECK(penalised_logit(-kInf, 7, sampling) == -kInf);
  CHECK(penalised_logit(kInf, 7, sampling) == kInf);
  CHECK(std::isnan(penalised_logit(NAN, 7, sampling)));
  CHECK(draft_uses(std::vector<int32_t>{5, 6, 7, 6, 6}.data(), 2, 3, 6) == 2);
}

TEST_CASE("a bad word bans its last token after the others, among outputs") {
  const int32_t history[] = {1, 2, 3, 4};
  Row row = {};
  row.prompt_len = 2;
  row.total_len = 4;
  const auto bans = [&](std::vector<int32_t> word) {
    return bans_last_token(word.data(), static_cast<int32_t>(word.size()), history, row);
  };
  CHECK(bans({9}));
  CHECK(bans({4, 9}));
  CHECK(bans({3, 4, 9}));
  CHECK(!bans({3, 9}));
  CHECK(!bans({2, 3, 4, 9}));
  CHECK(!bans({0, 1, 2, 3, 4, 9}));
  row.total_len = row.prompt_len;
  CHECK(bans({9}));
  CHECK(!bans({2, 9}));
}

TEST_CASE("a penalty table finds every token, when it is full and where hashes meet") {
  for (const int32_t capacity : {1, 2, 3, 100, 1000}) {
    std::vector<int32_t> words(static_cast<size_t>(penalty_table_words(capacity)) + 4);
    SamplingRow sampling = {};
    sampling.words = words.data();
    sampling.penalties = {4, capacity};
    const PenaltyTable table = PenaltyTable::of(sampling);
    table.header->index_mask = static_cast<int32_t>(penalty_index_words(capacity)) - 1;
    CHECK(table.header->index_mask >= 2 * capacity - 1);
    std::mt19937 random(6);
    std::vector<int32_t> tokens;
    while (static_cast<int32_t>(tokens.size()) < capacity) {
      const int32_t token = static_cast<int32_t>(random() % 200000);
      const int32_t place = table.find(token);
      if (table.index[place] != 0) {
        continue;
      }
      const auto number = static_cast<int32_t>(tokens.size());
      table.entries[number] = {token, more_uses(0, number % 2 == 0)};
      table.index[place] = number + 1;
      tokens.push_back(token);
    }
    for (int32_t i = 0; i < capacity; ++i) {
      CHECK(table.uses(tokens[i]) == (i % 2 == 0 ? PenaltyEntry::kInPrompt : 1u));
    }
    CHECK(table.uses(200001) == 0);
    CHECK(more_uses(PenaltyEntry::kInPrompt | 4, false) == (PenaltyEntry::kInPrompt | 5));
    CHECK(more_uses(PenaltyEntry::kInPrompt, true) == PenaltyEntry::kInPrompt);
  }
}

TEST_CASE("min_p and top_p turn into integers by rounding up") {
  SamplingRow sampling = {};
  sampling.min_p = 0.5f;
  CHECK(MinP::min_weight(sampling) == kMaxWeight / 2);
  sampling.min_p = 1.0f;
  CHECK(MinP::min_weight(sampling) == kMaxWeight);
  sampling.min_p = 1e-30f;
  CHECK(MinP::min_weight(sampling) == 1);
  sampling.top_p = 0.5f;
  CHECK(TopP::target(sampling, 10) == 5);
  CHECK(TopP::target(sampling, 11) == 6);
  CHECK(TopP::target(sampling, uint64_t{1} << 63) == uint64_t{1} << 62);
  sampling.top_p = 1e-30f;
  CHECK(TopP::target(sampling, 10) == 1);
  sampling.top_p = bits_to_float(0x3f7fffffu);  // 1 - 2^-24
  CHECK(TopP::target(sampling, 100) == 100);
  CHECK(TopP::target(sampling, uint64_t{1} << 63) == (uint64_t{1} << 63) - (uint64_t{1} << 39));
}

TEST_CASE("a tiny temperature keeps a finite scale") {
  SamplingRow sampling = {};
  sampling.temperature = 1e-45f;
  CHECK(Temperature::scale(sampling) == std::numeric_limits<float>::max());
  sampling.temperature = 4.0f;
  CHECK(Temperature::scale(sampling) == 0x1.715476p-2f);
}

}  // namespace
}  // namespace mrv1
