// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/copy_blocks.h"

#include <algorithm>

#include "core/error.h"

namespace mrv1 {
namespace {

struct Dim {
  int64_t size, stride;
};

// The parts of a block that lie together: runs of `run` elements of `size` bytes, repeated by dims.
void add_arrays(void* data, int64_t size, int64_t block_stride, std::vector<Dim> dims, int64_t run,
                std::vector<CacheArray>& arrays) {
  std::erase_if(dims, [](const Dim& dim) { return dim.size == 1; });
  std::sort(dims.begin(), dims.end(),
            [](const Dim& a, const Dim& b) { return a.stride < b.stride; });
  size_t merged = 0;
  for (; merged < dims.size() && dims[merged].stride == run; ++merged) run *= dims[merged].size;
  std::vector<int64_t> offsets = {0};
  for (size_t i = merged; i < dims.size(); ++i) {
    const std::vector<int64_t> inner = offsets;
    for (int64_t j = 1; j < dims[i].size; ++j) {
      for (const int64_t offset : inner) offsets.push_back(offset + j * dims[i].stride);
    }
  }
  for (const int64_t offset : offsets) {
    arrays.push_back({static_cast<char*>(data) + offset * size, block_stride * size, run * size});
  }
}

}  // namespace

std::vector<CacheArray> block_arrays(const KvCacheLayer& layer) {
  std::vector<CacheArray> arrays;
  const auto size = static_cast<int64_t>(dtype_size(layer.dtype));
  for (void* side : {layer.key, layer.value}) {
    add_arrays(side, size, layer.block_stride,
               {{layer.block_size, layer.token_stride}, {layer.num_kv_heads, layer.head_stride}},
               layer.head_dim, arrays);
  }
  const KvScales& scales = layer.scales;
  if (scales.kind != KvScaleKind::kToken) return arrays;
  for (float* side : {scales.key, scales.value}) {
    add_arrays(side, sizeof(float), scales.block_stride,
               {{layer.block_size, scales.token_stride}, {layer.num_kv_heads, scales.head_stride}},
               1, arrays);
  }
  return arrays;
}

void check_copies(std::span<const BlockCopy> copies, int32_t num_blocks) {
  const char* where = "copy_blocks";
  std::vector<int32_t> targets;
  targets.reserve(copies.size());
  for (const BlockCopy& copy : copies) {
    for (const int32_t block : {copy.source, copy.target}) {
      check(block > 0 && block < num_blocks, where, "block id ", block, " is outside [1, ",
            num_blocks, ")");
    }
    targets.push_back(copy.target);
  }
  std::sort(targets.begin(), targets.end());
  const auto refuse = [&](int32_t block) {
    fail(ErrorKind::kInvalidArgument, where, "block ", block,
         " is written by one copy and named by another");
  };
  const auto twice = std::adjacent_find(targets.begin(), targets.end());
  if (twice != targets.end()) refuse(*twice);
  for (const BlockCopy& copy : copies) {
    if (std::binary_search(targets.begin(), targets.end(), copy.source)) refuse(copy.source);
  }
}

}  // namespace mrv1
