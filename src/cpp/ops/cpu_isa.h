// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

namespace mrv1 {

// Instruction sets the CPU kernels are written for, in ascending order of preference. Results are
// reproducible bit for bit on one of them, and differ by rounding between them.
enum class CpuIsa {
  kPortable,    // the compiler's baseline
  kAvx2,        // AVX2 and FMA
  kAvx512,      // AVX-512 F, BW, DQ, VL
  kAvx512Bf16,  // the same with bfloat16 dot products. They treat subnormals as zero.
  kAmxBf16,     // kAvx512, with bfloat16 linears on AMX tiles. They treat subnormals as zero.
};

constexpr std::string_view cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kPortable:
      return "portable";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvx512:
      return "avx512";
    case CpuIsa::kAvx512Bf16:
      return "avx512_bf16";
    case CpuIsa::kAmxBf16:
      return "amx_bf16";
  }
  return "?";
}

// The best of them that this processor and operating system have. Detected once; Linux is then
// asked to let this process use AMX tiles.
CpuIsa detect_cpu_isa();

// The one the kernels use unless forced: detect_cpu_isa(), except that Intel's processors get
// kAvx512 in place of kAvx512Bf16: their dot products do half the work of two fused multiply-adds
// per cycle.
CpuIsa default_cpu_isa();

// The one the kernels use now.
CpuIsa current_cpu_isa();

// For tests: makes the kernels of the process use `isa` from the next call on. Throws
// kInvalidArgument if this processor does not have it.
void force_cpu_isa(CpuIsa isa);

}  // namespace mrv1
