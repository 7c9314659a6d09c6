// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Blocks write a share of the values each, straight into the buffers of the next stage. They load
// their first pieces while one warp looks whether the next stage has let go of what is there. A
// small message is one block's, whose last store tells the next stage; of several blocks, each
// fences what it has written and the last to be counted tells.
#include "ops/stage_send.h"

#include <algorithm>

#include "launch.h"
#include "stage_wait.cuh"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "stage_send";
constexpr int kThreads = 512;
// Pieces that a thread loads before it writes them.
constexpr int kInFlight = 4;
// As many as keep a link of NVLink busy; fewer have less to fence.
constexpr int64_t kMostBlocks = 64;

struct Message {
  const char* values[kMaxStageValues];
  int64_t bytes[kMaxStageValues];
  int32_t num_values;
};

// The thread's next pieces of a value, from number `first` on.
struct Pieces {
  uint4 pieces[kInFlight];

  __device__ __forceinline__ void load(const char* from, int64_t first, int64_t stride,
                                       int64_t count) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t piece = first + i * stride;
      if (piece < count) pieces[i] = reinterpret_cast<const uint4*>(from)[piece];
    }
  }
  __device__ __forceinline__ void store(char* to, int64_t first, int64_t stride,
                                        int64_t count) const {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t piece = first + i * stride;
      if (piece < count) reinterpret_cast<uint4*>(to)[piece] = pieces[i];
    }
  }
};

__global__ void __launch_bounds__(kThreads)
    stage_send_kernel(const __grid_constant__ cuda::StageView view,
                      const __grid_constant__ Message message) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const StageLink& link = view.link;
  const int64_t begin = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  Pieces pieces;
  pieces.load(message.values[0], begin, stride, message.bytes[0] / cuda::kPieceBytes);

  __shared__ bool is_free;
  uint64_t sent = 0;
  if (threadIdx.x < 32) {
    sent = link.counters->sent;
    // What a rank has after the end is nobody's to write to. Looked up beside the word.
    const bool has_ended = cuda::has_ended(view);
    const cuda::StageWait wait{&link.port->taken, sent, cuda::PeerWait::kValuesTaken,
                               view.rank_at(link.stage + 1), 0};
    const bool is_taken = cuda::await_stage(view, wait, blockIdx.x == 0);
    if (threadIdx.x == 0) is_free = is_taken && !has_ended;
  }
  __syncthreads();
  if (!is_free) return;

  for (int32_t value = 0; value < message.num_values; ++value) {
    const char* from = message.values[value];
    char* to = static_cast<char*>(link.next_values[value]);
    const int64_t count = message.bytes[value] / cuda::kPieceBytes;
    for (int64_t first = begin; first < count; first += kInFlight * stride) {
      if (value > 0 || first != begin) pieces.load(from, first, stride, count);
      pieces.store(to, first, stride, count);
    }
    // Less than a piece at the end.
    const int64_t byte = count * cuda::kPieceBytes + begin;
    if (byte < message.bytes[value]) to[byte] = from[byte];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (gridDim.x > 1) {
    __threadfence_system();
    uint32_t* count = &view.watch.state->sent_blocks;
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(count)
                 : "memory");
    if (before + 1 < gridDim.x) return;
    *count = 0;
  }
  link.counters->sent = sent + 1;
  cuda::store_flag(&link.next->arrived, sent + 1);
}

}  // namespace

namespace cuda {

void load_stage_send() { load_kernel(kOp, stage_send_kernel); }

}  // namespace cuda

void stage_send_cuda(const StageSendParams& params, const StepContext& ctx) {
  const cuda::StageView view = cuda::stage_view(kOp, ctx);
  check_internal(params.num_values == view.link.num_values && params.num_values > 0, kOp,
                 params.num_values, " values are sent, and ", view.link.num_values, " are linked");
  Message message{};
  message.num_values = params.num_values;
  int64_t pieces = 0;
  for (int32_t i = 0; i < params.num_values; ++i) {
    check_internal(cuda::is_vector_aligned(params.values[i]) &&
                       cuda::is_vector_aligned(view.link.next_values[i]),
                   kOp, "a value is not aligned to ", cuda::kVectorBytes, " bytes");
    message.values[i] = static_cast<const char*>(params.values[i]);
    message.bytes[i] = ctx.sizes.num_tokens * params.row_bytes[i];
    pieces += message.bytes[i] / cuda::kPieceBytes;
  }
  const int64_t blocks =
      std::clamp<int64_t>(cuda::divide_up(pieces, kThreads * kInFlight), 1, kMostBlocks);
  cuda::launch(kOp, ctx, stage_send_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
               view, message);
}

}  // namespace mrv1
