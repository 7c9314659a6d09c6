// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cublasLt.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"

namespace mrv1::cuda {

// cuBLASLt's functions, found when the library is opened: the module is not linked against it, so
// that it loads where the library is not installed.
struct CublasLt {
  std::string name;     // what it was opened as
  std::string version;  // "13.1.0"

  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtDestroy) destroy = nullptr;
  decltype(&cublasLtGetVersion) get_version = nullptr;
  decltype(&cublasLtGetStatusName) get_status_name = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  decltype(&cublasLtMatmulDescInit_internal) desc_init = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set = nullptr;
  decltype(&cublasLtMatrixLayoutInit_internal) layout_init = nullptr;
  decltype(&cublasLtMatmulPreferenceInit_internal) preference_init = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) get_heuristic = nullptr;
  decltype(&cublasLtMatmulAlgoCheck) algo_check = nullptr;
  decltype(&cublasLtMatmulAlgoInit) algo_init = nullptr;
  decltype(&cublasLtMatmulAlgoConfigGetAttribute) algo_get = nullptr;
  decltype(&cublasLtMatmulAlgoConfigSetAttribute) algo_set = nullptr;

  // Throws kDevice naming the call unless it succeeded.
  void check_status(cublasStatus_t status, std::string_view call) const;
};

// Opens the first of `libraries` (as LinearOptions) that is there and fits, once for the process:
// later calls return what is open. Throws kDevice with every name tried and what was wrong with it.
const CublasLt& open_cublaslt(const std::vector<std::string>& libraries);

// An algorithm of cuBLASLt in writing, in the order of its attributes. It means the same only to
// the same version of the library.
struct CublasLtConfig {
  static constexpr int kSize = 9;
  // id, tile, split of K, reduction, swizzle, custom option, stages, inner shape, cluster shape
  std::array<int32_t, kSize> values{};
};

// One product out[rows, n] = x[rows, k] weight[n, k]^T in cuBLASLt's terms. Lives on the stack:
// describing a product allocates nothing.
class CublasLtProduct {
 public:
  // bias: null, or [n] float32 to be added to float32 outputs. Rows of the output lie `out_stride`
  // elements apart. With `scaled` the product is multiplied by a factor in device memory.
  CublasLtProduct(const CublasLt& library, int64_t n, int64_t k, int64_t rows, DType dtype,
                  DType out_dtype, const float* bias, int64_t out_stride, bool scaled);

  // The GPU's processors that it may take; 0 is all.
  void set_processors(int32_t count);
  // Writes up to `count` algorithms, the best guess first; returns how many there are. Pointers
  // will be aligned to `alignment` bytes.
  int heuristics(cublasLtHandle_t handle, size_t workspace_bytes, int64_t alignment, int count,
                 cublasLtMatmulHeuristicResult_t* results) const;
  // Whether the algorithm can compute this product within the workspace.
  bool supports(cublasLtHandle_t handle, const cublasLtMatmulAlgo_t& algo,
                size_t workspace_bytes) const;
  // False if there is no such algorithm for operands of these types.
  bool algorithm(cublasLtHandle_t handle, const CublasLtConfig& config,
                 cublasLtMatmulAlgo_t* algo) const;
  CublasLtConfig config(const cublasLtMatmulAlgo_t& algo) const;
  // `scale` and `zero` are null, or the factor and a zero in device memory of a scaled product.
  cublasStatus_t run(cublasLtHandle_t handle, const cublasLtMatmulAlgo_t& algo, const void* weight,
                     const void* x, void* out, void* workspace, size_t workspace_bytes,
                     cudaStream_t stream, const float* scale, const float* zero) const;

 private:
  // cuBLASLt takes non-const pointers to what it only reads.
  static cublasLtMatmulDesc_t desc(const CublasLtProduct* p) {
    return const_cast<cublasLtMatmulDesc_t>(&p->desc_);
  }
  static cublasLtMatrixLayout_t layout(const cublasLtMatrixLayoutOpaque_t& layout) {
    return const_cast<cublasLtMatrixLayout_t>(&layout);
  }

  const CublasLt& library_;
  cudaDataType_t dtype_, out_dtype_;
  cublasLtMatmulDescOpaque_t desc_;
  cublasLtMatrixLayoutOpaque_t weight_, x_, out_;
};

}  // namespace mrv1::cuda
