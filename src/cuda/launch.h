// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#include <string_view>
#include <utility>

#include "check.h"
#include "state/step_context.h"

namespace mrv1::cuda {

// Launches of a step overlap (programmatic dependent launch): a kernel may start while the one
// before it still runs. Every kernel that is launched by launch() therefore keeps three rules:
//
// 1. Every thread block calls wait_for_previous() on every path, blocks without work included:
//    what comes later relies on this kernel ending after all that came before it.
// 2. Before that call it reads nothing but weights, tables and parameters, and writes nothing to
//    global memory.
// 3. It calls launch_next() early, at the top or once its weights are requested: the next kernel's
//    blocks then take their places, and request their own weights, while this one still runs.
//    Behind its wait, where the next kernel is to read before its own what is older than this one.
//
// A kernel that follows an event of another stream, or a copy, is launched without overlap
// (Executable::run_apart): it then waits for all that comes before it, and later ones for it.
//
// Both do nothing on GPUs before Hopper, where launches wait for the kernel before them.

// Waits until all work before this kernel has ended and its writes are visible.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Allows the next kernel's blocks to start once every block of this one has called it or ended.
__device__ __forceinline__ void launch_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether what is launched next may start before its predecessor has ended.
bool may_overlap(const StepContext& ctx);

// Counts a launch among those of the step's device.
void count_launch(const StepContext& ctx);

// A range on the timeline of profilers; costs nothing when none is attached.
class OpRange {
 public:
  explicit OpRange(std::string_view op) {
    char name[64];
    const size_t length = op.copy(name, sizeof(name) - 1);
    name[length] = '\0';
    nvtxRangePushA(name);
  }
  ~OpRange() { nvtxRangePop(); }
  OpRange(const OpRange&) = delete;
  OpRange& operator=(const OpRange&) = delete;
};

// Throws kDevice naming op and launch if the launch failed, and with MRV1_SYNC=1 also if the kernel
// did.
void check_kernel(std::string_view op, const StepContext& ctx, cudaError_t status, dim3 grid,
                  dim3 block, size_t shared_bytes);

// Launches `kernel` for op in the step's stream; arguments convert to the kernel's parameter types.
// Dynamic shared memory above 48 KB must have been allowed before (allow_shared_memory).
template <typename... Params, typename... Args>
void launch(std::string_view op, const StepContext& ctx, void (*kernel)(Params...), dim3 grid,
            dim3 block, size_t shared_bytes, Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args));
  const OpRange range(op);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream_of(ctx);
  config.attrs = &overlap;
  config.numAttrs = may_overlap(ctx) ? 1 : 0;
  const cudaError_t status =
      cudaLaunchKernelEx(&config, kernel, static_cast<Params>(std::forward<Args>(args))...);
  count_launch(ctx);
  check_kernel(op, ctx, status, grid, block, shared_bytes);
}

// Loads a kernel on the current GPU, where its first launch would do so: that may wait for kernels
// that run, and those for it.
template <typename Kernel>
void load_kernel(std::string_view op, Kernel* kernel) {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), op,
             "cudaFuncGetAttributes");
}

// Allows a kernel `bytes` of dynamic shared memory; the driver remembers it.
template <typename Kernel>
void allow_shared_memory(std::string_view op, Kernel* kernel, size_t bytes) {
  check_cuda(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      op, "cudaFuncSetAttribute");
}

}  // namespace mrv1::cuda
