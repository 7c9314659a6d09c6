// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Two kernels over the logits. The first finds the best logit of every tile of 1,024, lowest id
// first. The second combines them, which is all that a greedy row needs. For other rows its blocks
// weigh the row's tiles, and the last one of them to finish draws: it finds the tile, then the
// token in the tile. Weights are integers, so nothing depends on how the row was cut.
// top_p also weighs the row by classes of nearly equal logits: the edge of the set lies in one
// class, whose tokens are sorted in shared memory. With top_k there are few tokens to look at, and
// the tiles' best logits tell where: they are sorted and drawn from in shared memory by one block.
// Where that cannot be, and where min_tokens takes the best logit away, one block follows
// sampling/processors.h step by step.
#include "sample.h"

#include <algorithm>

#include "block.cuh"
#include "launch.h"
#include "sampling/processors.h"
#include "sampling/sample.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "sample";
constexpr int32_t kTile = 1024;
constexpr int kScanThreads = 128;
constexpr int kScanWarps = kScanThreads / cuda::kWarpSize;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / cuda::kWarpSize;
// Blocks that fill the largest GPUs in one go; more rows than this take a block each.
constexpr int64_t kScanBlocks = 2112;
constexpr int64_t kFinishBlocks = 528;
constexpr int32_t kMaxCandidates = 1024;  // that are sorted in shared memory
// Classes of logits by the exponent of their weight, in steps of 1 / 22 from -1 down to -47.
constexpr int32_t kClasses = 1024;
constexpr float kClassesPerUnit = 22.0f;
// Tiles are weighed in pieces of a warp each.
constexpr int32_t kPiece = 256;
constexpr int32_t kTilePieces = kTile / kPiece;
constexpr int32_t kMaxTiles = static_cast<int32_t>(kMaxSampledVocab / kTile);
constexpr int32_t kRadixBits = 8;
constexpr int32_t kRadix = 1 << kRadixBits;

// The best logit of a tile or row as one number: its key above, the complement of its id below, so
// that the largest number is the largest logit with the lowest id.
using Best = unsigned long long;
constexpr Best kNoBest = 0;          // nothing above -inf
constexpr Best kNanBest = ~Best{0};  // a NaN anywhere
// Below the code of any logit above -inf.
constexpr Best kLeastBest = (Best{static_cast<uint32_t>(kMinusInfKey) ^ 0x80000000u} + 1) << 32;

// Keys as unsigned numbers in the same order.
__device__ uint32_t ordered_key(float logit) {
  return static_cast<uint32_t>(logit_key(logit)) ^ 0x80000000u;
}

__device__ Best make_best(float logit, int32_t id) {
  return Best{ordered_key(logit)} << 32 | static_cast<uint32_t>(~id);
}

__device__ int32_t best_id(Best best) { return static_cast<int32_t>(~static_cast<uint32_t>(best)); }

// The largest logit, but for the sign of a zero.
__device__ float best_logit(Best best) {
  return logit_of_key(static_cast<int32_t>(static_cast<uint32_t>(best >> 32) ^ 0x80000000u));
}

// What the first kernel leaves about a logits row besides its best logits.
struct RowPlan {
  int32_t place;      // by how many tokens the row is longer here
  int32_t row;        // -1 for padding and masked rows
  uint32_t finished;  // splits of the second kernel that have weighed their tiles
  int32_t reserved;
};

// The workspace, by logits row.
struct Scratch {
  RowPlan* plans;
  Best* bests;                     // [tiles]
  unsigned long long* tile_sums;   // [tiles]
  unsigned long long* class_sums;  // [kClasses], for top_p
  int32_t tiles;

  __device__ Best* row_bests(int64_t row) const { return bests + row * tiles; }
  __device__ unsigned long long* row_sums(int64_t row) const { return tile_sums + row * tiles; }
  __device__ unsigned long long* row_classes(int64_t row) const {
    return class_sums + row * kClasses;
  }
};

int32_t num_tiles(int64_t vocab_size) {
  return static_cast<int32_t>((vocab_size + kTile - 1) / kTile);
}

int64_t scratch_bytes(int64_t vocab_size, int64_t rows) {
  const int64_t words = int64_t{2} * num_tiles(vocab_size) + kClasses;
  return rows * (static_cast<int64_t>(sizeof(RowPlan)) + words * int64_t{sizeof(uint64_t)});
}

Scratch carve(void* workspace, int64_t vocab_size, int64_t rows) {
  Scratch scratch;
  scratch.tiles = num_tiles(vocab_size);
  scratch.plans = static_cast<RowPlan*>(workspace);
  scratch.class_sums = reinterpret_cast<unsigned long long*>(scratch.plans + rows);
  scratch.bests = scratch.class_sums + rows * kClasses;
  scratch.tile_sums = scratch.bests + rows * scratch.tiles;
  return scratch;
}

// Four of a lane's logits in a tile: neighbours if rows are aligned for vectors, else a warp apart.
// Ids ascend from quad to quad, and logits past the end are -inf.
constexpr int kTileQuads = kTile / cuda::kWarpSize / 4;
template <bool kVector>
struct Quad {
  float logits[4];

  __device__ static int32_t id(int32_t tile, int quad, int i) {
    const int32_t lane = threadIdx.x % cuda::kWarpSize;
    return tile * kTile + quad * 4 * cuda::kWarpSize +
           (kVector ? 4 * lane + i : i * cuda::kWarpSize + lane);
  }

  // Volatile, so that the compiler does not move a load that is asked for early to its first use.
  __device__ void load(const float* row, int32_t tile, int quad, int32_t vocab) {
#pragma unroll
    for (float& logit : logits) logit = -INFINITY;
    if constexpr (kVector) {
      const int32_t first = id(tile, quad, 0);
      if (first >= vocab) return;
      asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(logits[0]), "=f"(logits[1]), "=f"(logits[2]), "=f"(logits[3])
                   : "l"(row + first));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t at = id(tile, quad, i);
        if (at < vocab) asm volatile("ld.global.f32 %0, [%1];" : "=f"(logits[i]) : "l"(row + at));
      }
    }
  }
};

// The best of a tile that a warp holds.
template <bool kVector>
__device__ Best best_of_tile(const Quad<kVector> (&quads)[kTileQuads], int32_t tile) {
  float best = -INFINITY;
  int32_t best_at = -1;
  bool has_nan = false;
#pragma unroll
  for (int quad = 0; quad < kTileQuads; ++quad) {
    const float* logits = quads[quad].logits;
    // fmaxf leaves a NaN out, and takes either zero for the other.
    const float largest = fmaxf(fmaxf(logits[0], logits[1]), fmaxf(logits[2], logits[3]));
#pragma unroll
    for (int i = 0; i < 4; ++i) has_nan |= logits[i] != logits[i];
    if (largest > best) {
      best = largest;
      const int i = logits[0] == largest   ? 0
                    : logits[1] == largest ? 1
                    : logits[2] == largest ? 2
                                           : 3;
      best_at = Quad<kVector>::id(tile, quad, i);
    }
  }
  Best result = has_nan ? kNanBest : best_at < 0 ? kNoBest : make_best(best, best_at);
#pragma unroll
  for (int offset = cuda::kWarpSize / 2; offset > 0; offset /= 2) {
    result = max(result, __shfl_xor_sync(cuda::kFullWarp, result, offset));
  }
  return result;
}

// Grid (splits of split_tiles, logits rows), a warp per tile. Also sets `sampled` to "no token",
// and what the second kernel adds to to zero. Nothing is read of padding.
template <bool kVector>
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(SampleParams params, InferParams infer, Scratch scratch, int32_t split_tiles) {
  cuda::launch_next();
  cuda::wait_for_previous();
  const int64_t row = blockIdx.y;
  const int32_t batch = infer.logits_batch[row];
  const auto vocab = static_cast<int32_t>(params.vocab_size);
  const float* logits = params.logits + row * params.vocab_size;
  const int32_t end_tile = min((blockIdx.x + 1) * split_tiles, scratch.tiles);
  int32_t tile = blockIdx.x * split_tiles + threadIdx.x / cuda::kWarpSize;

  Quad<kVector> quads[kTileQuads];
  const auto load = [&] {
    if (tile >= end_tile) return;
#pragma unroll
    for (int quad = 0; quad < kTileQuads; ++quad) quads[quad].load(logits, tile, quad, vocab);
  };
  if (batch < 0) {
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      scratch.plans[row] = RowPlan{-1, -1, 0, 0};
      infer.sampled[row] = kNoToken;
    }
    return;
  }
  load();
  for (int32_t i = blockIdx.x * kScanThreads + threadIdx.x; i < kClasses / 2;
       i += gridDim.x * kScanThreads) {
    reinterpret_cast<ulonglong2*>(scratch.row_classes(row))[i] = make_ulonglong2(0, 0);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    scratch.plans[row] = RowPlan{infer.logits_place[row], infer.row[batch], 0, 0};
    infer.sampled[row] = kNoToken;
  }
  while (tile < end_tile) {
    const Best best = best_of_tile<kVector>(quads, tile);
    if (threadIdx.x % cuda::kWarpSize == 0) scratch.row_bests(row)[tile] = best;
    tile += kScanWarps;
    load();
  }
}

__device__ WeightRule weight_rule(const Row& row, const SamplingRow& sampling, float max_logit) {
  const uint64_t min_weight = MinP::applies(row, sampling) ? MinP::min_weight(sampling) : 1;
  return WeightRule{max_logit, Temperature::scale(sampling), min_weight > 1 ? min_weight : 1};
}

// Live tokens by one digit of their key: how many, and their weight. In shared memory.
struct Histogram {
  unsigned long long count[kRadix];
  unsigned long long weight[kRadix];
};

// How much of the ordered tokens a prefix takes: at least `limit`, counted in tokens or in weight.
enum class Measure { kCount, kWeight };

// One row on its way from logits to a token, by one block. Every method is called by the whole
// block with the same arguments and leaves the same members in every thread. apply() implements the
// processors. A set is cut by a radix descent on the logit's key (8 bits a pass over the whole row,
// counted and weighed in shared histograms); ties at the edge and the draw go by id, in tiles of
// one id a thread. Nothing is kept between passes but the rule and the edge.
class RowSampler {
 public:
  __device__ RowSampler(float* logits, int32_t vocab_size, Histogram* histogram, int32_t* chosen)
      : logits_(logits), vocab_(vocab_size), histogram_(histogram), chosen_(chosen) {}

  // The first kernel's finding, valid if no logit has been edited since.
  __device__ void set_best(Best best) { best_ = best; }

  __device__ bool survives(const SamplingRow& sampling, const int32_t* stop_ids) const {
    int survives = 0;
    for (int32_t id = threadIdx.x; id < vocab_; id += kThreads) {
      survives |= survives_stop_mask(logits_[id], id, stop_ids, sampling.stop_ids.count);
    }
    return __syncthreads_or(survives) != 0;
  }

  // Finds the best logit anew.
  __device__ void scan() {
    Best best = kNoBest;
    for (int32_t id = threadIdx.x; id < vocab_; id += kThreads) {
      if (logits_[id] > -INFINITY) best = max(best, make_best(logits_[id], id));
    }
    best_ = cuda::block_max<kThreads>(best);
  }

  __device__ int32_t largest() const { return best_id(best_); }

  __device__ void apply(Temperature, const Row& row, const SamplingRow& sampling) {
    rule_ = weight_rule(row, sampling, best_logit(best_));
  }

  __device__ void apply(MinP, const Row&, const SamplingRow&) {}  // part of the rule

  __device__ void apply(TopK, const Row&, const SamplingRow& sampling) {
    narrow<Measure::kCount>(static_cast<uint64_t>(sampling.top_k));
  }

  __device__ void apply(TopP, const Row&, const SamplingRow& sampling) {
    narrow<Measure::kWeight>(TopP::target(sampling, kept_sum()));
  }

  // The first id at which the running sum of kept weights exceeds the target.
  __device__ int32_t draw(uint64_t word) {
    const uint64_t target = multiply_high(word, kept_sum());
    uint64_t before = 0;
    for (int32_t first = 0; first < vocab_ && before <= target; first += kThreads) {
      const int32_t id = first + static_cast<int32_t>(threadIdx.x);
      const uint64_t weight = id < vocab_ ? kept_weight(id) : 0;
      uint64_t tile;
      const uint64_t start = before + cuda::block_exclusive_scan<kThreads>(weight, &tile);
      if (start <= target && target < start + weight) *chosen_ = id;
      before += tile;
    }
    return chosen();
  }

 private:
  __device__ uint64_t kept_weight(int32_t id) const {
    const float logit = logits_[id];
    return is_kept(logit, id, edge_) ? token_weight(logit, rule_) : 0;
  }

  __device__ uint64_t kept_sum() const {
    uint64_t sum = 0;
    for (int32_t id = threadIdx.x; id < vocab_; id += kThreads) sum += kept_weight(id);
    return cuda::block_sum<kThreads>(sum);
  }

  // Weighs kept tokens whose key agrees with `prefix` above the digit, by that digit.
  __device__ void build_histogram(uint32_t prefix, int32_t shift) {
    __syncthreads();  // the last histogram has been read
    for (int32_t digit = threadIdx.x; digit < kRadix; digit += kThreads) {
      histogram_->count[digit] = 0;
      histogram_->weight[digit] = 0;
    }
    __syncthreads();
    const int32_t above = shift + kRadixBits;  // up to 32, so in 64 bits
    for (int32_t id = threadIdx.x; id < vocab_; id += kThreads) {
      const uint32_t key = ordered_key(logits_[id]);
      if (uint64_t{key} >> above != uint64_t{prefix} >> above) continue;
      const uint64_t weight = kept_weight(id);
      if (weight == 0) continue;
      const uint32_t digit = (key >> shift) & (kRadix - 1);
      atomicAdd(&histogram_->count[digit], 1ull);
      atomicAdd(&histogram_->weight[digit], static_cast<unsigned long long>(weight));
    }
    __syncthreads();
  }

  // Moves the edge to the end of the shortest prefix of the kept tokens that measures `limit` (at
  // least 1). Leaves it where it is if all of them together measure less.
  template <Measure kMeasure>
  __device__ void narrow(uint64_t limit) {
    const unsigned long long* amount =
        kMeasure == Measure::kCount ? histogram_->count : histogram_->weight;
    uint32_t prefix = 0;
    int32_t digit = 0;
    for (int32_t shift = 32 - kRadixBits; shift >= 0; shift -= kRadixBits) {
      build_histogram(prefix, shift);
      for (digit = kRadix - 1; amount[digit] < limit; --digit) {
        if (digit == 0) return;  // on the first pass only: later ones hold the limit
        limit -= amount[digit];
      }
      prefix |= static_cast<uint32_t>(digit) << shift;
    }
    // The last digit holds the tokens of one key, and so of one weight.
    const uint64_t weight = histogram_->weight[digit] / histogram_->count[digit];
    const uint64_t ties = kMeasure == Measure::kCount ? limit : (limit + weight - 1) / weight;
    const int32_t key = static_cast<int32_t>(prefix ^ 0x80000000u);
    edge_ = SetEdge{key, id_of_tie(key, ties)};
  }

  // The id of the n-th logit (from 1) with this key; there are as many.
  __device__ int32_t id_of_tie(int32_t key, uint64_t n) {
    uint64_t before = 0;
    for (int32_t first = 0; first < vocab_ && before < n; first += kThreads) {
      const int32_t id = first + static_cast<int32_t>(threadIdx.x);
      const uint64_t match = id < vocab_ && logit_key(logits_[id]) == key ? 1 : 0;
      uint64_t tile;
      const uint64_t rank = before + cuda::block_exclusive_scan<kThreads>(match, &tile) + 1;
      if (match != 0 && rank == n) *chosen_ = id;
      before += tile;
    }
    return chosen();
  }

  // What one thread has put into the shared word.
  __device__ int32_t chosen() const {
    __syncthreads();
    const int32_t id = *chosen_;
    __syncthreads();  // it may be written again
    return id;
  }

  float* logits_;
  int32_t vocab_;
  Histogram* histogram_;
  int32_t* chosen_;
  Best best_ = kNoBest;
  WeightRule rule_ = {};
  SetEdge edge_;
};

// Makes the row's stop ids from `first` to `end` -inf. Ends with a barrier.
__device__ void mask_stop_ids(float* logits, const int32_t* stop_ids, int32_t count, int32_t first,
                              int32_t end) {
  for (int32_t i = threadIdx.x; i < count; i += kThreads) {
    const int32_t id = stop_ids[i];
    if (id >= first && id < end) logits[id] = -INFINITY;
  }
  __syncthreads();
}

// token_weight() from the exponent, done early with tokens far below the largest.
__device__ uint64_t live_weight(float exponent, const WeightRule& rule) {
  if (!(exponent > -46.0f)) return 0;
  const uint64_t weight = fixed_point_exp2(exponent);
  return weight >= rule.min_weight ? weight : 0;
}

__device__ float exponent_of(float logit, const WeightRule& rule) {
  return weight_exponent(logit, rule.reference, rule.scale);
}

// Never falls when the logit falls.
__device__ int32_t class_of(float exponent) {
  const float depth = -1.0f - exponent;
  return static_cast<int32_t>(fminf(depth * kClassesPerUnit, static_cast<float>(kClasses - 1)));
}

// The logits first + lane, first + lane + 32, ... of a warp, all asked for before any is used.
template <int kCount>
__device__ void load_logits(const float* logits, int32_t vocab, int32_t first,
                            float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int32_t id = first + i * cuda::kWarpSize + threadIdx.x % cuda::kWarpSize;
    values[i] = id < vocab ? logits[id] : -INFINITY;
  }
}

// Adds a warp's weights to their classes. Equal logits would meet in one word, so they are added up
// before.
__device__ void add_to_class(unsigned long long* classes, int32_t cls, uint64_t weight) {
  const int32_t first = __shfl_sync(cuda::kFullWarp, cls, 0);
  if (__all_sync(cuda::kFullWarp, cls == first)) {
    weight = cuda::warp_sum(weight);
    if (threadIdx.x % cuda::kWarpSize != 0) return;
  }
  if (weight != 0) atomicAdd(&classes[cls], static_cast<unsigned long long>(weight));
}

// Weighs the tokens at or above `edge` of tiles from `first` to `end`, in pieces of a warp each,
// into sums[0, end - first) in shared memory, and by class if `classes`, in shared memory and zero,
// is given. Ends with a barrier.
__device__ void weigh_tiles(const float* logits, int32_t vocab, const WeightRule& rule,
                            const Best* bests, Best edge, int32_t first, int32_t end,
                            unsigned long long* sums, unsigned long long* classes) {
  const int32_t count = end - first;
  for (int32_t i = threadIdx.x; i < count; i += kThreads) sums[i] = 0;
  __syncthreads();
  const int32_t lane = threadIdx.x % cuda::kWarpSize;
  for (int32_t piece = threadIdx.x / cuda::kWarpSize; piece < count * kTilePieces;
       piece += kWarps) {
    const int32_t tile = piece / kTilePieces;
    if (bests[first + tile] < edge) continue;
    const int32_t first_id = first * kTile + piece * kPiece;
    float values[kPiece / cuda::kWarpSize];
    load_logits(logits, vocab, first_id, values);
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kPiece / cuda::kWarpSize; ++i) {
      const bool kept = make_best(values[i], first_id + i * cuda::kWarpSize + lane) >= edge;
      const float exponent = exponent_of(values[i], rule);
      const uint64_t weight = kept ? live_weight(exponent, rule) : 0;
      sum += weight;
      if (classes != nullptr) add_to_class(classes, class_of(exponent), weight);
    }
    sum = cuda::warp_sum(sum);
    if (lane == 0) atomicAdd(&sums[tile], static_cast<unsigned long long>(sum));
  }
  __syncthreads();
}

// The first id at which the running sum of the weights at or above `edge` exceeds the target; tile
// i weighs tile_sum(i). Whole block.
template <typename TileSum>
__device__ int32_t draw_token(const float* logits, int32_t vocab, const WeightRule& rule, Best edge,
                              int32_t tiles, const TileSum& tile_sum, uint64_t word) {
  __shared__ int32_t chosen;
  __shared__ uint64_t rest;  // of the target, inside the chosen tile
  static_assert(kMaxTiles <= 2 * kThreads && kTile == 2 * kThreads, "a thread has two of each");
  const int32_t thread = threadIdx.x;
  const int32_t tile = 2 * thread;
  const uint64_t first_sum = tile < tiles ? tile_sum(tile) : 0;
  const uint64_t second_sum = tile + 1 < tiles ? tile_sum(tile + 1) : 0;
  uint64_t total;
  const uint64_t before = cuda::block_exclusive_scan<kThreads>(first_sum + second_sum, &total);
  const uint64_t middle = before + first_sum;
  const uint64_t target = multiply_high(word, total);
  if (before <= target && target < middle + second_sum) {
    chosen = target < middle ? tile : tile + 1;
    rest = target - (target < middle ? before : middle);
  }
  __syncthreads();
  const int32_t id = chosen * kTile + 2 * thread;
  const uint64_t inside = rest;
  uint64_t weights[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float logit = id + i < vocab ? logits[id + i] : -INFINITY;
    weights[i] = make_best(logit, id + i) >= edge ? token_weight(logit, rule) : 0;
  }
  const uint64_t start = cuda::block_exclusive_scan<kThreads>(weights[0] + weights[1], &total);
  if (start <= inside && inside < start + weights[0] + weights[1]) {
    chosen = inside < start + weights[0] ? id : id + 1;
  }
  __syncthreads();
  return chosen;
}

// A row's best tokens, where they are few enough to be sorted. Every method is called by the whole
// block with the same arguments and returns the same in every thread.
class Candidates {
 public:
  struct Memory {
    Best found[kMaxCandidates];
    Best sorted[kMaxCandidates];
    unsigned long long weights[kMaxCandidates];
    int32_t count;
    int32_t chosen;
    Best floor;
  };
  static_assert(kMaxCandidates == 2 * kThreads, "a thread has two in order");

  __device__ Candidates(Memory* memory, const float* logits, int32_t vocab_size, const Best* bests,
                        int32_t tiles)
      : memory_(memory), logits_(logits), vocab_(vocab_size), bests_(bests), tiles_(tiles) {}

  // Takes at least the n best tokens above -inf, or all of them; n is at most the number of tiles,
  // so that the n-th best of the tiles' best is a bound. False if they are too many.
  __device__ bool gather_best(int32_t n) {
    static_assert(kMaxTiles <= kMaxCandidates);
    if (threadIdx.x == 0) memory_->floor = kLeastBest;
    for (int32_t i = threadIdx.x; i < tiles_; i += kThreads) memory_->found[i] = bests_[i];
    __syncthreads();
    for (int32_t tile = threadIdx.x; tile < tiles_; tile += kThreads) {
      const Best own = memory_->found[tile];
      int32_t rank = 0;
      for (int32_t i = 0; i < tiles_; ++i) rank += memory_->found[i] > own;
      if (rank == n - 1 && own > kLeastBest) memory_->floor = own;
    }
    __syncthreads();
    const Best floor = memory_->floor;
    return gather([=](Best best) { return best >= floor; },
                  [=](float, Best code) { return code >= floor; });
  }

  // Takes the tokens of one class. False if they are too many.
  __device__ bool gather_class(int32_t cls, const WeightRule& rule) {
    return gather([&](Best best) { return class_of(exponent_of(best_logit(best), rule)) <= cls; },
                  [&](float logit, Best) { return class_of(exponent_of(logit, rule)) == cls; });
  }

  // Weighs the first `limit` candidates; returns their sum.
  __device__ uint64_t weigh(int32_t limit, const WeightRule& rule) {
    const int32_t first = 2 * threadIdx.x;
    const int32_t end = min(limit, count_);
    for (int i = 0; i < 2; ++i) {
      own_[i] = first + i < end ? token_weight(best_logit(memory_->sorted[first + i]), rule) : 0;
    }
    uint64_t total;
    before_ = cuda::block_exclusive_scan<kThreads>(own_[0] + own_[1], &total);
    return total;
  }

  // The last token of the shortest prefix that weighs `target`, which is at least 1 and no more
  // than weigh() has returned.
  __device__ Best edge(uint64_t target) {
    const int32_t first = 2 * threadIdx.x;
    const uint64_t middle = before_ + own_[0];
    if (before_ < target && target <= middle + own_[1]) {
      memory_->floor = memory_->sorted[first + (target <= middle ? 0 : 1)];
    }
    __syncthreads();
    return memory_->floor;
  }

  // Keeps the shortest prefix that weighs `target` and draws from it.
  __device__ int32_t draw(uint64_t target, uint64_t word) {
    const int32_t first = 2 * threadIdx.x;
    if (before_ + own_[0] >= target) own_[1] = 0;
    if (before_ >= target) own_[0] = 0;
    memory_->weights[first] = own_[0];
    memory_->weights[first + 1] = own_[1];
    // Weights fall along the order, so that those that are left stand at the front.
    const int32_t kept = __syncthreads_count(own_[0] != 0) + __syncthreads_count(own_[1] != 0);
    const uint64_t total = cuda::block_sum<kThreads>(own_[0] + own_[1]);
    const uint64_t drawn = multiply_high(word, total);
    for (int32_t i = threadIdx.x; i < kept; i += kThreads) {
      const int32_t id = best_id(memory_->sorted[i]);
      uint64_t start = 0;
      for (int32_t j = 0; j < kept; ++j) {
        start += best_id(memory_->sorted[j]) < id ? memory_->weights[j] : 0;
      }
      if (start <= drawn && drawn < start + memory_->weights[i]) memory_->chosen = id;
    }
    __syncthreads();
    return memory_->chosen;
  }

 private:
  // Collects and sorts the tokens that `takes` likes, in tiles that `looks` likes the best of.
  template <typename Looks, typename Takes>
  __device__ bool gather(const Looks& looks, const Takes& takes) {
    if (threadIdx.x == 0) memory_->count = 0;
    __syncthreads();
    const int lane = threadIdx.x % cuda::kWarpSize;
    for (int32_t tile = threadIdx.x / cuda::kWarpSize; tile < tiles_; tile += kWarps) {
      if (bests_[tile] == kNoBest || !looks(bests_[tile])) continue;
      float values[kTile / cuda::kWarpSize];
      load_logits(logits_, vocab_, tile * kTile, values);
#pragma unroll
      for (int32_t i = 0; i < kTile / cuda::kWarpSize; ++i) {
        const Best code = make_best(values[i], tile * kTile + i * cuda::kWarpSize + lane);
        if (code < kLeastBest || !takes(values[i], code)) continue;
        const int32_t at = atomicAdd(&memory_->count, 1);
        if (at < kMaxCandidates) memory_->found[at] = code;
      }
    }
    __syncthreads();
    count_ = memory_->count;
    if (count_ > kMaxCandidates) return false;
    for (int32_t i = threadIdx.x; i < count_; i += kThreads) {
      const Best own = memory_->found[i];
      int32_t rank = 0;
      for (int32_t j = 0; j < count_; ++j) rank += memory_->found[j] > own;
      memory_->sorted[rank] = own;
    }
    __syncthreads();
    return true;
  }

  Memory* memory_;
  const float* logits_;
  int32_t vocab_;
  const Best* bests_;
  int32_t tiles_;
  int32_t count_ = 0;
  uint64_t own_[2] = {};  // weights of the thread's two candidates
  uint64_t before_ = 0;   // of all candidates before them
};

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

// Where the edge of top_p lies.
struct ClassEdge {
  int32_t cls;
  uint64_t target;  // what its tokens have to weigh up to the edge
};

// Whole block.
__device__ ClassEdge find_class(const unsigned long long* class_sums, const SamplingRow& sampling) {
  __shared__ ClassEdge found;
  static_assert(kClasses == 2 * kThreads);
  const ulonglong2 own = __ldcg(reinterpret_cast<const ulonglong2*>(class_sums) + threadIdx.x);
  uint64_t total;
  const uint64_t before = cuda::block_exclusive_scan<kThreads>(uint64_t{own.x + own.y}, &total);
  const uint64_t target = TopP::target(sampling, total);
  const uint64_t middle = before + own.x;
  const int32_t cls = 2 * static_cast<int32_t>(threadIdx.x);
  if (before < target && target <= middle + own.y) {
    found =
        target <= middle ? ClassEdge{cls, target - before} : ClassEdge{cls + 1, target - middle};
  }
  __syncthreads();
  return found;
}

__device__ bool contains(const int32_t* ids, int32_t count, int32_t id) {
  bool found = false;
  for (int32_t i = 0; i < count; ++i) found |= ids[i] == id;
  return found;
}

// Which edits of the logits a row asks for.
struct LogitEdits {
  bool masks_stop_ids = false;
  __device__ void apply(MinTokens, const Row&, const SamplingRow&) { masks_stop_ids = true; }
};

// Grid (splits, logits rows); split 0 does what is one block's work.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(SampleParams params, RowState state, InferParams infer, Scratch scratch,
                  int32_t split_tiles) {
  __shared__ union {
    Histogram histogram;
    Candidates::Memory candidates;
    struct {
      unsigned long long tiles[kMaxTiles];
      unsigned long long classes[kClasses];
    } sums;
  } memory;
  __shared__ int32_t chosen;
  cuda::launch_next();
  cuda::wait_for_previous();
  const int64_t logits_row = blockIdx.y;
  const int32_t split = blockIdx.x;
  const int32_t tiles = scratch.tiles;
  RowPlan& plan = scratch.plans[logits_row];
  const Best* bests = scratch.row_bests(logits_row);
  const int32_t index = plan.row;
  if (index < 0) return;
  Best best = kNoBest;
  for (int32_t i = threadIdx.x; i < tiles; i += kThreads) best = max(best, bests[i]);
  Row row = state.rows[index];
  row.total_len += plan.place;
  const SamplingRow sampling = state.sampling[index];
  const bool is_greedy = !Temperature::applies(row, sampling);
  if (is_greedy && split != 0) return;
  best = cuda::block_max<kThreads>(best);
  const auto finish = [&](int32_t token) {
    if (threadIdx.x != 0) return;
    infer.sampled[logits_row] = forced_token(state, index, sampling, row.total_len, token);
  };
  if (best == kNoBest || best == kNanBest) {
    if (split == 0) finish(kErrorToken);
    return;
  }

  const auto vocab = static_cast<int32_t>(params.vocab_size);
  float* logits = params.logits + logits_row * params.vocab_size;
  const int32_t* stop_ids = sampling.words + sampling.stop_ids.offset;
  LogitEdits edits;
  Processors::run<ProcessorStage::kLogits>(row, sampling, edits);
  const bool masks = edits.masks_stop_ids;
  // As long as the best logit stays, masking others changes nothing for a greedy row, and there is
  // a token left for any row.
  const bool loses_best = masks && contains(stop_ids, sampling.stop_ids.count, best_id(best));
  if (is_greedy && !loses_best) {
    finish(best_id(best));
    return;
  }

  const uint64_t word = random_word(sampling.seed, static_cast<uint32_t>(row.total_len));
  const WeightRule rule = weight_rule(row, sampling, best_logit(best));
  const bool has_top_k = TopK::applies(row, sampling);
  const bool has_top_p = TopP::applies(row, sampling);
  Candidates candidates(&memory.candidates, logits, vocab, bests, tiles);
  if (!loses_best && !has_top_k) {
    // The weight of all tokens decides.
    const int32_t first = split * split_tiles;
    const int32_t end = min(first + split_tiles, tiles);
    if (masks) {
      mask_stop_ids(logits, stop_ids, sampling.stop_ids.count, first * kTile,
                    min(end * kTile, vocab));
    }
    if (has_top_p) {
      for (int32_t i = threadIdx.x; i < kClasses; i += kThreads) memory.sums.classes[i] = 0;
    }
    weigh_tiles(logits, vocab, rule, bests, kNoBest, first, end, memory.sums.tiles,
                has_top_p ? memory.sums.classes : nullptr);
    unsigned long long* tile_sums = scratch.row_sums(logits_row);
    unsigned long long* class_sums = scratch.row_classes(logits_row);
    for (int32_t i = threadIdx.x; i < end - first; i += kThreads) {
      tile_sums[first + i] = memory.sums.tiles[i];
    }
    for (int32_t i = threadIdx.x; has_top_p && i < kClasses; i += kThreads) {
      if (memory.sums.classes[i] != 0) atomicAdd(&class_sums[i], memory.sums.classes[i]);
    }
    if (!is_last_block(&plan.finished, gridDim.x)) return;
    if (!has_top_p) {
      const auto sum_of = [=](int32_t tile) -> uint64_t { return __ldcg(tile_sums + tile); };
      finish(draw_token(logits, vocab, rule, kNoBest, tiles, sum_of, word));
      return;
    }
    const ClassEdge found = find_class(class_sums, sampling);
    if (candidates.gather_class(found.cls, rule)) {
      candidates.weigh(kMaxCandidates, rule);
      const Best edge = candidates.edge(found.target);
      __syncthreads();  // the memory gets another use
      weigh_tiles(logits, vocab, rule, bests, edge, 0, tiles, memory.sums.tiles, nullptr);
      const auto sum_of = [&](int32_t tile) -> uint64_t { return memory.sums.tiles[tile]; };
      finish(draw_token(logits, vocab, rule, edge, tiles, sum_of, word));
      return;
    }
  } else {
    if (split != 0) return;
    if (!loses_best) {
      if (masks) mask_stop_ids(logits, stop_ids, sampling.stop_ids.count, 0, vocab);
      // So many of the tiles' best may be masked now.
      const int64_t needed = int64_t{sampling.top_k} + (masks ? sampling.stop_ids.count : 0);
      if (needed <= tiles && candidates.gather_best(static_cast<int32_t>(needed))) {
        const uint64_t sum = candidates.weigh(sampling.top_k, rule);
        finish(candidates.draw(has_top_p ? TopP::target(sampling, sum) : sum, word));
        return;
      }
    }
  }

  __syncthreads();  // the memory gets another use
  RowSampler sampler(logits, vocab, &memory.histogram, &chosen);
  sampler.set_best(best);
  if (loses_best && sampler.survives(sampling, stop_ids)) {
    mask_stop_ids(logits, stop_ids, sampling.stop_ids.count, 0, vocab);
    sampler.scan();
  }
  if (is_greedy) {
    finish(sampler.largest());
    return;
  }
  Processors::run<ProcessorStage::kSet>(row, sampling, sampler);
  finish(sampler.draw(word));
}

// Tiles of a split such that about `blocks` blocks do `rows` rows: a multiple of the tiles that a
// block takes at once.
int32_t tiles_of_split(int32_t tiles, int32_t rows, int64_t blocks, int32_t at_once) {
  const int64_t unit = blocks * at_once;
  const int64_t rounds = (int64_t{tiles} * rows + unit - 1) / unit;
  const int64_t most = (tiles + at_once - 1) / at_once;
  return static_cast<int32_t>(std::min(rounds, most)) * at_once;
}

}  // namespace

int64_t sample_workspace_cuda(const WorkspaceLimits& limits) {
  return scratch_bytes(limits.vocab_size, limits.max_logits);
}

void sample_cuda(const SampleParams& params, const StepContext& ctx) {
  check_internal(params.vocab_size > 0 && params.vocab_size <= kMaxSampledVocab, kOp,
                 "vocab_size is ", params.vocab_size, ", expected 1 to ", kMaxSampledVocab);
  const StepSizes& sizes = ctx.sizes;
  if (sizes.num_logits == 0) return;
  const int64_t needed = scratch_bytes(params.vocab_size, sizes.num_logits);
  check_internal(static_cast<int64_t>(ctx.workspace_bytes) >= needed, kOp, "workspace has ",
                 ctx.workspace_bytes, " bytes, expected at least ", needed);
  const Scratch scratch = carve(ctx.workspace, params.vocab_size, sizes.num_logits);
  const auto splits = [&](int32_t split_tiles) {
    return (scratch.tiles + split_tiles - 1) / split_tiles;
  };
  const int32_t scan_tiles =
      tiles_of_split(scratch.tiles, sizes.num_logits, kScanBlocks, kScanWarps);
  const int32_t finish_tiles =
      tiles_of_split(scratch.tiles, sizes.num_logits, kFinishBlocks, kWarps / kTilePieces);
  const bool vector = params.vocab_size % 4 == 0 &&
                      reinterpret_cast<uintptr_t>(params.logits) % sizeof(float4) == 0;
  cuda::launch(kOp, ctx, vector ? scan_kernel<true> : scan_kernel<false>,
               dim3(splits(scan_tiles), sizes.num_logits), kScanThreads, 0, params, ctx.infer,
               scratch, scan_tiles);
  cuda::launch(kOp, ctx, finish_kernel, dim3(splits(finish_tiles), sizes.num_logits), kThreads, 0,
               params, ctx.rows, ctx.infer, scratch, finish_tiles);
}

}  // namespace mrv1
