// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "sampling/sample_loops.h"

#include <climits>

namespace mrv1 {
namespace {

#define MRV1_LOOP static inline __attribute__((always_inline))

MRV1_LOOP KeyRange key_range_body(const float* logits, int64_t count) {
  int32_t low = INT_MAX;
  int32_t high = INT_MIN;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t key = logit_key(logits[i]);
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  return KeyRange{low, high};
}

MRV1_LOOP void weights_body(const float* logits, int64_t count, const WeightRule& rule,
                            uint64_t* weights) {
  const WeightRule local = rule;
  for (int64_t i = 0; i < count; ++i) {
    weights[i] = token_weight(logits[i], local);
  }
}

MRV1_LOOP uint64_t weight_sum_body(const float* logits, int64_t count, const WeightRule& rule) {
  const WeightRule local = rule;
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += token_weight(logits[i], local);
  }
  return sum;
}

MRV1_LOOP void classify_body(const float* logits, int64_t count, const WeightRule& rule,
                             uint64_t* weights, int32_t* classes) {
  weights_body(logits, count, rule, weights);
  const WeightRule local = rule;
  for (int64_t i = 0; i < count; ++i) {
    const float depth = -1.0f - weight_exponent(logits[i], local.reference, local.scale);
    const float scaled = depth * kClassesPerUnit;
    const float limit = static_cast<float>(kNumClasses - 1);
    classes[i] = static_cast<int32_t>(scaled < limit ? scaled : limit);
  }
}

MRV1_LOOP int32_t count_above_body(const float* logits, int64_t count, int32_t key) {
  int32_t above = 0;
  for (int64_t i = 0; i < count; ++i) {
    above += logit_key(logits[i]) > key ? 1 : 0;
  }
  return above;
}

MRV1_LOOP void mask_body(float* logits, int64_t count, const uint32_t* mask) {
  for (int64_t first = 0; first < count; first += 32) {
    const uint32_t word = mask[first / 32];
    if (word == 0xffffffffu) {
      continue;
    }
    const int64_t end = first + 32 < count ? first + 32 : count;
    for (int64_t i = first; i < end; ++i) {
      const bool stays = (word >> (i - first) & 1u) != 0;
      logits[i] = stays | (logits[i] != logits[i]) ? logits[i] : kMinusInf;
    }
  }
}

MRV1_LOOP uint64_t kept_sum_body(const float* logits, int64_t count, int32_t first_id,
                                 const WeightRule& rule, SetEdge edge) {
  const WeightRule local = rule;
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t weight = token_weight(logits[i], local);
    const int32_t key = logit_key(logits[i]);
    const int32_t id = first_id + static_cast<int32_t>(i);
    const bool kept = (key > edge.key) | ((key == edge.key) & (id <= edge.id));
    sum += kept ? weight : 0;
  }
  return sum;
}

// Defines the loops for one instruction set and the table that holds them.
#define MRV1_SAMPLE_LOOPS(suffix, attribute)                                                   \
  attribute KeyRange key_range_##suffix(const float* logits, int64_t count) {                  \
    return key_range_body(logits, count);                                                      \
  }                                                                                            \
  attribute void weights_##suffix(const float* logits, int64_t count, const WeightRule& rule,  \
                                  uint64_t* weights) {                                         \
    weights_body(logits, count, rule, weights);                                                \
  }                                                                                            \
  attribute uint64_t weight_sum_##suffix(const float* logits, int64_t count,                   \
                                         const WeightRule& rule) {                             \
    return weight_sum_body(logits, count, rule);                                               \
  }                                                                                            \
  attribute void classify_##suffix(const float* logits, int64_t count, const WeightRule& rule, \
                                   uint64_t* weights, int32_t* classes) {                      \
    classify_body(logits, count, rule, weights, classes);                                      \
  }                                                                                            \
  attribute int32_t count_above_##suffix(const float* logits, int64_t count, int32_t key) {    \
    return count_above_body(logits, count, key);                                               \
  }                                                                                            \
  attribute void mask_##suffix(float* logits, int64_t count, const uint32_t* mask) {           \
    mask_body(logits, count, mask);                                                            \
  }                                                                                            \
  attribute uint64_t kept_sum_##suffix(const float* logits, int64_t count, int32_t first_id,   \
                                       const WeightRule& rule, SetEdge edge) {                 \
    return kept_sum_body(logits, count, first_id, rule, edge);                                 \
  }                                                                                            \
  const SampleLoops kLoops_##suffix = {                                                        \
      key_range_##suffix,   weights_##suffix, weight_sum_##suffix, classify_##suffix,          \
      count_above_##suffix, mask_##suffix,    kept_sum_##suffix};

MRV1_SAMPLE_LOOPS(portable, )
#if defined(__x86_64__)
MRV1_SAMPLE_LOOPS(avx2, __attribute__((target("avx2,fma"))))
MRV1_SAMPLE_LOOPS(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,"
                                                "prefer-vector-width=512"))))
#endif

#undef MRV1_SAMPLE_LOOPS
#undef MRV1_LOOP

}  // namespace

const SampleLoops& sample_loops([[maybe_unused]] CpuIsa isa) {
#if defined(__x86_64__)
  if (isa >= CpuIsa::kAvx512) {
    return kLoops_avx512;
  }
  if (isa == CpuIsa::kAvx2) {
    return kLoops_avx2;
  }
#endif
  return kLoops_portable;
}

}  // namespace mrv1
