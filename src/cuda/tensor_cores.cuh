// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Products on tensor cores, and loads and stores of their operands. Functions are named after the
// PTX instructions that they are, given above each.
#pragma once

#include <cstdint>

namespace mrv1::cuda {

// --- ldmatrix, stmatrix: 8 x 8 matrices of 16-bit elements. Lane l has the address of row l % 8 of
// matrix l / 8. Volatile, with memory clobbered: the compiler does not see that shared memory is
// read or written. ---

// ldmatrix.m8n8.x4
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// ldmatrix.m8n8.x4.trans
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// ldmatrix.m8n8.x2
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&d)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(address)
               : "memory");
}

// ldmatrix.m8n8.x2.trans
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&d)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(address)
               : "memory");
}

// stmatrix.m8n8.x4.trans, from sm_90 on.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t address, uint32_t a, uint32_t b,
                                                  uint32_t c, uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

// --- mma.sync: a warp's sum += a b, [16, 16] by [16, 8]. Neither volatile nor with a clobber: all
// that it reads and writes is named. ---

// mma.sync.m16n8k16.row.col.f32.bf16.bf16.f32
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&sum)[4], uint32_t a0, uint32_t a1,
                                                  uint32_t a2, uint32_t a3, uint32_t b0,
                                                  uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&sum)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
  mma_m16n8k16_bf16(sum, a[0], a[1], a[2], a[3], b0, b1);
}

// mma.sync.m16n8k16.row.col.f32.f16.f16.f32
__device__ __forceinline__ void mma_m16n8k16_f16(float (&sum)[4], const uint32_t (&a)[4],
                                                 uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- wgmma, of sm_90a: a warpgroup's products, which run on their own. All are volatile, so that
// they stay in order; fence, commit and wait clobber memory, so that other accesses to the operands
// and to sums stay on their side of them. ---

// The matrix descriptor of a tile of rows of 128 bytes, swizzled by 128 bytes, 8 rows after 8 rows.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}

// wgmma.fence: before products whose sums other instructions have written.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// wgmma.commit_group: the products since the last one become a group.
__device__ __forceinline__ void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// wgmma.wait_group: until at most kPending groups are running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No instruction: keeps what reads the sum behind the wait before it, which does not name it.
__device__ __forceinline__ void wgmma_fence_operand(float& sum) {
  asm volatile("" : "+f"(sum)::"memory");
}

// wgmma.mma_async.m64n<rows>k16.f32.bf16.bf16: sum += a b over 16 columns, of 64 rows of a and so
// many of b. a and b are descriptors, the registers behind those of the sum: `next` is floats + 1.
#define MRV1_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MRV1_REGISTERS_16 MRV1_REGISTERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MRV1_REGISTERS_24 MRV1_REGISTERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MRV1_REGISTERS_32 MRV1_REGISTERS_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define MRV1_REGISTERS_40 MRV1_REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define MRV1_REGISTERS_48 MRV1_REGISTERS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define MRV1_REGISTERS_56 MRV1_REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define MRV1_REGISTERS_64 MRV1_REGISTERS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define MRV1_SUM_8(i)                                                                   \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), \
      "+f"(sum[i + 5]), "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define MRV1_SUM_16(i) MRV1_SUM_8(i), MRV1_SUM_8(i + 8)
#define MRV1_SUM_24(i) MRV1_SUM_8(i), MRV1_SUM_16(i + 8)
#define MRV1_SUM_32(i) MRV1_SUM_8(i), MRV1_SUM_24(i + 8)
#define MRV1_SUM_40(i) MRV1_SUM_8(i), MRV1_SUM_32(i + 8)
#define MRV1_SUM_48(i) MRV1_SUM_8(i), MRV1_SUM_40(i + 8)
#define MRV1_SUM_56(i) MRV1_SUM_8(i), MRV1_SUM_48(i + 8)
#define MRV1_SUM_64(i) MRV1_SUM_8(i), MRV1_SUM_56(i + 8)
#define MRV1_WGMMA(rows, floats, next)                                                    \
  __device__ __forceinline__ void wgmma(float (&sum)[floats], uint64_t a, uint64_t b) {   \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #rows                                \
                 "k16.f32.bf16.bf16 {" MRV1_REGISTERS_##floats "}, %" #floats ", %" #next \
                                                               ", 1, 1, 1, 0, 0;"         \
                 : MRV1_SUM_##floats(0)                                                   \
                 : "l"(a), "l"(b));                                                       \
  }
MRV1_WGMMA(16, 8, 9)
MRV1_WGMMA(32, 16, 17)
MRV1_WGMMA(48, 24, 25)
MRV1_WGMMA(64, 32, 33)
MRV1_WGMMA(80, 40, 41)
MRV1_WGMMA(96, 48, 49)
MRV1_WGMMA(112, 56, 57)
MRV1_WGMMA(128, 64, 65)

}  // namespace mrv1::cuda
