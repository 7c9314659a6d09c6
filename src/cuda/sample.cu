// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Two kernels over the logits. The first edits the few logits that a row's lists name, and then
// reads the row once: it finds the best logit of every tile of 1,024, lowest id first, and the sum
// of the tile's weights relative to it. The last of a row's blocks to finish combines them, which
// is all that a row without filters needs but for one tile, that of its token. So such rows are
// drawn while others are still read. The second kernel draws for the rest (sample_draw.cuh). For
// those with min_p or top_p and no top_k its blocks weigh the row's tiles once more, relative to
// the row's best, and the last one of them draws. Logprobs speak of the logits before edits: those
// are undone when the token is drawn.
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
constexpr int32_t kFinishBlocks = 264;
constexpr int kRescanWarps = 6;  // as many as have room for a tile each
// Tiles that a block reads before it edits them, and reads them again if it has to.
constexpr int32_t kTwiceRun = 2 * kScanWarps;
constexpr int32_t kOnceRun = 10 * kScanWarps;

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
                                    const SamplingRow& sampling, float scale) {
  ScanTargets targets{scratch.bests + scratch.at(logits_row)};
  targets.with_ids = !Temperature::applies(row, sampling);
  if (is_weighed(row, sampling)) {
    targets.first = {scratch.sums + scratch.at(logits_row), scale};
  }
  const bool has_logprobs = RawLogprobs::applies(row, sampling) && !has_raw_tiles(row, sampling);
  if (TopK::applies(row, sampling) || has_logprobs) {
    targets.pieces = scratch.pieces + scratch.piece_at(logits_row);
  }
  if (has_logprobs) {
    targets.second = cuda::raw_targets(scratch, logits_row).second;
  }
  return targets;
}

// True in all threads of the block that is the last of `count` to come here; it sees what the
// others wrote before. Leaves the counter at zero, as it was before the first.
__device__ bool is_last_block(int32_t* counter, int32_t count) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1) == count - 1;
    if (last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

struct ScanMemory {
  union {
    __align__(16) float buffers[kScanWarps][cuda::kTile];
    cuda::WholeRowMemory draw;
  };
  uint32_t edited[kOnceRun * kWarpSize];  // a bit an id
};

// A block's tiles of a row.
struct ScannedRow {
  const RowState& state;
  const Row& row;
  const SamplingRow& sampling;
  int32_t index, place;
  float* logits;
  int32_t vocab;
  int32_t first_tile, end_tile;
  bool has_edits;

  __device__ RowEditor<kScanThreads> editor(int32_t first, int32_t end) const {
    return {state,
            row,
            sampling,
            index,
            place,
            logits,
            first * cuda::kTile,
            min(end * cuda::kTile, vocab)};
  }
};

// What is rare is kept out of the way of what is not, whose registers it would take.
__device__ __noinline__ void edit(const ScannedRow& at) {
  RowEditor<kScanThreads> editor = at.editor(at.first_tile, at.end_tile);
  if (editor.can_restore()) editor.save(nullptr);
  editor.apply_all();
}

// Of a row whose logprobs speak of other logits than its draw: scans it before and after its edits.
// Edited logits are few, so that one read is enough where the edited row is not weighed. Where it
// is, runs are short enough to be in a cache the second time.
template <bool kVector>
__device__ __noinline__ void scan_raw_and_edited(const ScannedRow& at, const ScanTargets& raw,
                                                 const ScanTargets& targets, ScanMemory* memory) {
  const uint32_t* mask = at.sampling.grammar_mask;
  const uint32_t* allowed = allowed_mask(at.row, at.sampling);
  const bool is_read_twice = targets.first.sums != nullptr;
  const int32_t run = is_read_twice ? kTwiceRun : kOnceRun;
  uint32_t* edited = memory->edited;
  float* buffer = memory->buffers[threadIdx.x / kWarpSize];
  cuda::await_copies();  // of the kernel's beginning
#pragma unroll 1
  for (int32_t first = at.first_tile; first < at.end_tile; first += run) {
    const int32_t end = min(first + run, at.end_tile);
    const int32_t tile = first + threadIdx.x / kWarpSize;
    RowEditor<kScanThreads> editor = at.editor(first, end);
    if (is_read_twice) {
#pragma unroll 1
      for (int pass = 0; pass < 2; ++pass) {
        if (tile < end) cuda::Tile<kVector>::request(buffer, at.logits, tile, at.vocab);
        ScanTargets found = targets;
        if (pass == 0) found = raw;
        cuda::scan_tiles<kVector>(buffer, at.logits, at.vocab, tile, end, kScanWarps, mask,
                                  pass == 0 ? nullptr : allowed, found);
        __syncthreads();  // the run has been read
        if (pass == 0 && at.has_edits) {
          editor.save(nullptr);
          editor.apply_all();
        }
      }
      continue;
    }
    for (int32_t i = threadIdx.x; i < (end - first) * kWarpSize; i += kScanThreads) edited[i] = 0;
    __syncthreads();
    if (at.has_edits) editor.save(edited);
    if (tile < end) cuda::Tile<kVector>::request(buffer, at.logits, tile, at.vocab);
    cuda::scan_unedited<kVector>(buffer, at.logits, at.vocab, tile, first, end, mask, allowed,
                                 edited, raw, targets);
    __syncthreads();  // the run has been read
    if (!at.has_edits) continue;
    editor.apply_all();
    editor.each_edited([&](int32_t id, float logit) {
      if (!cuda::is_allowed(mask, id) || !cuda::is_allowed(allowed, id)) return;
      add_edited(targets, id, logit);
    });
  }
}

// Whether the scan draws the row's token itself: the rows without filters or logprobs.
__device__ bool is_drawn_by_scan(const Row& row, const SamplingRow& sampling) {
  return !RawLogprobs::applies(row, sampling) &&
         (!Temperature::applies(row, sampling) || draws_whole_row(row, sampling));
}

// The token of such a row, or kNoToken if it has none: then the second kernel sees why. By the last
// block of the row.
__device__ __noinline__ int32_t draw_scanned(cuda::WholeRowMemory* memory, const RowLogits& logits,
                                             const Row& row, const SamplingRow& sampling,
                                             const ScanTargets& targets, int32_t tiles) {
  if (!Temperature::applies(row, sampling)) {
    Best best = kNoBest;
    for (int32_t i = threadIdx.x; i < tiles; i += kScanThreads) {
      best = max(best, __ldcg(targets.bests + i));
    }
    best = cuda::block_max<kScanThreads>(best);
    return best == kNoBest || best == kNanBest ? kNoToken : cuda::best_id(best);
  }
  const Best best = cuda::load_tiles<kScanThreads>(memory, targets, tiles);
  if (best == kNoBest || best == kNanBest) return kNoToken;
  const uint64_t word = random_word(sampling.seed, static_cast<uint32_t>(row.total_len));
  const WeightRule rule{cuda::best_logit(best), targets.first.scale, 1};
  return cuda::draw_whole_row<kScanThreads>(memory, logits, rule, tiles, word);
}

// Grid (splits of split_tiles, logits rows), a warp per tile. Also sets `sampled` to "no token",
// and what the second kernel adds to to zero.
template <bool kVector>
__global__ void __launch_bounds__(kScanThreads, 8)
    scan_kernel(SampleParams params, RowState state, InferParams infer, Scratch scratch,
                int32_t split_tiles) {
  __shared__ ScanMemory memory;
  cuda::launch_next();
  cuda::wait_for_previous();
  const int64_t logits_row = blockIdx.y;
  const auto vocab = static_cast<int32_t>(params.vocab_size);
  float* logits = params.logits + logits_row * params.vocab_size;
  const int32_t first_tile = blockIdx.x * split_tiles;
  const int32_t end_tile = min(first_tile + split_tiles, scratch.tiles);
  const int32_t tile = first_tile + threadIdx.x / kWarpSize;
  float* buffer = memory.buffers[threadIdx.x / kWarpSize];
  // On its way before it is known whether the row is one.
  if (tile < end_tile) cuda::Tile<kVector>::request(buffer, logits, tile, vocab);
  const int32_t batch = infer.logits_batch[logits_row];
  const int32_t index = batch < 0 ? -1 : infer.row[batch];
  const int32_t place = infer.logits_place[logits_row];
  if (index < 0) {
    cuda::await_copies();
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      scratch.plans[logits_row].row = -1;
      infer.sampled[logits_row] = kNoToken;
    }
    return;
  }
  const SamplingRow& sampling = state.sampling[index];
  const Row row = row_at_place(state.rows[index], place);
  const bool is_drawn_here = is_drawn_by_scan(row, sampling);
  const float scale = Temperature::applies(row, sampling) ? Temperature::scale(sampling) : 0.0f;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    scratch.plans[logits_row] = RowPlan{is_drawn_here ? -1 : index, place, scale, 0};
    infer.sampled[logits_row] = kNoToken;
  }
  if (TopP::applies(row, sampling) && !TopK::applies(row, sampling)) {
    auto* classes = reinterpret_cast<ulonglong2*>(scratch.class_sums + logits_row * cuda::kClasses);
    for (int32_t i = blockIdx.x * kScanThreads + threadIdx.x; i < cuda::kClasses / 2;
         i += gridDim.x * kScanThreads) {
      classes[i] = make_ulonglong2(0, 0);
    }
  }
  const bool has_edits = RowEditor<kScanThreads>::applies(row, sampling);
  const ScanTargets targets = draw_targets(scratch, logits_row, row, sampling, scale);
  const ScannedRow at{state,  row,   sampling,   index,    place,
                      logits, vocab, first_tile, end_tile, has_edits};
  if (has_raw_tiles(row, sampling)) {
    scan_raw_and_edited<kVector>(at, cuda::raw_targets(scratch, logits_row), targets, &memory);
  } else {
    if (has_edits) {
      edit(at);
      cuda::await_copies();
      if (tile < end_tile) cuda::Tile<kVector>::request(buffer, logits, tile, vocab);
    }
    cuda::scan_tiles<kVector>(buffer, logits, vocab, tile, end_tile, kScanWarps,
                              sampling.grammar_mask, allowed_mask(row, sampling), targets);
  }
  if (!is_drawn_here) return;
  if (!is_last_block(infer.blocks_done + logits_row, static_cast<int32_t>(gridDim.x))) return;
  const int32_t token = draw_scanned(
      &memory.draw, {logits, vocab, sampling.grammar_mask, allowed_mask(row, sampling)}, row,
      sampling, targets, scratch.tiles);
  if (threadIdx.x != 0) return;
  if (token == kNoToken) {
    scratch.plans[logits_row].row = index;
  } else {
    infer.sampled[logits_row] = forced_token(state, index, sampling, row.total_len, token);
  }
}

union DrawMemory {
  cuda::LogprobMemory logprobs;
  struct {
    cuda::Histogram histogram;
    int32_t chosen;
  } slow;
  cuda::Candidates::Memory candidates;
  cuda::WholeRowMemory whole_row;
  __align__(16) float rescan[kRescanWarps][cuda::kTile];
  struct {
    unsigned long long tiles[cuda::kMaxTiles];
    unsigned long long classes[cuda::kClasses];
  } sums;
};

// Whether a row has anything above -inf. Whole block.
__device__ bool is_alive(const RowLogits& row) {
  int alive = 0;
  for (int32_t id = threadIdx.x; id < row.vocab; id += kDrawThreads)
    alive |= row.at(id) > -INFINITY;
  return __syncthreads_or(alive) != 0;
}

// The scan once more, by one block over the whole row. Returns the row's best.
__device__ __noinline__ Best rescan(const RowLogits& row, int32_t tiles, const ScanTargets& targets,
                                    float (*buffers)[cuda::kTile]) {
  const int32_t warp = threadIdx.x / kWarpSize;
  if (warp < kRescanWarps) {
    float* buffer = buffers[warp];
    if (warp < tiles) cuda::Tile<false>::request(buffer, row.logits, warp, row.vocab);
    cuda::scan_tiles<false>(buffer, row.logits, row.vocab, warp, tiles, kRescanWarps, row.mask,
                            row.second_mask, targets);
  }
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
  float scale;  // of its weights
  Best best;    // neither kNoBest nor kNanBest
  const Best* bests;
  const ScanTargets& targets;
  unsigned long long* weighed;
  unsigned long long* class_sums;
  int32_t tiles;
  int32_t split, num_splits, split_tiles;
  int32_t* blocks_done;
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
    least_total +=
        scale_weight(at.targets.first.sums[i], token_weight(cuda::best_logit(at.bests[i]), rule));
  }
  least_total = cuda::block_sum<kDrawThreads>(least_total);
  // The rounding of all that is far less than this margin.
  constexpr double kMargin = 1.0 - 0x1p-10;
  const double left_out = 1.0 - static_cast<double>(at.sampling.top_p);
  return static_cast<uint64_t>(kMargin * left_out * static_cast<double>(least_total) /
                               static_cast<double>(at.logits.vocab));
}

// Of rows with min_p or top_p and without top_k: the weight of all tokens decides. kNoToken if the
// tokens to sort are too many.
__device__ __noinline__ int32_t draw_weighed(DrawMemory* memory, const DrawRow& at,
                                             const WeightRule& rule, uint64_t word) {
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
  if (!is_last_block(at.blocks_done, at.num_splits)) return kAnotherBlock;
  if (!has_top_p) {
    const auto sum_of = [&](int32_t tile) -> uint64_t { return __ldcg(at.weighed + tile); };
    return draw_token(memory->whole_row.logits, at.logits, rule, kNoBest, at.tiles, sum_of, word);
  }
  const cuda::ClassEdge found = cuda::find_class(at.class_sums, at.sampling);
  cuda::Candidates candidates(&memory->candidates, at.logits, at.bests, at.tiles);
  if (!candidates.gather_class(found.cls, rule)) return kNoToken;
  candidates.weigh(cuda::kMaxCandidates, rule);
  const Best edge = candidates.edge(found.target);
  __syncthreads();  // the memory gets another use
  weigh_tiles(at.logits, rule, at.bests, edge, 0, at.tiles, memory->sums.tiles, {nullptr, 0});
  const auto sum_of = [&](int32_t tile) -> uint64_t { return memory->sums.tiles[tile]; };
  auto* tile_logits = reinterpret_cast<float*>(memory->sums.classes);
  return draw_token(tile_logits, at.logits, rule, edge, at.tiles, sum_of, word);
}

// Of rows whose tokens to sort are too many.
__device__ __noinline__ int32_t draw_slowly(DrawMemory* memory, const DrawRow& at,
                                            const WeightRule& rule, uint64_t word) {
  __syncthreads();  // the memory gets another use
  cuda::RowSampler sampler(at.logits, rule, &memory->slow.histogram, &memory->slow.chosen);
  Processors::run<ProcessorStage::kSet>(at.row, at.sampling, sampler);
  return sampler.draw(word);
}

// The row's token, or kAnotherBlock. Whole block.
__device__ int32_t draw(DrawMemory* memory, const DrawRow& at) {
  const Row& row = at.row;
  const SamplingRow& sampling = at.sampling;
  if (!Temperature::applies(row, sampling)) return cuda::best_id(at.best);
  const uint64_t word = random_word(sampling.seed, static_cast<uint32_t>(row.total_len));
  const WeightRule rule = cuda::weight_rule(row, sampling, cuda::best_logit(at.best), at.scale);
  if (draws_whole_row(row, sampling)) {
    cuda::load_tiles<kDrawThreads>(&memory->whole_row, at.targets, at.tiles);
    return cuda::draw_whole_row<kDrawThreads>(&memory->whole_row, at.logits, rule, at.tiles, word);
  }
  if (TopK::applies(row, sampling)) {
    cuda::Candidates candidates(&memory->candidates, at.logits, at.bests, at.tiles);
    if (sampling.top_k <= cuda::kMaxCandidates &&
        candidates.gather_best(sampling.top_k, cuda::kLeastOrdered, at.targets.pieces)) {
      const uint64_t sum = candidates.weigh(sampling.top_k, rule);
      return candidates.draw(TopP::applies(row, sampling) ? TopP::target(sampling, sum) : sum,
                             word);
    }
  } else {
    const int32_t token = draw_weighed(memory, at, rule, word);
    if (token != kNoToken) return token;
  }
  return draw_slowly(memory, at, rule, word);
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
  const RowPlan plan = scratch.plans[logits_row];
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
  const ScanTargets targets = draw_targets(scratch, logits_row, row, sampling, plan.scale);
  if (best == kNoBest && MinTokens::applies(row, sampling) && editor.can_restore()) {
    editor.restore();
    editor.apply_bias();
    editor.mask_stop_ids();
    if (!is_alive(logits)) {
      // The mask leaves nothing, so the row goes without.
      editor.restore();
      editor.apply_bias();
      editor.apply_penalties_and_bad_words();
      best = rescan(logits, tiles, targets, memory.rescan);
    }
  }
  int32_t token = kErrorToken;
  if (best != kNoBest && best != kNanBest) {
    token = draw(&memory, {logits, row, sampling, plan.scale, best, bests, targets,
                           scratch.weighed + scratch.at(logits_row),
                           scratch.class_sums + logits_row * cuda::kClasses, tiles, split,
                           num_splits, split_tiles, infer.blocks_done + logits_row});
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
    if (editor.can_restore()) editor.restore();
    const ScanTargets found =
        has_raw_tiles(row, sampling) ? cuda::raw_targets(scratch, logits_row) : targets;
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
  // Only rows that are shared have work for more than one block.
  const int32_t most = std::clamp(kFinishBlocks / rows, 1, scratch.tiles);
  const int32_t finish_tiles = (scratch.tiles + most - 1) / most;
  const bool vector = params.vocab_size % 4 == 0 &&
                      reinterpret_cast<uintptr_t>(params.logits) % sizeof(float4) == 0;
  cuda::launch(kOp, ctx, vector ? scan_kernel<true> : scan_kernel<false>,
               dim3(splits(scan_tiles), rows), kScanThreads, 0, params, ctx.rows, ctx.infer,
               scratch, scan_tiles);
  cuda::launch(kOp, ctx, finish_kernel, dim3(splits(finish_tiles), rows), kDrawThreads, 0, params,
               ctx.rows, ctx.infer, ctx.rings, scratch, finish_tiles);
}

}  // namespace mrv1
