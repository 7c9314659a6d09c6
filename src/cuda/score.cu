// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The scan of sample at temperature 1, and then its record of logprobs, for tokens that are given.
#include "launch.h"
#include "sample_logprobs.cuh"
#include "sampling/score.h"

namespace mrv1 {
namespace {

using cuda::Best;
using cuda::kDrawThreads;
using cuda::kScanThreads;
using cuda::kScanWarps;
using cuda::kWarpSize;
using cuda::Scratch;

constexpr std::string_view kOp = "score";

// Grid (splits of split_tiles, rows), a warp per tile.
template <bool kVector>
__global__ void __launch_bounds__(kScanThreads)
    score_scan_kernel(ScoreParams params, Scratch scratch, int32_t split_tiles) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const int64_t row = blockIdx.y;
  if (params.targets[row] < 0) return;
  const auto vocab = static_cast<int32_t>(params.vocab_size);
  const float* logits = params.logits + row * params.vocab_size;
  const int32_t first_tile = blockIdx.x * split_tiles;
  const int32_t end_tile = min(first_tile + split_tiles, scratch.tiles);
  const int32_t tile = first_tile + threadIdx.x / kWarpSize;
  cuda::Tile<kVector> held;
  if (tile < end_tile) held.load(logits, tile, vocab);
  scan_tiles(held, logits, vocab, tile, end_tile, kScanWarps, nullptr, nullptr,
             cuda::raw_targets(scratch, row, params.num_logprobs));
}

// A block a row.
__global__ void __launch_bounds__(kDrawThreads) score_kernel(ScoreParams params, Scratch scratch) {
  __shared__ cuda::LogprobMemory memory;
  cuda::launch_next();
  cuda::wait_for_previous();
  const int64_t row = blockIdx.x;
  const int32_t target = params.targets[row];
  if (target < 0) return;
  const auto vocab = static_cast<int32_t>(params.vocab_size);
  const cuda::ScanTargets found = cuda::raw_targets(scratch, row, params.num_logprobs);
  Best best = cuda::kNoBest;
  for (int32_t i = threadIdx.x; i < scratch.tiles; i += kDrawThreads) {
    best = max(best, found.bests[i]);
  }
  best = cuda::block_max<kDrawThreads>(best);
  LogprobRecord* record = logprob_record(params.records, params.max_logprobs, row);
  if (best == cuda::kNoBest || best == cuda::kNanBest) {
    if (threadIdx.x == 0) *record = cuda::no_logprobs(target);
    return;
  }
  write_logprobs(&memory, {params.logits + row * params.vocab_size, vocab}, found, scratch.tiles,
                 target, min(params.num_logprobs, vocab), record);
}

}  // namespace

void score_cuda(const ScoreParams& params, const StepContext& ctx) {
  check_internal(params.vocab_size > 0 && params.vocab_size <= kMaxSampledVocab, kOp,
                 "vocab_size is ", params.vocab_size, ", expected 1 to ", kMaxSampledVocab);
  if (params.num_rows == 0) return;
  const int64_t needed = cuda::scratch_bytes(params.vocab_size, params.num_rows);
  check_internal(static_cast<int64_t>(ctx.workspace_bytes) >= needed, kOp, "workspace has ",
                 ctx.workspace_bytes, " bytes, expected at least ", needed);
  const Scratch scratch = cuda::carve_scratch(ctx.workspace, params.vocab_size, params.num_rows);
  const auto rows = static_cast<int32_t>(params.num_rows);
  const int32_t split_tiles =
      cuda::tiles_of_split(scratch.tiles, rows, cuda::kScanBlocks, kScanWarps);
  const int32_t splits = (scratch.tiles + split_tiles - 1) / split_tiles;
  const bool vector = params.vocab_size % 4 == 0 &&
                      reinterpret_cast<uintptr_t>(params.logits) % sizeof(float4) == 0;
  cuda::launch(kOp, ctx, vector ? score_scan_kernel<true> : score_scan_kernel<false>,
               dim3(splits, rows), kScanThreads, 0, params, scratch, split_tiles);
  cuda::launch(kOp, ctx, score_kernel, rows, kDrawThreads, 0, params, scratch);
}

}  // namespace mrv1
