// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/cache_write.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "ops/vector_ops.h"
#include "ops_test_support.h"

namespace mrv1::test {
namespace {

// Values of T whose bits are `words`.
template <typename T>
std::vector<T> values_of(const std::vector<uint32_t>& words) {
  std::vector<T> values(words.size());
  for (size_t i = 0; i < words.size(); ++i) std::memcpy(&values[i], &words[i], sizeof(T));
  return values;
}

template <typename T, typename F>
void check_codes(const std::vector<T>& values, const CodeOps& ops,
                 void (*encode)(const void*, float, void*, int64_t)) {
  for (float inverse : {1.0f, 0.37f, 0x1p126f, 0x1p-120f}) {
    std::vector<F> codes(values.size());
    encode(values.data(), inverse, codes.data(), static_cast<int64_t>(values.size()));
    for (size_t i = 0; i < values.size(); ++i) {
      REQUIRE(codes[i].bits == from_float<F>(to_float(values[i]) * inverse).bits);
    }
  }
  // Heads of every length, from everywhere: what is not finite does not count.
  for (size_t count = 8; count <= 256; count += 8) {
    for (size_t first = 0; first + count <= values.size(); first += 4093) {
      float largest = 0.0f;
      for (size_t i = first; i < first + count; ++i) {
        const float magnitude = std::fabs(to_float(values[i]));
        if (std::isfinite(magnitude)) largest = std::max(largest, magnitude);
      }
      REQUIRE(ops.largest_finite(values.data() + first, static_cast<int64_t>(count)) == largest);
    }
  }
}

template <typename T>
void check_codes(const std::vector<uint32_t>& words, const CodeOps& ops) {
  const std::vector<T> values = values_of<T>(words);
  check_codes<T, Float8E4M3>(values, ops, ops.encode_e4m3);
  check_codes<T, Float8E5M2>(values, ops, ops.encode_e5m2);
}

TEST_CASE("codes of heads are those of float8_from_float on every instruction set") {
  std::vector<uint32_t> halves(1 << 16), words;
  for (uint32_t i = 0; i < halves.size(); ++i) halves[i] = i;
  // Every exponent, at and beside what a code's last place is.
  for (uint32_t upper = 0; upper < 1u << 13; ++upper) {
    for (uint32_t lower : {0u, 1u, 0x3ffffu, 0x40000u, 0x40001u, 0x7ffffu}) {
      words.push_back(upper << 19 | lower);
    }
  }
  std::mt19937 random(3);
  for (int i = 0; i < 1 << 14; ++i) words.push_back(static_cast<uint32_t>(random()));
  for (CpuIsa isa : supported_isas()) {
    const IsaScope scope(isa);
    CAPTURE(cpu_isa_name(isa));
    check_codes<float>(words, vector_ops().f32_codes);
    check_codes<BFloat16>(halves, vector_ops().bf16_codes);
    check_codes<Float16>(halves, vector_ops().f16_codes);
  }
}

template <typename F>
void check_scales() {
  const auto divided = [](float largest) { return std::max(largest / F::kMax, kMinKvScale); };
  for (int exponent : {-149, -140, -126, -120, -118, -117, -111, -110, -1, 0, 5, 127}) {
    for (uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += exponent == 0 ? 1 : 61) {
      const float largest = std::ldexp(bits_to_float(0x3f800000u | mantissa), exponent);
      if (kv_token_scale<F>(largest) != divided(largest)) FAIL("of ", largest);
    }
  }
  CHECK(kv_token_scale<F>(0.0f) == kMinKvScale);
  CHECK(kv_token_scale<F>(std::numeric_limits<float>::max()) ==
        divided(std::numeric_limits<float>::max()));
}

TEST_CASE("scales of tokens are quotients") {
  check_scales<Float8E4M3>();
  check_scales<Float8E5M2>();
}

TEST_CASE("cache_write refuses slots outside of the cache, and caches without their scales") {
  const HeadShape shape{1, 1, 8};
  Step step(2, 1);
  const std::vector<float> rows(16, 1.0f);
  std::vector<uint8_t> codes(64, 0xa5);
  std::vector<float> scales(8, -1.0f);
  KvCacheLayer cache = kv_cache_layer(DType::kE4M3, 2, 2, shape, KvScaleKind::kToken);
  cache.key = codes.data();
  cache.value = codes.data() + 32;
  CacheWriteParams params{.key = rows.data(),
                          .value = rows.data(),
                          .key_stride = 8,
                          .value_stride = 8,
                          .dtype = DType::kF32,
                          .cache = &cache,
                          .kv_group = 0};
  const int64_t good[] = {3, -1};
  params.slots = {good, true};
  CHECK_THROWS_AS(cache_write_cpu(params, step.ctx), Error);
  cache.scales.key = scales.data();
  cache.scales.value = scales.data() + 4;
  for (int64_t wrong : {int64_t{-2}, int64_t{4}, int64_t{1} << 32}) {
    const int64_t slots[] = {0, wrong};
    params.slots = {slots, true};
    CHECK_THROWS_AS(cache_write_cpu(params, step.ctx), Error);
  }
  CHECK(codes == std::vector<uint8_t>(64, 0xa5));
  params.slots = {good, true};
  cache_write_cpu(params, step.ctx);
  CHECK(codes[23] == 0xa5);
  CHECK(codes[24] == 0x7e);
  CHECK(codes[56] == 0x7e);
  CHECK(scales[3] == 1.0f / 448.0f);
  CHECK(scales[2] == -1.0f);
  params.dtype = DType::kI32;
  CHECK_THROWS_AS(cache_write_cpu(params, step.ctx), Error);
}

}  // namespace
}  // namespace mrv1::test
