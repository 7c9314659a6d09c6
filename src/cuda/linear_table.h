// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <tuple>

#include "core/dtype.h"
#include "cublaslt.h"
#include "linear_skinny.h"

namespace mrv1::cuda {

// What an implementation of linear is chosen for.
struct LinearShape {
  int64_t n, k, rows;
  DType dtype, out_dtype;
  bool gated, bias;
};

enum class LinearKind : uint8_t { kTiled, kSkinny, kCublasLt };

// How to compute a linear, in writing.
struct LinearConfig {
  LinearKind kind = LinearKind::kTiled;
  SkinnyConfig skinny;      // kSkinny
  CublasLtConfig cublaslt;  // kCublasLt
};

// The fastest way to compute each shape, as it was measured on one card with one version of
// cuBLASLt. docs/tuning.md describes the files.
class LinearTable {
 public:
  // "nvidia-h200-cublaslt-13.1.0.txt". The version is empty where there is no library.
  static std::string file_name(std::string_view card, std::string_view cublaslt_version);
  // A line of a file.
  static std::string line(const LinearShape& shape, const LinearConfig& config,
                          double microseconds);

  // Adds the entries of a file to those that are there already, which stay. A file that does not
  // exist has none; kInvalidArgument names the line of one that is damaged.
  void read(const std::string& path);
  void set(const LinearShape& shape, const LinearConfig& config);

  // The entry measured for the shape, or for the next larger number of rows if that is near. Null
  // if there is none.
  const LinearConfig* find(const LinearShape& shape) const;
  const LinearConfig* find_exact(const LinearShape& shape) const;

 private:
  using Weight = std::tuple<int64_t, int64_t, DType, DType, bool, bool>;
  static Weight weight(const LinearShape& shape) {
    return {shape.n, shape.k, shape.dtype, shape.out_dtype, shape.gated, shape.bias};
  }

  std::map<Weight, std::map<int64_t, LinearConfig>> entries_;
};

}  // namespace mrv1::cuda
