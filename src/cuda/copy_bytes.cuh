// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mrv1::cuda {

// `count` threads, of which this is number `thread`, copy bytes in pieces as large as the addresses
// allow. The ranges do not overlap.
template <typename Piece>
__device__ __forceinline__ void copy_pieces(const char* from, char* to, int64_t bytes,
                                            int64_t thread, int64_t count) {
  const auto* source = reinterpret_cast<const Piece*>(from);
  auto* target = reinterpret_cast<Piece*>(to);
  const int64_t pieces = bytes / static_cast<int64_t>(sizeof(Piece));
#pragma unroll 4
  for (int64_t i = thread; i < pieces; i += count) target[i] = source[i];
}

__device__ __forceinline__ void copy_bytes(const char* from, char* to, int64_t bytes,
                                           int64_t thread, int64_t count) {
  const uint64_t all = reinterpret_cast<uint64_t>(from) | reinterpret_cast<uint64_t>(to) |
                       static_cast<uint64_t>(bytes);
  if (all % sizeof(uint4) == 0) {
    copy_pieces<uint4>(from, to, bytes, thread, count);
  } else if (all % sizeof(uint32_t) == 0) {
    copy_pieces<uint32_t>(from, to, bytes, thread, count);
  } else {
    copy_pieces<uint8_t>(from, to, bytes, thread, count);
  }
}

}  // namespace mrv1::cuda
