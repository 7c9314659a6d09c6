// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "peer_memory.cuh"
#include "stage_view.h"

namespace mrv1::cuda {

// How stages wait for each other, and tell each other.
//
// Whoever writes: ordinary stores to the peer by any threads of a block, a barrier, then one
// thread's store of a word with release.sys (with several blocks: each fences its own stores for
// the system before it is counted, and the last one stores the word). Whoever waits: one thread
// finds the word with acquire.sys in its own memory. From there on what was written happens before
// all that comes after the waiting thread: other threads of the block behind a barrier, and later
// kernels of the stream, as each begins (or passes griddepcontrol.wait, whose guarantee covers all
// that the kernel before it has seen) after the waiting kernel has ended. Lines that an SM's first
// level cache has of older steps are dropped at that point, as for any other data that a kernel on
// another SM has written; the second level is where peers write to.

// What a lane waits for: until a word of its GPU's memory has grown to `least`.
struct StageWait {
  const uint64_t* word;  // null: this lane waits for nothing
  uint64_t least;
  PeerWait what;
  int rank;       // among all, whose doing it is
  uint64_t step;  // that it would be the doing of; 0: the one that runs
};

// Waits until all lanes have what they wait for; by a whole warp. Adds the time to the rank's
// counter if `is_counted`. False if the group has ended.
__device__ __forceinline__ bool await_stages(const StageView& view, const StageWait& wait,
                                             bool is_counted) {
  constexpr uint32_t kAllLanes = 0xffffffff;
  constexpr int kLooksPerClock = 64;
  constexpr unsigned kNap = 40;  // nanoseconds between looks
  const auto is_there = [&] { return wait.word == nullptr || load_flag(wait.word) >= wait.least; };
  bool arrived = is_there();
  if (__all_sync(kAllLanes, arrived)) return true;
  const uint64_t begin = device_clock_ns();
  PeerPatience patience;
  for (int looks = 1; !arrived; ++looks) {
    if (looks % kLooksPerClock == 0) {
      const uint64_t step = wait.step != 0 ? wait.step : *view.step;
      if (gives_up(view.watch, wait.what, step, wait.rank, &patience)) break;
    }
    __nanosleep(kNap);
    arrived = is_there();
  }
  const bool all_arrived = __all_sync(kAllLanes, arrived);
  if (is_counted && threadIdx.x % 32 == 0) {
    view.link.counters->waited_ns += device_clock_ns() - begin;
  }
  return all_arrived;
}

// For warps that only wait for something: lane 0 does.
__device__ __forceinline__ bool await_stage(const StageView& view, StageWait wait,
                                            bool is_counted) {
  if (threadIdx.x % 32 != 0) wait.word = nullptr;
  return await_stages(view, wait, is_counted);
}

// Whether a wait of this rank has found the group's end.
__device__ __forceinline__ bool has_ended(const StageView& view) {
  return load_word(&view.watch.state->ended) != 0;
}

}  // namespace mrv1::cuda
