// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mrv1::cuda {

// Quotients of numbers below 2^31 by a number that the host knows: a multiplication and a shift
// (Granlund & Montgomery, "Division by Invariant Integers using Multiplication", 1994).
class FastDivider {
 public:
  FastDivider() = default;
  explicit FastDivider(uint32_t divisor) : divisor_(divisor) {
    while (shift_ < 31 && (uint32_t{1} << shift_) < divisor) ++shift_;
    const uint64_t beyond = (uint64_t{1} << shift_) - divisor;
    multiplier_ = static_cast<uint32_t>((beyond << 32) / divisor + 1);
  }

  __device__ __forceinline__ uint32_t divide(uint32_t number) const {
    return (__umulhi(number, multiplier_) + number) >> shift_;
  }
  // The quotient; `rest` becomes the remainder.
  __device__ __forceinline__ uint32_t divide(uint32_t number, uint32_t& rest) const {
    const uint32_t quotient = divide(number);
    rest = number - quotient * divisor_;
    return quotient;
  }
  uint32_t divisor() const { return divisor_; }

 private:
  uint32_t divisor_ = 1, multiplier_ = 1, shift_ = 0;
};

}  // namespace mrv1::cuda
