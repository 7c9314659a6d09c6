// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Copies to shared memory that run on their own, and what tells that they have arrived. Functions
// are named after the PTX instructions that they are, given above each. All are volatile and
// clobber memory: the compiler does not see what is copied and when, so it has to leave reads
// behind the waits, and copies behind the reads of what they overwrite.
#pragma once

#include <cstdint>

#include "shared_memory.cuh"

struct CUtensorMap_st;  // CUtensorMap, without all of cuda.h

namespace mrv1::cuda {

// --- cp.async, from sm_80 on. `valid` is whether to copy, or to write zeros. ---

// cp.async.cg.L2::128B: 16 bytes, around which the second cache fetches the whole line.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// The same with .L2::cache_hint, a policy of the second cache.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool valid,
                                            uint64_t policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to),
      "l"(from), "r"(valid ? 16 : 0), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(to),
               "l"(from), "l"(policy)
               : "memory");
}

// cp.async.cg without .L2::128B.
__device__ __forceinline__ void cp_async_16_no_prefetch(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// cp.async.ca of 4 bytes without .L2::128B.
__device__ __forceinline__ void cp_async_4_no_prefetch(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 4 : 0)
               : "memory");
}

// cp.async.ca.L2::cache_hint.L2::128B: 4 bytes, which .cg does not copy.
__device__ __forceinline__ void cp_async_4(uint32_t to, const void* from, uint64_t policy) {
  asm volatile("cp.async.ca.shared.global.L2::cache_hint.L2::128B [%0], [%1], 4, %2;" ::"r"(to),
               "l"(from), "l"(policy)
               : "memory");
}

// cp.async.commit_group: this thread's copies since the last one become a group.
__device__ __forceinline__ void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// cp.async.wait_group: until at most kPending of this thread's groups are on their way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The same for a number from kFirst to kLast that is not a constant, as the instruction's is. It
// may become a table of jumps.
template <int kLast, int kFirst = 0>
__device__ __forceinline__ void cp_async_wait_group(int pending) {
  if constexpr (kFirst < kLast) {
    if (pending != kFirst) return cp_async_wait_group<kLast, kFirst + 1>(pending);
  }
  cp_async_wait_group<kFirst>();
}

// --- mbarriers, from sm_90 on. ---

// mbarrier.init: a phase ends after so many arrivals.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// fence.mbarrier_init.release.cluster: other blocks, and copies, see what was initialized.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// mapa, mbarrier.arrive.shared::cluster: at the barrier in the same place in another block.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// mbarrier.arrive.expect_tx: arrives, and has the phase wait for so many bytes, too.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// mbarrier.try_wait.parity, again and again until the phase of that parity has ended.
__device__ __forceinline__ void mbarrier_wait_parity(uint64_t* barrier, int parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// cp.async.mbarrier.arrive.noinc: arrives, as one of those counted, once all copies of this thread
// have.
__device__ __forceinline__ void cp_async_mbarrier_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// fence.proxy.async: what cp.async has written, and this thread sees, wgmma sees from then on.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- Bulk copies of tensors (TMA), from sm_90 on: one thread copies a box, whose first element has
// the given coordinates, innermost first. The barrier is told of the bytes as they come. ---

// cp.async.bulk.tensor.2d
__device__ __forceinline__ void tma_load_2d(void* to, const CUtensorMap_st& map, uint64_t* barrier,
                                            int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
}

// cp.async.bulk.tensor.2d.L2::cache_hint, a policy of the second cache.
__device__ __forceinline__ void tma_load_2d(void* to, const CUtensorMap_st& map, uint64_t* barrier,
                                            int c0, int c1, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "l"(policy)
      : "memory");
}

// cp.async.bulk.tensor.2d.multicast::cluster: to the same place in every block of the cluster whose
// bit is set, each of which is told by its own barrier.
__device__ __forceinline__ void tma_load_2d_multicast(void* to, const CUtensorMap_st& map,
                                                      uint64_t* barrier, int c0, int c1,
                                                      uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "h"(blocks)
      : "memory");
}

// cp.async.bulk.tensor.3d.L2::cache_hint
__device__ __forceinline__ void tma_load_3d(void* to, const CUtensorMap_st& map, uint64_t* barrier,
                                            int c0, int c1, int c2, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "l"(policy)
      : "memory");
}

// cp.async.bulk.tensor.3d.multicast::cluster
__device__ __forceinline__ void tma_load_3d_multicast(void* to, const CUtensorMap_st& map,
                                                      uint64_t* barrier, int c0, int c1, int c2,
                                                      uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "h"(blocks)
      : "memory");
}

// cp.async.bulk.tensor.4d.L2::cache_hint
__device__ __forceinline__ void tma_load_4d(void* to, const CUtensorMap_st& map, uint64_t* barrier,
                                            int c0, int c1, int c2, int c3, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
      : "memory");
}

// cp.async.bulk.tensor.5d.L2::cache_hint
__device__ __forceinline__ void tma_load_5d(void* to, const CUtensorMap_st& map, uint64_t* barrier,
                                            int c0, int c1, int c2, int c3, int c4,
                                            uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4),
      "l"(policy)
      : "memory");
}

// cp.async.bulk.tensor.5d.multicast::cluster
__device__ __forceinline__ void tma_load_5d_multicast(void* to, const CUtensorMap_st& map,
                                                      uint64_t* barrier, int c0, int c1, int c2,
                                                      int c3, int c4, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4),
      "h"(blocks)
      : "memory");
}

// cp.async.bulk.prefetch.tensor.3d.L2: to the second cache alone, and nobody waits for it.
__device__ __forceinline__ void tma_prefetch_3d(const CUtensorMap_st& map, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(&map),
               "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}

// prefetch.tensormap: the map itself, for which the first copy would wait.
__device__ __forceinline__ void prefetch_tensormap(const CUtensorMap_st& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

}  // namespace mrv1::cuda
