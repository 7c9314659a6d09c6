// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "core/float8.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace mrv1 {
namespace {

// Codes without a sign, rising, are the values of the format, rising: a value between two of them
// goes to the nearer one, in the middle to the even one.
template <typename F>
void check_format() {
  const auto encode = [](float value) { return static_cast<int>(from_float<F>(value).bits); };
  const auto decode = [](int code) { return to_float(F{static_cast<uint8_t>(code)}); };
  CHECK(decode(F::kMaxCode) == F::kMax);
  CHECK(decode(1) == std::ldexp(1.0f, 1 - F::kBias - F::kMantissaBits));
  for (int code = 0; code <= F::kMaxCode; ++code) {
    CAPTURE(code);
    const float value = decode(code);
    CHECK(encode(value) == code);
    CHECK(encode(-value) == (code | 0x80));
    CHECK(decode(code | 0x80) == -value);
    CHECK(std::signbit(decode(code | 0x80)));
    if (code == F::kMaxCode) continue;
    const float next = decode(code + 1);
    REQUIRE(next > value);
    const float middle = 0.5f * (value + next);
    const int even = code % 2 == 0 ? code : code + 1;
    CHECK(encode(middle) == even);
    CHECK(encode(-middle) == (even | 0x80));
    CHECK(encode(std::nextafter(middle, 0.0f)) == code);
    CHECK(encode(std::nextafter(middle, next)) == code + 1);
  }
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (float beyond : {std::nextafter(F::kMax, kInfinity), 2.0f * F::kMax,
                       std::numeric_limits<float>::max(), kInfinity}) {
    CHECK(encode(beyond) == F::kMaxCode);
    CHECK(encode(-beyond) == (F::kMaxCode | 0x80));
  }
  CHECK(encode(std::numeric_limits<float>::denorm_min()) == 0);
  CHECK(encode(std::numeric_limits<float>::quiet_NaN()) == 0x7f);
  CHECK(encode(-std::numeric_limits<float>::quiet_NaN()) == 0x7f);
  CHECK(std::isnan(decode(0x7f)));
  CHECK(std::isnan(decode(0xff)));
}

TEST_CASE("float8: every code, and every boundary between two") {
  check_format<Float8E4M3>();
  check_format<Float8E5M2>();
}

TEST_CASE("float16: every finite value, and every boundary between two") {
  const auto encode = [](float value) { return int{from_float<Float16>(value).bits}; };
  const auto decode = [](int code) { return to_float(Float16{static_cast<uint16_t>(code)}); };
  constexpr int kInfinityCode = 0x7c00;
  for (int code = 0; code < kInfinityCode; ++code) {
    const float value = decode(code);
    REQUIRE(encode(value) == code);
    REQUIRE(encode(-value) == (code | 0x8000));
    const float next = code + 1 < kInfinityCode ? decode(code + 1) : 65536.0f;
    const float middle = 0.5f * (value + next);
    REQUIRE(encode(middle) == (code % 2 == 0 ? code : code + 1));
    REQUIRE(encode(std::nextafter(middle, 0.0f)) == code);
    REQUIRE(encode(std::nextafter(middle, next)) == code + 1);
  }
  CHECK(encode(std::numeric_limits<float>::max()) == kInfinityCode);
  CHECK(encode(-std::numeric_limits<float>::infinity()) == (kInfinityCode | 0x8000));
  CHECK(encode(std::numeric_limits<float>::denorm_min()) == 0);
  CHECK(std::isnan(decode(encode(std::numeric_limits<float>::quiet_NaN()))));
}

}  // namespace
}  // namespace mrv1
