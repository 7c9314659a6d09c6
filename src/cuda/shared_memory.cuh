// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Shared memory by its address, of a block and of the other blocks of its cluster. Functions are
// named after the PTX instructions that they are, given above each. They are volatile and clobber
// memory: the compiler does not see what memory an instruction reads or writes, so it has to leave
// them in order with barriers, copies and each other.
#pragma once

#include <cstdint>

namespace mrv1::cuda {

// cvta.to.shared: the address within shared memory, as PTX takes it. Touches no memory.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ld.shared.u32
__device__ __forceinline__ uint32_t ld_shared_u32(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// ld.shared.v2.u32
__device__ __forceinline__ uint2 ld_shared_v2_u32(uint32_t address) {
  uint2 value;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "r"(address)
               : "memory");
  return value;
}

// ld.shared.v4.u32
__device__ __forceinline__ uint4 ld_shared_v4_u32(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// ld.shared.v2.f32
__device__ __forceinline__ float2 ld_shared_v2_f32(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(value.x), "=f"(value.y)
               : "r"(address)
               : "memory");
  return value;
}

// ld.shared.v4.f32
__device__ __forceinline__ float4 ld_shared_v4_f32(uint32_t address) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// st.shared.v4.u32
__device__ __forceinline__ void st_shared_v4_u32(uint32_t address, const uint4& value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// --- Clusters, from sm_90 on. ---

// mapa, ld.shared::cluster.v4.f32: from the same place in the block of that rank.
__device__ __forceinline__ float4 ld_shared_cluster_v4_f32(uint32_t address, int rank) {
  float4 value;
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n"
      "}"
      : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
      : "r"(address), "r"(rank)
      : "memory");
  return value;
}

// mapa, st.shared::cluster.f32: to the same place in the block of that rank.
__device__ __forceinline__ void st_shared_cluster_f32(uint32_t address, int rank, float value) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "st.shared::cluster.f32 [there], %2;\n"
      "}" ::"r"(address),
      "r"(rank), "f"(value)
      : "memory");
}

// barrier.cluster.arrive.release: those that wait see what this thread has written.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

// barrier.cluster.wait.acquire: until all threads of the cluster have arrived.
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

}  // namespace mrv1::cuda
