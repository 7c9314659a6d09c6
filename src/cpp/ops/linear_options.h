// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

namespace mrv1 {

// What a GPU's linear op needs from outside; python/mrv1/tuning.py fills it in.
struct LinearOptions {
  // cuBLASLt: sonames and paths, tried in order; empty tries the loader's path alone.
  std::vector<std::string> libraries;
  // False runs without cuBLASLt, on this library's own kernels alone.
  bool use_library = true;
  // Directories of tuning tables; an entry of an earlier one goes before those of later ones.
  std::vector<std::string> table_dirs;
  // Measure shapes that the first of table_dirs has no entry for, and add them there.
  bool tune = false;
};

// Implemented by src/cuda, or by src/cpp/no_cuda in a build without CUDA.
namespace cuda {
// Opens cuBLASLt and says which one it is; kDevice if it is not there.
std::string describe_cublaslt(const std::vector<std::string>& libraries);
}  // namespace cuda

}  // namespace mrv1
