// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "clock.cuh"
#include "peer_memory.h"
#include "vector.cuh"

namespace mrv1::cuda {

// The device side of peer_memory.h: how a call begins, how values and flags reach a peer, and waits
// that end.

constexpr int kPeerThreads = 512;  // of a block at most
// Pieces that a thread loads before it writes them to a peer.
constexpr int kPeerInFlight = 4;

__host__ __device__ constexpr int64_t divide_up(int64_t count, int64_t unit) {
  return (count + unit - 1) / unit;
}

struct PeerGrid {
  dim3 blocks, threads;
};

// For a collective whose threads have `pieces` places to share. Blocks of few threads spread a
// small message over processors. `most` blocks at most, if it is not 0.
inline PeerGrid peer_grid(int64_t pieces, int32_t most) {
  constexpr int64_t kLeastThreads = 128;
  const int64_t limit = most > 0 ? std::min(most, kPeerBlocks) : kPeerBlocks;
  const int64_t blocks =
      std::min<int64_t>(std::max<int64_t>(divide_up(pieces, kLeastThreads), 1), limit);
  const int64_t warps = std::max<int64_t>(divide_up(divide_up(pieces, blocks), 32), 1);
  const int64_t threads = std::min<int64_t>(warps * 32, kPeerThreads);
  return {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads))};
}

// Eight bytes and the call that they belong to, written and read in one access: whoever finds the
// call's number has the bytes, without a fence.
struct alignas(16) PeerPacket {
  uint64_t bytes, call;
};
static_assert(sizeof(PeerPacket) == kPieceBytes);

__device__ __forceinline__ void store_packet(PeerPacket* to, PeerPacket packet) {
  asm volatile(
      "{ .reg .b128 both; mov.b128 both, {%1, %2}; st.relaxed.sys.global.b128 [%0], both; }" ::"l"(
          to),
      "l"(packet.bytes), "l"(packet.call)
      : "memory");
}

__device__ __forceinline__ PeerPacket load_packet(const PeerPacket* from) {
  PeerPacket packet;
  asm volatile(
      "{ .reg .b128 both; ld.relaxed.sys.global.b128 both, [%2]; mov.b128 {%0, %1}, both; }"
      : "=l"(packet.bytes), "=l"(packet.call)
      : "l"(from)
      : "memory");
  return packet;
}

__device__ __forceinline__ uint32_t load_word(const uint32_t* from) {
  uint32_t word;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
  return word;
}

__device__ __forceinline__ void store_word(uint32_t* to, uint32_t word) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* from) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
}

__device__ __forceinline__ void store_relaxed(uint64_t* to, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

// What the block wrote before a barrier is there for whoever finds the flag.
__device__ __forceinline__ void store_flag(uint64_t* to, uint64_t call) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(to), "l"(call) : "memory");
}

__device__ __forceinline__ uint64_t load_flag(const uint64_t* from) {
  uint64_t call;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(call) : "l"(from) : "memory");
  return call;
}

__device__ __forceinline__ PeerHeader* header_of(const PeerView& peers, int rank) {
  return reinterpret_cast<PeerHeader*>(peers.areas[rank]);
}

// Packets that `source` sends to `rank` in the call.
__device__ __forceinline__ PeerPacket* packets_of(const PeerView& peers, int rank, int source,
                                                  uint64_t call) {
  const int64_t slot = static_cast<int64_t>(call % 2) * peers.size + source;
  return reinterpret_cast<PeerPacket*>(peers.areas[rank] + sizeof(PeerHeader)) +
         slot * peers.packet_pieces * 2;
}

// Index of half `half` of a piece among the packets: lanes of a warp write side by side.
__device__ __forceinline__ int64_t packet_index(int64_t piece, int half) {
  return piece / 32 * 64 + half * 32 + piece % 32;
}

__device__ __forceinline__ void send_piece(PeerPacket* packets, int64_t piece, uint4 value,
                                           uint64_t call) {
  const uint64_t first = value.x | static_cast<uint64_t>(value.y) << 32;
  const uint64_t second = value.z | static_cast<uint64_t>(value.w) << 32;
  store_packet(packets + packet_index(piece, 0), {first, call});
  store_packet(packets + packet_index(piece, 1), {second, call});
}

__device__ __forceinline__ uint4 piece_of(PeerPacket first, PeerPacket second) {
  return make_uint4(static_cast<uint32_t>(first.bytes), static_cast<uint32_t>(first.bytes >> 32),
                    static_cast<uint32_t>(second.bytes), static_cast<uint32_t>(second.bytes >> 32));
}

// Where a rank gets parts that it is to sum, and sums of others, in the call.
__device__ __forceinline__ char* scatter_of(const PeerView& peers, int rank, uint64_t call) {
  return peers.areas[rank] + peers.bulk_offset +
         static_cast<int64_t>(call % 2) * peers.bulk_pieces * kPieceBytes;
}
__device__ __forceinline__ char* gather_of(const PeerView& peers, int rank, uint64_t call) {
  return peers.areas[rank] + peers.bulk_offset +
         static_cast<int64_t>(2 + call % 2) * peers.bulk_pieces * kPieceBytes;
}

// The number of the call that runs, from 1 on; 0 if the group has ended. By every thread, after
// wait_for_previous().
__device__ __forceinline__ uint64_t begin_call(const PeerView& peers) {
  uint64_t calls;
  const PeerState* state = peers.watch.state;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(calls) : "l"(&state->calls));
  const uint32_t ended = load_word(&state->ended);
  // Shares of blocks that were faster do not add up to a unit before the last one's.
  return ended != 0 ? 0 : calls / kCallUnit + 1;
}

// Counts the call, and is a barrier of the block: every thread has begun the call.
__device__ __forceinline__ void count_call(const PeerView& peers) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  const uint64_t share = blockIdx.x == 0 ? kCallUnit - (gridDim.x - 1) : 1;
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(&peers.watch.state->calls),
               "l"(share)
               : "memory");
}

// What a wait remembers between calls of gives_up(): since when its limit runs, when it looks next
// how far the pipeline is, and what it saw there.
struct PeerPatience {
  uint64_t start = 0, next_look = 0, steps = 0;
};

// From inside a wait that takes long: whether it has to end. A rank that is told to stop says what
// it waited for, too: the one that nobody has heard of is to blame for all waits.
//
// What a stage waits for may have to pass all others first, a long step in each, so its limit runs
// anew while any rank ends steps.
inline __device__ __noinline__ bool gives_up(const PeerWatch& watch, PeerWait wait, uint64_t call,
                                             int missing, PeerPatience* patience) {
  constexpr uint64_t kHearing = 200'000;  // nanoseconds until others have seen that they must stop
  constexpr uint64_t kLooks = 16;         // within the limit
  const uint64_t now = device_clock_ns();
  if (patience->start == 0) patience->start = now;
  if (load_word(&watch.state->ended) != 0) return true;
  PeerReport& report = watch.reports[watch.rank];
  const bool is_told = load_word(&report.stop) != 0;
  if (wait >= PeerWait::kValues && now >= patience->next_look) {
    uint64_t steps = 0;
    for (int rank = 0; rank < watch.num_ranks; ++rank) {
      steps += load_relaxed(&watch.reports[rank].step);
    }
    if (steps != patience->steps) patience->start = now;
    patience->steps = steps;
    patience->next_look = now + watch.timeout / kLooks;
  }
  if (!is_told && now - patience->start < watch.timeout) return false;
  if (atomicCAS(&watch.state->reported, 0u, 1u) == 0u) {
    report.wait = wait;
    report.missing = missing;
    report.call = call;
    if (!is_told) {
      for (int rank = 0; rank < watch.num_ranks; ++rank) store_word(&watch.reports[rank].stop, 1);
      while (device_clock_ns() - now < kHearing) __nanosleep(1000);
    }
    __threadfence_system();
    store_word(reinterpret_cast<uint32_t*>(&report.end),
               static_cast<uint32_t>(is_told ? PeerEnd::kTold : PeerEnd::kOutOfTime));
  }
  store_word(&watch.state->ended, 1);  // later calls do not wait for the time limit again
  return true;
}

// Waits until missing() is negative; otherwise that is the rank whose values have not come. False
// if the group has ended.
template <typename Missing>
__device__ __forceinline__ bool wait_for_peers(const PeerView& peers, PeerWait wait, uint64_t call,
                                               const Missing& missing) {
  constexpr int kLooksPerClock = 256;
  PeerPatience patience;
  for (int looks = 1;; ++looks) {
    const int rank = missing();
    if (rank < 0) return true;
    if (looks % kLooksPerClock != 0) continue;
    const PeerWatch& watch = peers.watch;
    if (gives_up(watch, wait, call, watch.rank - peers.rank + rank, &patience)) return false;
  }
}

// Tells the same block of every other rank that this one has sent its part. By all threads, after a
// barrier.
__device__ __forceinline__ void signal_peers(const PeerView& peers, int phase, uint64_t call) {
  const int rank = static_cast<int>(threadIdx.x);
  if (rank >= peers.size || rank == peers.rank) return;
  store_flag(&header_of(peers, rank)->flags[phase][peers.rank][blockIdx.x], call);
}

// Waits until the same block of every other rank has sent its part. By all threads; false for all
// if the group has ended.
__device__ __forceinline__ bool await_signals(const PeerView& peers, PeerWait wait, int phase,
                                              uint64_t call) {
  const int rank = static_cast<int>(threadIdx.x);
  bool arrived = true;
  if (rank < peers.size && rank != peers.rank) {
    const uint64_t* flag = &header_of(peers, peers.rank)->flags[phase][rank][blockIdx.x];
    arrived =
        wait_for_peers(peers, wait, call, [&] { return load_flag(flag) >= call ? -1 : rank; });
  }
  return __syncthreads_and(arrived) != 0;
}

// The elements of a piece from `first` on, of `count` in all; zeros after the last. `aligned`: base
// is, and first is a multiple of a vector.
template <typename T>
__device__ __forceinline__ uint4 load_elements(const T* base, int64_t first, int64_t count,
                                               bool aligned) {
  constexpr int kSize = kVectorSize<T>;
  if (aligned && first + kSize <= count) return *reinterpret_cast<const uint4*>(base + first);
  T elements[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) elements[i] = first + i < count ? base[first + i] : T{};
  uint4 piece;
  memcpy(&piece, elements, sizeof(piece));
  return piece;
}

}  // namespace mrv1::cuda
