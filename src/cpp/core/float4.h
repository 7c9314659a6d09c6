// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/float8.h"

namespace mrv1 {

// E2M1 of the OCP Microscaling Formats specification 1.0: a sign, two bits of exponent and one of
// mantissa. The magnitudes of codes 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4 and 6; there is no infinity
// and no NaN. Only the four low bits are used.
struct Float4E2M1 {
  uint8_t bits;
  static constexpr float kMax = 6.0f;
};

// Round to nearest even and saturate: what is beyond 6, infinities included, becomes 6. NaN becomes
// 6 whatever its sign, as in hardware (cvt.rn.satfinite).
template <>
MRV1_HD Float4E2M1 from_float<Float4E2M1>(float value) {
  const uint32_t bits = float_to_bits(value);
  const float magnitude = bits_to_float(bits & 0x7fffffffu);
  if (magnitude != magnitude) return Float4E2M1{7};
  // The middles between neighbours; a value in the middle goes to the even code.
  const int code = (magnitude > 0.25f) + (magnitude >= 0.75f) + (magnitude > 1.25f) +
                   (magnitude >= 1.75f) + (magnitude > 2.5f) + (magnitude >= 3.5f) +
                   (magnitude > 5.0f);
  return Float4E2M1{static_cast<uint8_t>((bits >> 28 & 8u) | static_cast<uint32_t>(code))};
}

// Exact.
MRV1_HD float to_float(Float4E2M1 value) {
  const uint32_t sign = (uint32_t{value.bits} & 8u) << 28;
  const uint32_t code = uint32_t{value.bits} & 7u;
  if (code < 2) return bits_to_float(sign | (code * float_to_bits(0.5f)));
  return bits_to_float(sign | (((code >> 1) + 126u) << 23) | (code & 1u) << 22);
}

// NVFP4: a matrix [rows, cols] of E2M1 codes, two in a byte, the even column in the low nibble; an
// E4M3 scale for each row and block of 16 columns; and one float32 scale over all. An element is
// code * block scale * global scale. The first product has at most six significant bits and an
// exponent in [-10, 11]: it is exact in bfloat16.
constexpr int64_t kFp4Block = 16;

// The global scale whose largest block scale is 448 where the largest magnitude is `largest`.
MRV1_HD float fp4_global_scale(float largest) {
  return largest / (Float4E2M1::kMax * Float8E4M3::kMax);
}

// The scale of a block whose largest magnitude is `largest`, finite: that magnitude becomes 6.
// Never 0, of a block that is not, as its elements would be lost.
MRV1_HD Float8E4M3 fp4_block_scale(float largest, float global_scale) {
  if (largest == 0.0f) return Float8E4M3{0};
  const auto scale = from_float<Float8E4M3>(largest / (Float4E2M1::kMax * global_scale));
  return scale.bits == 0 ? Float8E4M3{1} : scale;
}

// The code of an element of a block with a scale from fp4_block_scale.
MRV1_HD Float4E2M1 fp4_code(float value, Float8E4M3 block_scale, float global_scale) {
  const float scale = to_float(block_scale) * global_scale;
  return scale == 0.0f ? Float4E2M1{0} : from_float<Float4E2M1>(value / scale);
}

// code * block scale, exact in float32 and in bfloat16.
MRV1_HD float fp4_value(Float4E2M1 code, Float8E4M3 block_scale) {
  return to_float(code) * to_float(block_scale);
}

}  // namespace mrv1
