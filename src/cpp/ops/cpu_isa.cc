// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/cpu_isa.h"

#include <atomic>

#include "core/error.h"

namespace mrv1 {
namespace {

CpuIsa find_cpu_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? CpuIsa::kAvx512Bf16 : CpuIsa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuIsa::kAvx2;
#endif
  return CpuIsa::kPortable;
}

std::atomic<CpuIsa>& chosen_isa() {
  static std::atomic<CpuIsa> isa{default_cpu_isa()};
  return isa;
}

}  // namespace

CpuIsa detect_cpu_isa() {
  static const CpuIsa isa = find_cpu_isa();
  return isa;
}

CpuIsa default_cpu_isa() {
#if defined(__x86_64__)
  if (detect_cpu_isa() == CpuIsa::kAvx512Bf16 && __builtin_cpu_is("intel")) return CpuIsa::kAvx512;
#endif
  return detect_cpu_isa();
}

CpuIsa current_cpu_isa() { return chosen_isa().load(std::memory_order_relaxed); }

void force_cpu_isa(CpuIsa isa) {
  check(isa <= detect_cpu_isa(), "force_cpu_isa", "isa is ", cpu_isa_name(isa),
        " but this processor has ", cpu_isa_name(detect_cpu_isa()), " at most");
  chosen_isa().store(isa, std::memory_order_relaxed);
}

}  // namespace mrv1
