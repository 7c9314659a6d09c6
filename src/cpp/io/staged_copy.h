// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"
#include "io/mapped_file.h"

namespace mrv1 {

// Elements of a file, and where they go in device memory, one behind the other.
struct StagedTensor {
  const MappedFile* file;
  size_t offset;  // of the first byte
  DType source;   // float32, bfloat16 or float16; or any, as is
  void* target;
  DType stored;  // float32 or bfloat16; or `source`
  int64_t count;
  // They lie in the file in rows of `cols`, whose beginnings are `stride` elements apart. Zeros:
  // one behind the other.
  int64_t cols = 0, stride = 0;
};

// One thread reads from the page cache at several GB/s; these together are ahead of a PCIe 5 link.
// Two slots a thread, so that it reads into one while the other is copied.
struct StagingSizes {
  int threads = 8;  // at most; no more than the cores that the process may use
  int slots = 2;    // of each thread
  size_t slot_bytes = size_t{8} << 20;
};

// Brings tensors from files to a device that has copy streams: threads read pieces of the files
// into pinned memory of their own, convert them there and queue their copies, so that reading,
// converting and copying overlap, across tensors too.
class StagedCopy {
 public:
  // `largest` is the size of the largest tensor in device memory, which bounds the staging memory.
  StagedCopy(Device& device, size_t largest, const StagingSizes& sizes = {});
  ~StagedCopy();

  // Returns when everything is in device memory. The calling thread only waits, and calls
  // `progress` with the bytes of the files that are done since the last call; what that throws ends
  // the copy.
  void copy(std::span<const StagedTensor> tensors, const std::function<void(size_t)>& progress);

 private:
  struct Worker;
  struct Shared;

  void run(Worker& worker, Shared& shared);

  Device& device_;
  StagingSizes sizes_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

// Converts between the dtypes of StagedTensor; the memory must not overlap.
void convert_elements(const void* from, DType source, void* to, DType stored, int64_t count);

}  // namespace mrv1
