// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "core/device.h"
#include "io/mapped_file.h"
#include "io/staged_copy.h"
#include "ops/weight_view.h"
#include "program/program.h"

namespace mrv1 {

// How each weight of a program is stored, by weight index; addresses are not filled in. Matrices
// that a linear op reads are in the backend's linear layout, those of NVFP4 in its layout for
// these, others by rows, vectors in float32.
std::vector<WeightView> stored_weights(const Program& program, const Kernels& kernels);

// What a tensor of a segment holds. Segments of plain weights have their elements only, those of
// NVFP4 weights all of these: codes (dtype kE2M1) [rows, cols / 2], block scales (kE4M3) [rows,
// cols / 16], and two single float32.
enum class TensorPart : uint8_t { kElements, kBlockScales, kGlobalScale, kInputScale };

// Where a tensor of a segment lies in a file: row-major, of a source dtype (elements of plain
// weights are float32, bfloat16 or float16), from a byte offset on. The segment may be a slice of
// it.
struct TensorSource {
  int32_t weight, segment;
  size_t offset;
  DType dtype;
  TensorPart part = TensorPart::kElements;
};

// The one copy of every weight of a program, in the dtype and layout its kernels read. An embedding
// that is tied to a linear op gathers from the same copy. On the CPU each weight has memory of its
// own, which costs nothing until it is written; on a GPU all share one allocation.
class WeightStore {
 public:
  WeightStore(const Program& program, Device& device);

  // Loads tensors of one file, best in the order of their offsets, converting them to the weights'
  // dtypes. `progress` is called in the calling thread with the bytes of the file that are done
  // since the last call, of slices those of the slices; what it throws passes through, and some of
  // the tensors are loaded then.
  void load(const MappedFile& file, std::span<const TensorSource> tensors,
            const std::function<void(size_t)>& progress);
  // The same for one segment from memory, where its own rows and columns lie.
  void load_segment(int32_t weight, int32_t segment, const void* data, DType source,
                    TensorPart part = TensorPart::kElements);
  // Values uniform in (-range, range) of a matrix, of NVFP4 random codes of the same standard
  // deviation, 1 + small of a vector, zeros of a correction of the choice of experts: timing
  // without a checkpoint. Depends on seed and weight index only.
  void fill_random(int32_t weight, uint64_t seed, float range);

  // kWeights naming the first segment that was never loaded. Ends the loading: memory that was used
  // for it is given back.
  void check_complete();

  const std::vector<WeightView>& views() const { return views_; }

 private:
  void allocate(const Program& program);
  void check_segment(const TensorSource& tensor) const;
  const WeightSegment& segment(const TensorSource& tensor) const;
  // Memory of a row of a weight's elements or block scales that are stored by rows.
  char* row_address(int32_t weight, TensorPart part, int64_t row) const;
  void load_mapped(const MappedFile& file, const TensorSource& tensor);
  void load_staged(const MappedFile& file, std::span<const TensorSource> tensors,
                   const std::function<void(size_t)>& progress);
  void store_rows(int32_t weight, int64_t row_start, int64_t rows, const void* source, DType dtype,
                  TensorPart part);
  // The global scale or the scale of activations of a segment.
  void store_scale(const TensorSource& tensor, float scale);
  void fill_random_codes(int32_t weight, uint64_t key, float range);
  void mark_loaded(const TensorSource& tensor);
  // Before a weight is loaded once more: it lies by rows while it is.
  void begin_loading(int32_t weight);
  // Once all of a weight is there: brings it into its layout, if it lies by rows until then.
  void finish_loading(int32_t weight);
  void pack_tiles(int32_t weight);

  const Program* program_;
  Device* device_;
  std::vector<Buffer> buffers_;
  std::vector<char*> data_;  // by weight
  std::vector<WeightView> views_;
  std::vector<std::vector<uint8_t>> loaded_;  // by weight and segment: a bit for each TensorPart
  std::vector<float> input_scales_;           // by weight: the largest so far
  std::vector<std::vector<float>> global_scales_;  // by weight and segment, of NVFP4
  std::vector<std::vector<int64_t>> scale_runs_;   // by weight
  std::vector<bool> packed_;                       // by weight: those that lie in tiles now
  Buffer unpacked_;                                // rows on their way into tiles
  std::unique_ptr<StagedCopy> staged_;
};

}  // namespace mrv1
