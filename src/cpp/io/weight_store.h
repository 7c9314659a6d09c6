// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "core/device.h"
#include "io/mapped_file.h"
#include "ops/weight_view.h"
#include "program/program.h"

namespace mrv1 {

// How each weight of a program is stored, by weight index; addresses are not filled in. Matrices
// that a linear op reads are in the backend's linear layout, others by rows, vectors in float32.
std::vector<WeightView> stored_weights(const Program& program, WeightLayout linear_layout);

// The one copy of every weight of a program, in the dtype and layout its kernels read. An embedding
// that is tied to a linear op gathers from the same copy.
class WeightStore {
 public:
  WeightStore(const Program& program, Device& device);

  // Copies one tensor of a mapped file into rows of a weight, converting to the weight's dtype, and
  // drops the file's pages as it goes. The tensor is row-major [segment rows, cols] of source dtype
  // (float32, bfloat16 or float16) at a byte offset.
  void load_segment(int32_t weight, int32_t segment, const MappedFile& file, size_t offset,
                    DType source);
  // The same from memory.
  void load_segment(int32_t weight, int32_t segment, const void* data, DType source);
  // Values uniform in (-range, range) of a matrix, 1 + small of a vector: timing without a
  // checkpoint. Depends on seed and weight index only.
  void fill_random(int32_t weight, uint64_t seed, float range);

  // kWeights naming the first segment that was never loaded.
  void check_complete() const;

  const std::vector<WeightView>& views() const { return views_; }

 private:
  void check_segment(int32_t weight, int32_t segment, DType source) const;
  void store_rows(int32_t weight, int64_t row_start, int64_t rows, const void* source, DType dtype);

  const Program* program_;
  Device* device_;
  std::vector<Buffer> buffers_;
  std::vector<WeightView> views_;
  std::vector<std::vector<bool>> loaded_;
};

}  // namespace mrv1
