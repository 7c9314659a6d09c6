// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/fp4_tiles.h"

#include <doctest/doctest.h>

#include <cmath>

#include "core/float4.h"

namespace mrv1 {
namespace {

// What a kernel makes of a code and a block scale: the product of two bfloat16, which is exact, and
// kFp4Unscale.
float decoded(uint32_t pair, int half, uint32_t scale) {
  const auto value = [](uint32_t bits) { return to_float(BFloat16{static_cast<uint16_t>(bits)}); };
  return value(pair >> (half * 16)) * value(scale) * kFp4Unscale;
}

TEST_CASE("codes and block scales of NVFP4 survive the layout of CUDA kernels") {
  for (int e4m3 = 0; e4m3 < 128; ++e4m3) {  // signs are moved into the codes
    for (int index = 0; index < 4; ++index) {
      const uint32_t packed = fp4_pack_scale(static_cast<uint8_t>(e4m3));
      const uint32_t scales = packed << (8 * index) | 0x11u << (8 * ((index + 1) % 4));
      const uint32_t scale = fp4_decode_scale(scales, index);
      CHECK((scale >> 16) == (scale & 0xffff));
      CHECK(fp4_unpack_scale(static_cast<uint8_t>(packed)) == e4m3);
      if (e4m3 == 0) continue;  // of a block of zeros
      for (uint32_t first = 0; first < 16; ++first) {
        uint32_t codes = 0;
        for (int i = 0; i < 8; ++i) codes |= (first + i * 5) % 16 << (4 * i);
        REQUIRE(fp4_unpack_word(fp4_pack_word(codes)) == codes);
        uint32_t pairs[4];
        fp4_decode(fp4_pack_word(codes), pairs);
        for (int i = 0; i < 8; ++i) {
          const Float4E2M1 code{static_cast<uint8_t>(codes >> (4 * i) & 15)};
          const float expected = fp4_value(code, Float8E4M3{static_cast<uint8_t>(e4m3)});
          const float actual = decoded(pairs[i / 2], i % 2, scale);
          if (std::isnan(expected)) {
            REQUIRE(std::isnan(actual));
          } else {
            REQUIRE(float_to_bits(actual) == float_to_bits(expected));
          }
        }
      }
    }
  }
}

TEST_CASE("products of codes and block scales are bfloat16") {
  for (int e4m3 = 1; e4m3 < 127; ++e4m3) {
    const uint32_t scale = fp4_decode_scale(fp4_pack_scale(static_cast<uint8_t>(e4m3)), 0);
    uint32_t pairs[4];
    fp4_decode(fp4_pack_word(0x76543210u), pairs);
    for (int i = 0; i < 8; ++i) {
      const float product = decoded(pairs[i / 2], i % 2, scale) / kFp4Unscale;
      CHECK(to_float(from_float<BFloat16>(product)) == product);
      CHECK((product == 0.0f || std::fpclassify(product) == FP_NORMAL));
    }
  }
}

}  // namespace
}  // namespace mrv1
