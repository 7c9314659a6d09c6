// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace mrv1 {

// The two formats of "FP8 Formats for Deep Learning" (Micikevicius et al., 2022), as ml_dtypes
// names them. E4M3 has no infinity; its largest value is 448, that of E5M2 57,344.
struct Float8E4M3 {
  uint8_t bits;
  static constexpr int kMantissaBits = 3;
  static constexpr int kBias = 7;
  static constexpr uint8_t kMaxCode = 0x7e;
  static constexpr float kMax = 448.0f;
};
struct Float8E5M2 {
  uint8_t bits;
  static constexpr int kMantissaBits = 2;
  static constexpr int kBias = 15;
  static constexpr uint8_t kMaxCode = 0x7b;
  static constexpr float kMax = 57344.0f;
};

// Round to nearest even and saturate: what is beyond the largest value, infinities included,
// becomes that value. NaN becomes code 0x7f whatever its sign.
template <typename F>
MRV1_HD F float8_from_float(float value) {
  constexpr int kShift = 23 - F::kMantissaBits;
  constexpr uint32_t kMinNormal = (128u - F::kBias) << 23;  // bits of the smallest normal number
  constexpr uint32_t kRebias = (127u - F::kBias) << F::kMantissaBits;
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = bits >> 24 & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return F{0x7f};
  uint32_t code;
  if (magnitude >= kMinNormal) {
    const uint32_t rounded = magnitude + (1u << (kShift - 1)) - 1 + (magnitude >> kShift & 1u);
    code = (rounded >> kShift) - kRebias;
  } else {
    // Below it codes are multiples of one step; the sum has that step as its last place.
    constexpr uint32_t kStepAsLastPlace = kMinNormal + (static_cast<uint32_t>(kShift) << 23);
    code = float_to_bits(bits_to_float(magnitude) + bits_to_float(kStepAsLastPlace)) -
           kStepAsLastPlace;
  }
  if (code > F::kMaxCode) code = F::kMaxCode;
  return F{static_cast<uint8_t>(sign | code)};
}

template <>
MRV1_HD Float8E4M3 from_float<Float8E4M3>(float value) {
  return float8_from_float<Float8E4M3>(value);
}
template <>
MRV1_HD Float8E5M2 from_float<Float8E5M2>(float value) {
  return float8_from_float<Float8E5M2>(value);
}

// Exact.
MRV1_HD float to_float(Float8E4M3 value) {
  const uint32_t sign = (uint32_t{value.bits} & 0x80u) << 24;
  const uint32_t code = uint32_t{value.bits} & 0x7fu;
  if (code == 0x7fu) return bits_to_float(sign | 0x7fc00000u);
  // Three mantissa bits above twenty zeros; below 8 it is a subnormal number.
  constexpr uint32_t kRebias = 120u << 23;
  if (code >= 8) return bits_to_float(sign | ((code << 20) + kRebias));
  const float step = bits_to_float((127u - 9u) << 23);
  return bits_to_float(sign | float_to_bits(static_cast<float>(code) * step));
}

// E5M2 is the first byte of a half.
MRV1_HD float to_float(Float8E5M2 value) {
  return to_float(Float16{static_cast<uint16_t>(value.bits << 8)});
}

// Calls fn(TypeTag<T>) with the storage type of an activation dtype or of FP8.
template <typename Fn>
auto dispatch_cache(DType dtype, std::string_view op, Fn&& fn) {
  if (dtype == DType::kE4M3) return fn(TypeTag<Float8E4M3>{});
  if (dtype == DType::kE5M2) return fn(TypeTag<Float8E5M2>{});
  return dispatch_activation(dtype, op, fn);
}

}  // namespace mrv1
