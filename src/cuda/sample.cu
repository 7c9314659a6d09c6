// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Two kernels over the logits. The first edits the few logits that a row's lists name, and then
// reads the row once: it finds the best logit of every tile of 1,024, lowest id first, and the sum
// of the tile's weights relative to it. The second combines them, which is all that a row without
// filters needs but for one tile, that of its token. For rows with min_p or top_p its blocks weigh
// the row's tiles once more, relative to the row's best, and the last one of them to finish draws
// (sample_draw.cuh). Logprobs speak of the logits before edits: the second kernel undoes those when
// the token is drawn.
#include "sample.h"

#include <cmath>

#include "launch.h"
#include "sample_edits.cuh"
#include "sample_logprobs.cuh"
#include "sampling/sample.h"
#include "state/output_ring.h"

namespace mrv1 {
namespace {

using cuda::Best;
using cuda::kDrawThreads;
using cuda::kDrawWarps;
using cuda::kNanBest;
using cuda::kNoBest;
using cuda::kScanThreads;
using cuda::kScanWarps;
using cuda::kWarpSize;
using cuda::RowEditor;
using cuda::RowLogits;
using cuda::RowPlan;
using cuda::ScanTargets;
using cuda::Scratch;

constexpr std::string_view kOp = "sample";
constexpr int64_t kFinishBlocks = 528;
// Tiles that a block reads before it edits and reads them again.
constexpr int32_t kRawRun = 2 * kScanWarps;

__device__ const uint32_t* allowed_mask(const Row& row, const SamplingRow& sampling) {
  return AllowedTokens::applies(row, sampling) ? AllowedTokens::mask(sampling) : nullptr;
}

// Whether a row's logprobs speak of other logits than those that its token is drawn from.
__device__ bool has_raw_tiles(const Row& row, const SamplingRow& sampling) {
  return RawLogprobs::applies(row, sampling) && edits_logits(row, sampling);
}

// Weights that the scan sums up: those of the whole row's draw, and for top_p, which a bound on
// their sum saves work.
__device__ bool is_weighed(const Row& row, const SamplingRow& sampling) {
  return Temperature::applies(row, sampling) && !TopK::applies(row, sampling);
}

// What drawing needs to know of a row after its edits, and its logprobs if that is the row as the
// model made it.
__device__ ScanTargets draw_targets(const Scratch& scratch, int64_t logits_row, const Row& row,
                                    const SamplingRow& sampling) {
  ScanTargets targets{scratch.bests + scratch.at(logits_row)};
  targets.with_ids = !Temperature::applies(row, sampling);
  if (is_weighed(row, sampling)) {
    targets.first = {scratch.sums + scratch.at(logits_row), Temperature::scale(sampling)};
  }
  const bool has_logprobs = RawLogprobs::applies(row, sampling) && !has_raw_tiles(row, sampling);
  if (TopK::applies(row, sampling) || (has_logprobs && sampling.num_logprobs > 0)) {
    targets.pieces = scratch.pieces + scratch.piece_at(logits_row);
  }
  if (has_logprobs) {
    targets.second = cuda::raw_targets(scratch, logits_row, sampling.num_logprobs).second;
  }
  return targets;
}

// Grid (splits of split_tiles, logits rows), a warp per tile. Also sets `sampled` to "no token",
// and what the second kernel adds to to zero. Nothing is read of padding.
template <bool kVector>
__global__ void __launch_bounds__(kScanThreads, 8)
    scan_kernel(SampleParams params, RowState state, InferParams infer, Scratch scratch,
                int32_t split_tiles) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const int64_t logits_row = blockIdx.y;
  const int32_t batch = infer.logits_batch[logits_row];
  const int32_t index = batch < 0 ? -1 : infer.row[batch];
  const int32_t place = infer.logits_place[logits_row];
  const auto vocab = static_cast<int32_t>(params.vocab_size);
  float* logits = params.logits + logits_row * params.vocab_size;
  const int32_t first_tile = blockIdx.x * split_tiles;
  const int32_t end_tile = min(first_tile + split_tiles, scratch.tiles);
  const int32_t tile = first_tile + threadIdx.x / kWarpSize;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    scratch.plans[logits_row] = RowPlan{place, index, 0, 0};
    infer.sampled[logits_row] = kNoToken;
  }
  if (index < 0) return;

  cuda::Tile<kVector> held;
  if (tile < end_tile) held.load(logits, tile, vocab);
  const SamplingRow& sampling = state.sampling[index];
  const Row row = row_at_place(state.rows[index], place);
  if (TopP::applies(row, sampling)) {
    auto* classes = reinterpret_cast<ulonglong2*>(scratch.class_sums + logits_row * cuda::kClasses);
    for (int32_t i = blockIdx.x * kScanThreads + threadIdx.x; i < cuda::kClasses / 2;
         i += gridDim.x * kScanThreads) {
      classes[i] = make_ulonglong2(0, 0);
    }
  }
  const bool has_edits = RowEditor<kScanThreads>::applies(row, sampling);
  const bool has_raw = has_raw_tiles(row, sampling);
  const ScanTargets raw_targets = cuda::raw_targets(scratch, logits_row, sampling.num_logprobs);
  const ScanTargets targets = draw_targets(scratch, logits_row, row, sampling);
  // A row that is read as the model made it and as it was edited is read in runs short enough to be
  // in a cache the second time.
  bool is_held = true;
  const int32_t run = has_raw ? kRawRun : split_tiles;
#pragma unroll 1
  for (int32_t first = first_tile; first < end_tile; first += run) {
    const int32_t end = min(first + run, end_tile);
    const int32_t tile = first + threadIdx.x / kWarpSize;
#pragma unroll 1
    for (int pass = has_raw ? 0 : 1; pass < 2; ++pass) {
      const bool is_raw = pass == 0;
      if (!is_raw && has_edits) {
        __syncthreads();  // the run has been read
        RowEditor<kScanThreads> editor(state, row, sampling, index, place, logits,
                                       first * cuda::kTile, min(end * cuda::kTile, vocab));
        editor.apply_bias();
        editor.mask_stop_ids();
        editor.apply_penalties_and_bad_words();
        is_held = false;
      }
      if (!is_held && tile < end) held.load(logits, tile, vocab);
      is_held = false;
      ScanTargets chosen = targets;
      if (is_raw) chosen = raw_targets;
      scan_tiles(held, logits, vocab, tile, end, kScanWarps, sampling.grammar_mask,
                 is_raw ? nullptr : allowed_mask(row, sampling), chosen);
    }
  }
}

// True in all threads of the block that is the last of `count` to come here; it sees what the
// others wrote before.
__device__ bool is_last_block(uint32_t* counter, uint32_t count) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1u) == count - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

union DrawMemory {
  cuda::LogprobMemory logprobs;
  struct {
    cuda::Histogram histogram;
    int32_t chosen;
  } slow;
  cuda::Candidates::Memory candidates;
  struct {
    unsigned long long tiles[cuda::kMaxTiles];
    unsigned long long classes[cuda::kClasses];
  } sums;
};

// Whether min_tokens leaves anything alive. Whole block.
__device__ bool survives(const RowLogits& row, const SamplingRow& sampling) {
  const int32_t* stop_ids = sampling.words + sampling.stop_ids.offset;
  int survives = 0;
  for (int32_t id = threadIdx.x; id < row.vocab; id += kDrawThreads) {
    survives |= survives_stop_mask(row.at(id), id, stop_ids, sampling.stop_ids.count);
  }
  return __syncthreads_or(survives) != 0;
}

// The scan once more, by one block over the whole row. Returns the row's best.
__device__ Best rescan(const RowLogits& row, int32_t tiles, const ScanTargets& targets) {
  const int32_t tile = threadIdx.x / kWarpSize;
  cuda::Tile<false> held;
  if (tile < tiles) held.load(row.logits, tile, row.vocab);
  scan_tiles(held, row.logits, row.vocab, tile, tiles, kDrawWarps, row.mask, row.second_mask,
             targets);
  __syncthreads();
  Best best = kNoBest;
  for (int32_t i = threadIdx.x; i < tiles; i += kDrawThreads) best = max(best, targets.bests[i]);
  return cuda::block_max<kDrawThreads>(best);
}

// One logits row in the second kernel. A split is one of the blocks that weigh it together.
struct DrawRow {
  RowLogits logits;
  const Row& row;
  const SamplingRow& sampling;
  Best best;  // neither kNoBest nor kNanBest
  const Best* bests;
  const unsigned long long* sums;
  const uint32_t* pieces;
  unsigned long long* weighed;
  unsigned long long* class_sums;
  int32_t tiles;
  int32_t split, num_splits, split_tiles;
  uint32_t* finished;  // splits
};

constexpr int32_t kAnotherBlock = -3;  // not a token: another block of the row draws it

// Whether all blocks of a row in the second kernel weigh it. One block has those to itself that
// min_tokens may leave nothing of, since it then scans them anew.
__device__ bool is_shared(const Row& row, const SamplingRow& sampling) {
  return is_weighed(row, sampling) && !draws_whole_row(row, sampling) &&
         !MinTokens::applies(row, sampling);
}

// Weights up to the result cannot be in the set of top_p: all such tokens together weigh no more
// than what top_p leaves out. Whole block.
__device__ uint64_t weight_outside(const DrawRow& at, const WeightRule& rule) {
  uint64_t least_total = 0;
  for (int32_t i = threadIdx.x; i < at.tiles; i += kDrawThreads) {
    if (at.bests[i] == kNoBest) continue;
    least_total += scale_weight(at.sums[i], token_weight(cuda::best_logit(at.bests[i]), rule));
  }
  least_total = cuda::block_sum<kDrawThreads>(least_total);
  // The rounding of all that is far less than this margin.
  constexpr double kMargin = 1.0 - 0x1p-10;
  const double left_out = 1.0 - static_cast<double>(at.sampling.top_p);
  return static_cast<uint64_t>(kMargin * left_out * static_cast<double>(least_total) /
                               static_cast<double>(at.logits.vocab));
}

// Of rows that are shared: the weight of all tokens decides. kNoToken if the tokens to sort are too
// many.
__device__ int32_t draw_weighed(DrawMemory* memory, const DrawRow& at, const WeightRule& rule,
                                uint64_t word) {
  const bool has_top_p = TopP::applies(at.row, at.sampling);
  const int32_t first = at.split * at.split_tiles;
  const int32_t end = min(first + at.split_tiles, at.tiles);
  cuda::ClassSums classes{nullptr, 0};
  if (has_top_p) {
    const bool has_min_p = MinP::applies(at.row, at.sampling);
    classes = {memory->sums.classes, has_min_p ? 0 : weight_outside(at, rule)};
    for (int32_t i = threadIdx.x; i < cuda::kClasses; i += kDrawThreads) classes.sums[i] = 0;
  }
  weigh_tiles(at.logits, rule, at.bests, kNoBest, first, end, memory->sums.tiles, classes);
  for (int32_t i = threadIdx.x; i < end - first; i += kDrawThreads) {
    at.weighed[first + i] = memory->sums.tiles[i];
  }
  for (int32_t i = threadIdx.x; has_top_p && i < cuda::kClasses; i += kDrawThreads) {
    if (classes.sums[i] != 0) atomicAdd(&at.class_sums[i], classes.sums[i]);
  }
  if (!is_last_block(at.finished, at.num_splits)) return kAnotherBlock;
  if (!has_top_p) {
    const auto sum_of = [&](int32_t tile) -> uint64_t { return __ldcg(at.weighed + tile); };
    return draw_token(at.logits, rule, kNoBest, at.tiles, sum_of, word);
  }
  const cuda::ClassEdge found = cuda::find_class(at.class_sums, at.sampling);
  cuda::Candidates candidates(&memory->candidates, at.logits, at.bests, at.tiles);
  if (!candidates.gather_class(found.cls, rule)) return kNoToken;
  candidates.weigh(cuda::kMaxCandidates, rule);
  const Best edge = candidates.edge(found.target);
  __syncthreads();  // the memory gets another use
  weigh_tiles(at.logits, rule, at.bests, edge, 0, at.tiles, memory->sums.tiles, {nullptr, 0});
  const auto sum_of = [&](int32_t tile) -> uint64_t { return memory->sums.tiles[tile]; };
  return draw_token(at.logits, rule, edge, at.tiles, sum_of, word);
}

// The row's token, or kAnotherBlock. Whole block.
__device__ int32_t draw(DrawMemory* memory, const DrawRow& at) {
  const Row& row = at.row;
  const SamplingRow& sampling = at.sampling;
  if (!Temperature::applies(row, sampling)) return cuda::best_id(at.best);
  const uint64_t word = random_word(sampling.seed, static_cast<uint32_t>(row.total_len));
  const WeightRule rule = cuda::weight_rule(row, sampling, cuda::best_logit(at.best));
  if (draws_whole_row(row, sampling)) {
    return draw_whole_row(at.logits, rule, at.bests, at.sums, at.tiles, word);
  }
  if (TopK::applies(row, sampling)) {
    cuda::Candidates candidates(&memory->candidates, at.logits, at.bests, at.tiles);
    if (sampling.top_k <= cuda::kMaxCandidates &&
        candidates.gather_best(sampling.top_k, cuda::kLeastOrdered, at.pieces)) {
      const uint64_t sum = candidates.weigh(sampling.top_k, rule);
      return candidates.draw(TopP::applies(row, sampling) ? TopP::target(sampling, sum) : sum,
                             word);
    }
  } else {
    const int32_t token = draw_weighed(memory, at, rule, word);
    if (token != kNoToken) return token;
  }
  __syncthreads();  // the memory gets another use
  cuda::RowSampler sampler(at.logits, rule, &memory->slow.histogram, &memory->slow.chosen);
  Processors::run<ProcessorStage::kSet>(row, sampling, sampler);
  return sampler.draw(word);
}

// Grid (splits, logits rows); split 0 does what is one block's work.
__global__ void __launch_bounds__(kDrawThreads, 2)
    finish_kernel(SampleParams params, RowState state, InferParams infer, StepRings rings,
                  Scratch scratch, int32_t split_tiles) {
  __shared__ DrawMemory memory;
  cuda::launch_next();
  cuda::wait_for_previous();
  const int64_t logits_row = blockIdx.y;
  const auto split = static_cast<int32_t>(blockIdx.x);
  const int32_t tiles = scratch.tiles;
  RowPlan& plan = scratch.plans[logits_row];
  const Best* bests = scratch.bests + scratch.at(logits_row);
  const int32_t index = plan.row;
  if (index < 0) return;
  Best best = kNoBest;
  for (int32_t i = threadIdx.x; i < tiles; i += kDrawThreads) best = max(best, bests[i]);
  const SamplingRow& sampling = state.sampling[index];
  const Row row = row_at_place(state.rows[index], plan.place);
  auto num_splits = static_cast<int32_t>(gridDim.x);
  if (!is_shared(row, sampling)) {
    if (split != 0) return;
    num_splits = 1;
    split_tiles = tiles;
  }
  best = cuda::block_max<kDrawThreads>(best);

  const auto vocab = static_cast<int32_t>(params.vocab_size);
  float* const own = params.logits + logits_row * params.vocab_size;
  const RowLogits logits{own, vocab, sampling.grammar_mask, allowed_mask(row, sampling)};
  RowEditor<kDrawThreads> editor(state, row, sampling, index, plan.place, own, 0, vocab);
  const ScanTargets targets = draw_targets(scratch, logits_row, row, sampling);
  bool masks_stop_ids = MinTokens::applies(row, sampling);
  if (best == kNoBest && masks_stop_ids && editor.can_restore()) {
    editor.restore(masks_stop_ids);
    editor.apply_bias();
    if (!survives(logits, sampling)) {
      // The mask would leave nothing, so the row goes without.
      masks_stop_ids = false;
      editor.apply_penalties_and_bad_words();
      best = rescan(logits, tiles, targets);
    }
  }
  int32_t token = kErrorToken;
  if (best != kNoBest && best != kNanBest) {
    token = draw(&memory, {logits, row, sampling, best, bests, targets.first.sums, targets.pieces,
                           scratch.weighed + scratch.at(logits_row),
                           scratch.class_sums + logits_row * cuda::kClasses, tiles, split,
                           num_splits, split_tiles, &plan.finished});
  } else if (split != 0) {
    return;
  }
  if (token == kAnotherBlock) return;
  token = forced_token(state, index, sampling, row.total_len, token);
  if (threadIdx.x == 0) infer.sampled[logits_row] = token;

  if (!RawLogprobs::applies(row, sampling)) return;
  __syncthreads();  // the memory gets another use
  LogprobRecord* record = output_logprobs(rings.output_slot(), infer.max_requests, state,
                                          infer.logits_entry[logits_row], plan.place);
  if (token < 0) {
    if (threadIdx.x == 0) *record = cuda::no_logprobs(token);
  } else {
    if (editor.can_restore()) editor.restore(masks_stop_ids);
    const ScanTargets found = has_raw_tiles(row, sampling)
                                  ? cuda::raw_targets(scratch, logits_row, sampling.num_logprobs)
                                  : targets;
    write_logprobs(&memory.logprobs, {own, vocab, sampling.grammar_mask}, found, tiles, token,
                   RawLogprobs::count(sampling, vocab), record);
  }
  __threadfence_system();  // the record may lie in the host's memory
}

}  // namespace

int64_t sample_workspace_cuda(const WorkspaceLimits& limits) {
  return cuda::scratch_bytes(limits.vocab_size, limits.max_logits);
}

void sample_cuda(const SampleParams& params, const StepContext& ctx) {
  check_internal(params.vocab_size > 0 && params.vocab_size <= kMaxSampledVocab, kOp,
                 "vocab_size is ", params.vocab_size, ", expected 1 to ", kMaxSampledVocab);
  const int32_t rows = ctx.sizes.num_logits;
  if (rows == 0) return;
  const int64_t needed = cuda::scratch_bytes(params.vocab_size, rows);
  check_internal(static_cast<int64_t>(ctx.workspace_bytes) >= needed, kOp, "workspace has ",
                 ctx.workspace_bytes, " bytes, expected at least ", needed);
  const Scratch scratch = cuda::carve_scratch(ctx.workspace, params.vocab_size, rows);
  const auto splits = [&](int32_t split_tiles) {
    return (scratch.tiles + split_tiles - 1) / split_tiles;
  };
  const int32_t scan_tiles =
      cuda::tiles_of_split(scratch.tiles, rows, cuda::kScanBlocks, kScanWarps);
  const int32_t finish_tiles =
      cuda::tiles_of_split(scratch.tiles, rows, kFinishBlocks, kDrawWarps / cuda::kTileStretches);
  const bool vector = params.vocab_size % 4 == 0 &&
                      reinterpret_cast<uintptr_t>(params.logits) % sizeof(float4) == 0;
  cuda::launch(kOp, ctx, vector ? scan_kernel<true> : scan_kernel<false>,
               dim3(splits(scan_tiles), rows), kScanThreads, 0, params, ctx.rows, ctx.infer,
               scratch, scan_tiles);
  cuda::launch(kOp, ctx, finish_kernel, dim3(splits(finish_tiles), rows), kDrawThreads, 0, params,
               ctx.rows, ctx.infer, ctx.rings, scratch, finish_tiles);
}

}  // namespace mrv1
