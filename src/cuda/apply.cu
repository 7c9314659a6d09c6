// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// One block carries out the record's commands straight from mapped host memory, kind after kind in
// the record's order. Frees stand before a barrier, as a freed row can be given away again in the
// same record; the other kinds write to places of their own. Block-id and stop-id writes are short,
// so a warp takes each; a token write may be a whole prompt, so the block shares it.
#include "block.cuh"
#include "check.h"
#include "state/infer_params.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "apply";
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / cuda::kWarpSize;

// Copies count ids with the threads `thread`, thread + stride, ...
__device__ void copy_ids(int32_t* target, const int32_t* source, int32_t count, int thread,
                         int stride) {
  for (int32_t i = thread; i < count; i += stride) target[i] = source[i];
}

__global__ void __launch_bounds__(kThreads)
    apply_kernel(const ControlHeader* record, RowState state) {
  const int thread = threadIdx.x;
  const int warp = thread / cuda::kWarpSize;
  const int lane = thread % cuda::kWarpSize;
  const int32_t* payload = record_array<int32_t>(record, record->payload_offset);

  const FreeRow* freed = record_array<FreeRow>(record, record->freed_offset);
  for (int32_t i = warp; i < record->num_freed; i += kWarps) {
    Row& row = state.rows[freed[i].row];
    if (row.generation != freed[i].generation) continue;
    if (lane == 0) row.phase = RowPhase::kFree;
    for (int32_t group = 0; group < state.num_groups; ++group) {
      const int64_t table = (int64_t{group} * state.num_rows + freed[i].row) * state.max_blocks;
      for (int32_t j = lane; j < state.max_blocks; j += cuda::kWarpSize) {
        state.block_table[table + j] = 0;
      }
    }
  }
  __syncthreads();

  const NewRow* added = record_array<NewRow>(record, record->new_rows_offset);
  for (int32_t i = thread; i < record->num_new_rows; i += kThreads) {
    state.rows[added[i].row] = added[i].state;
    state.sampling[added[i].row] = added[i].sampling;
  }

  const TokenWrite* tokens = record_array<TokenWrite>(record, record->token_writes_offset);
  for (int32_t i = 0; i < record->num_token_writes; ++i) {
    const TokenWrite write = tokens[i];
    copy_ids(state.tokens + int64_t{write.row} * state.max_model_len + write.start,
             payload + write.payload_start, write.count, thread, kThreads);
  }

  const BlockWrite* blocks = record_array<BlockWrite>(record, record->block_writes_offset);
  for (int32_t i = warp; i < record->num_block_writes; i += kWarps) {
    const BlockWrite write = blocks[i];
    const int64_t table = (int64_t{write.group} * state.num_rows + write.row) * state.max_blocks;
    copy_ids(state.block_table + table + write.start, payload + write.payload_start, write.count,
             lane, cuda::kWarpSize);
  }

  const StopWrite* stops = record_array<StopWrite>(record, record->stop_writes_offset);
  for (int32_t i = warp; i < record->num_stop_writes; i += kWarps) {
    const StopWrite write = stops[i];
    copy_ids(state.stop_ids + write.offset, payload + write.payload_start, write.count, lane,
             cuda::kWarpSize);
  }
}

}  // namespace

void apply_cuda(const ControlHeader& record, const RowState& state, const StepContext& ctx) {
  apply_kernel<<<1, kThreads, 0, cuda::stream_of(ctx)>>>(
      cuda::mapped_address(&record, kOp, "the control record"), state);
  cuda::check_launch(kOp);
}

}  // namespace mrv1
