// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "core/error.h"
#include "core/portable.h"

namespace mrv1 {

// The two of eight bits are storage of KV caches (core/float8.h), the one of four, two to a byte,
// of weights in NVFP4; none is of activations.
enum class DType : uint8_t { kF32, kBF16, kF16, kI32, kE4M3, kE5M2, kE2M1 };

// Storage types. Arithmetic is always done in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

MRV1_HD constexpr bool is_float8(DType dtype) {
  return dtype == DType::kE4M3 || dtype == DType::kE5M2;
}

// Bytes of an element; of kE2M1, those of a pair.
constexpr size_t dtype_size(DType dtype) {
  if (is_float8(dtype) || dtype == DType::kE2M1) return 1;
  return dtype == DType::kF32 || dtype == DType::kI32 ? 4 : 2;
}

constexpr std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kBF16:
      return "bfloat16";
    case DType::kF16:
      return "float16";
    case DType::kI32:
      return "int32";
    case DType::kE4M3:
      return "float8_e4m3fn";
    case DType::kE5M2:
      return "float8_e5m2";
    case DType::kE2M1:
      return "float4_e2m1fn";
  }
  return "?";
}

MRV1_HD float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

MRV1_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

MRV1_HD float to_float(float value) { return value; }
MRV1_HD float to_float(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }

// IEEE half to float, exact, subnormals included. Without branches, so that loops become vectors.
MRV1_HD float to_float(Float16 value) {
  const uint32_t sign = (uint32_t{value.bits} & 0x8000u) << 16;
  const uint32_t rest = (uint32_t{value.bits} & 0x7fffu) << 13;
  const uint32_t exponent = rest & (0x1fu << 23);
  const uint32_t normal = rest + (112u << 23);
  // 2^-14 more than its value, which a normal number can hold.
  const float raised = bits_to_float(rest + (113u << 23));
  const uint32_t subnormal = float_to_bits(raised - bits_to_float(113u << 23));
  const uint32_t is_subnormal = 0u - uint32_t{exponent == 0};
  // Infinity and NaN have the highest exponent in both.
  const uint32_t special = uint32_t{exponent == 0x1fu << 23} * (112u << 23);
  return bits_to_float(sign | (subnormal & is_subnormal) | ((normal + special) & ~is_subnormal));
}

template <typename T>
MRV1_HD T from_float(float value);

template <>
MRV1_HD float from_float<float>(float value) {
  return value;
}

// Round to nearest even; NaN stays a quiet NaN.
template <>
MRV1_HD BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    return BFloat16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
  }
  return BFloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// Round to nearest even; what is beyond the largest value becomes infinity, NaN stays a quiet NaN.
template <>
MRV1_HD Float16 from_float<Float16>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t code;
  if (magnitude > 0x7f800000u) {
    code = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 113u << 23) {
    code = ((magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
    if (code > 0x7c00u) code = 0x7c00u;
  } else {
    // Below 2^-14 values are multiples of 2^-24, the last place of 0.5.
    code = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  }
  return Float16{static_cast<uint16_t>(sign | code)};
}

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls fn(TypeTag<T>) with the storage type of an activation dtype (float32 or bfloat16).
template <typename Fn>
auto dispatch_activation(DType dtype, std::string_view op, Fn&& fn) {
  switch (dtype) {
    case DType::kF32:
      return fn(TypeTag<float>{});
    case DType::kBF16:
      return fn(TypeTag<BFloat16>{});
    default:
      fail(ErrorKind::kInvalidArgument, op, "activations are float32 or bfloat16, not ",
           dtype_name(dtype));
  }
}

}  // namespace mrv1
