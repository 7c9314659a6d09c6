// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "core/thread_pool.h"
#include "ops/cpu_isa.h"
#include "ops/kernels.h"

namespace mrv1::test {

// Every instruction set this machine can run; the forced one is undone at the end of the scope.
inline std::vector<CpuIsa> supported_isas() {
  std::vector<CpuIsa> isas;
  for (CpuIsa isa :
       {CpuIsa::kPortable, CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAvx512Bf16, CpuIsa::kAmxBf16}) {
    if (isa <= detect_cpu_isa()) isas.push_back(isa);
  }
  return isas;
}

class IsaScope {
 public:
  explicit IsaScope(CpuIsa isa) { force_cpu_isa(isa); }
  ~IsaScope() { force_cpu_isa(default_cpu_isa()); }
};

// Values of a dtype of activations or of KV caches, seen as float.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, int64_t count)
      : dtype_(dtype), count_(count), bytes_(static_cast<size_t>(count) * dtype_size(dtype)) {}

  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  char* at(int64_t i) { return bytes_.data() + i * static_cast<int64_t>(dtype_size(dtype_)); }
  const char* at(int64_t i) const {
    return bytes_.data() + i * static_cast<int64_t>(dtype_size(dtype_));
  }

  float get(int64_t i) const {
    return visit([&](auto type) {
      typename decltype(type)::type value;
      std::memcpy(&value, at(i), sizeof(value));
      return to_float(value);
    });
  }
  void set(int64_t i, float value) {
    visit([&](auto type) {
      const auto rounded = from_float<typename decltype(type)::type>(value);
      std::memcpy(at(i), &rounded, sizeof(rounded));
      return 0.0f;
    });
  }
  void fill(float value) {
    for (int64_t i = 0; i < count_; ++i) set(i, value);
  }
  bool same_bits(const Tensor& other, int64_t from, int64_t other_from, int64_t n) const {
    return std::memcmp(at(from), other.at(other_from),
                       static_cast<size_t>(n) * dtype_size(dtype_)) == 0;
  }
  bool operator==(const Tensor& other) const { return bytes_ == other.bytes_; }

 private:
  template <typename Fn>
  float visit(Fn&& fn) const {
    switch (dtype_) {
      case DType::kF16:
        return fn(TypeTag<Float16>{});
      case DType::kE4M3:
        return fn(TypeTag<Float8E4M3>{});
      case DType::kE5M2:
        return fn(TypeTag<Float8E5M2>{});
      default:
        return dispatch_activation(dtype_, "test", fn);
    }
  }

  DType dtype_ = DType::kF32;
  int64_t count_ = 0;
  std::vector<char> bytes_;
};

inline Tensor random_tensor(DType dtype, int64_t count, uint32_t seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  Tensor tensor(dtype, count);
  for (int64_t i = 0; i < count; ++i) tensor.set(i, normal(generator));
  return tensor;
}

inline std::vector<float> random_floats(int64_t count, uint32_t seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// Relative rounding error of one store to the dtype.
inline double unit_roundoff(DType dtype) {
  return std::ldexp(1.0, dtype == DType::kF32 ? -24 : dtype == DType::kF16 ? -11 : -8);
}

// A step's arguments for ops that are called by themselves.
struct Step {
  explicit Step(int num_tokens, int num_threads = 2, size_t workspace_bytes = 0)
      : pool(num_threads), workspace(workspace_bytes) {
    ctx.pool = &pool;
    ctx.sizes.num_tokens = num_tokens;
    ctx.sizes.num_logits = num_tokens;
    ctx.workspace = workspace.data();
    ctx.workspace_bytes = workspace.size();
  }
  ThreadPool pool;
  std::vector<char> workspace;
  StepContext ctx;
};

}  // namespace mrv1::test
