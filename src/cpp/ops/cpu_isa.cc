// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "ops/cpu_isa.h"

#include <atomic>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "core/error.h"

namespace mrv1 {
namespace {

#if defined(__x86_64__)
// Tiles are off until a process asks Linux for them; its threads and children have what it has.
bool enable_amx_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

CpuIsa find_cpu_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512bf16")) return CpuIsa::kAvx512;
    const bool amx = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
    return amx && enable_amx_tiles() ? CpuIsa::kAmxBf16 : CpuIsa::kAvx512Bf16;
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
