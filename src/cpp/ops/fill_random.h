// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/float8.h"
#include "core/portable.h"

namespace mrv1 {

struct StepContext;
class Device;

// data[i] = center + width * u(key, first + i), rounded to bfloat16 whatever the dtype, and then to
// FP8 if it is that: values for timing and for tests, the same on every backend. Product and sum
// are rounded one after the other. Of E2M1 each element is a byte of two codes, all equally likely,
// and center and width do not count.
struct FillRandomParams {
  void* data;
  DType dtype;  // float32, bfloat16, FP8 or E2M1
  int64_t count;
  uint64_t key;
  uint64_t first;
  float center, width;
};

// From a counter (splitmix64).
MRV1_HD uint64_t counter_hash(uint64_t key, uint64_t counter) {
  uint64_t x = (key ^ counter) + 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
// Uniform in [-1, 1), in steps of 2^-23.
MRV1_HD float random_unit(uint64_t key, uint64_t counter) {
  const auto word = static_cast<int64_t>(counter_hash(key, counter));
  return static_cast<float>(static_cast<int32_t>(word >> 40)) * 0x1p-23f;
}
MRV1_HD uint8_t random_byte(uint64_t key, uint64_t counter) {
  return static_cast<uint8_t>(counter_hash(key, counter) >> 56);
}

// Throws kInvalidArgument for what is not allowed.
void check_params(const FillRandomParams& params);

// Fills memory that the kernels of `device` address, and waits.
void fill_random(Device& device, const FillRandomParams& params);

void fill_random_cpu(const FillRandomParams& params, const StepContext& ctx);
void fill_random_cuda(const FillRandomParams& params, const StepContext& ctx);

}  // namespace mrv1
