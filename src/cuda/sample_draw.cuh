// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// From the tiles of a row to its token, by one block of kDrawThreads: what sample's second kernel
// consists of. Weights are integers, so nothing depends on how a row was cut. With top_k there are
// few tokens to look at, and the tiles' best logits tell where: they are sorted and drawn from in
// shared memory. top_p by itself weighs the row by classes of nearly equal logits: the edge of the
// set lies in one class, whose tokens are sorted. Where that cannot be, RowSampler follows
// sampling/processors.h step by step.
#pragma once

#include <cstdint>

#include "sample_scan.cuh"

namespace mrv1::cuda {

constexpr int kDrawThreads = 512;
constexpr int kDrawWarps = kDrawThreads / kWarpSize;
constexpr int32_t kMaxCandidates = 1024;  // that are sorted in shared memory
// Classes are 1 / 22 of a power of two wide, from exponent -1 down to -47.
constexpr float kClassesPerUnit = 22.0f;
// Tiles are weighed in stretches of a warp each.
constexpr int32_t kStretch = 256;
constexpr int32_t kTileStretches = kTile / kStretch;
constexpr int32_t kRadixBits = 8;
constexpr int32_t kRadix = 1 << kRadixBits;

// A row's logits under its masks, which are applied as it is read.
struct RowLogits {
  const float* logits;
  int32_t vocab;
  const uint32_t* mask = nullptr;
  const uint32_t* second_mask = nullptr;

  __device__ __forceinline__ float at(int32_t id) const {
    return is_allowed(mask, id) && is_allowed(second_mask, id) ? logits[id] : -INFINITY;
  }

  // The logits first + lane, first + lane + 32, ... of a warp, all asked for before any is used;
  // -inf past the end.
  template <int kCount>
  __device__ __forceinline__ void load(int32_t first, float (&values)[kCount]) const {
    const int32_t own = first + static_cast<int32_t>(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int32_t id = own + i * kWarpSize;
      values[i] = id < vocab ? logits[id] : -INFINITY;
    }
    if (mask == nullptr && second_mask == nullptr) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int32_t id = own + i * kWarpSize;
      if (id < vocab && !(is_allowed(mask, id) && is_allowed(second_mask, id))) {
        values[i] = -INFINITY;
      }
    }
  }
};

// Live tokens by one digit of their key: how many, and their weight. In shared memory.
struct Histogram {
  unsigned long long count[kRadix];
  unsigned long long weight[kRadix];
};

// How much of the ordered tokens a prefix takes: at least `limit`, counted in tokens or in weight.
enum class Measure { kCount, kWeight };

// Narrows a set of tokens to a prefix of their order: by a radix descent on the logit's key (8 bits
// a pass over the whole row, counted and weighed in shared histograms); ties at the edge go by id.
// Every method is called by the whole block with the same arguments and leaves the same members in
// every thread. Nothing is kept between passes but the edge.
class EdgeFinder {
 public:
  __device__ EdgeFinder(const RowLogits& row, Histogram* histogram, int32_t* chosen)
      : row_(row), histogram_(histogram), chosen_(chosen) {}

  __device__ SetEdge edge() const { return edge_; }
  __device__ const RowLogits& row() const { return row_; }

  __device__ bool keeps(float logit, int32_t id) const { return is_kept(logit, id, edge_); }

  // Moves the edge to the end of the shortest prefix of the kept tokens that measures `limit` (at
  // least 1); weight_of(logit, id) is 0 for tokens that are out. Leaves it where it is if all of
  // them together measure less.
  template <Measure kMeasure, typename WeightOf>
  __device__ void narrow(uint64_t limit, const WeightOf& weight_of) {
    const unsigned long long* amount =
        kMeasure == Measure::kCount ? histogram_->count : histogram_->weight;
    uint32_t prefix = 0;
    int32_t digit = 0;
    for (int32_t shift = 32 - kRadixBits; shift >= 0; shift -= kRadixBits) {
      build_histogram(prefix, shift, weight_of);
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

  // What one thread has put into the shared word.
  __device__ int32_t chosen() const {
    __syncthreads();
    const int32_t id = *chosen_;
    __syncthreads();  // it may be written again
    return id;
  }

 protected:
  // Weighs kept tokens whose key agrees with `prefix` above the digit, by that digit.
  template <typename WeightOf>
  __device__ void build_histogram(uint32_t prefix, int32_t shift, const WeightOf& weight_of) {
    __syncthreads();  // the last histogram has been read
    for (int32_t digit = threadIdx.x; digit < kRadix; digit += kDrawThreads) {
      histogram_->count[digit] = 0;
      histogram_->weight[digit] = 0;
    }
    __syncthreads();
    const int32_t above = shift + kRadixBits;  // up to 32, so in 64 bits
    for (int32_t id = threadIdx.x; id < row_.vocab; id += kDrawThreads) {
      const float logit = row_.at(id);
      const uint32_t key = ordered_key(logit);
      if (uint64_t{key} >> above != uint64_t{prefix} >> above) continue;
      const uint64_t weight = keeps(logit, id) ? weight_of(logit) : 0;
      if (weight == 0) continue;
      const uint32_t digit = (key >> shift) & (kRadix - 1);
      atomicAdd(&histogram_->count[digit], 1ull);
      atomicAdd(&histogram_->weight[digit], static_cast<unsigned long long>(weight));
    }
    __syncthreads();
  }

  // The id of the n-th logit (from 1) with this key; there are as many.
  __device__ int32_t id_of_tie(int32_t key, uint64_t n) {
    uint64_t before = 0;
    for (int32_t first = 0; first < row_.vocab && before < n; first += kDrawThreads) {
      const int32_t id = first + static_cast<int32_t>(threadIdx.x);
      const uint64_t match = id < row_.vocab && logit_key(row_.at(id)) == key ? 1 : 0;
      uint64_t tile;
      const uint64_t rank = before + block_exclusive_scan<kDrawThreads>(match, &tile) + 1;
      if (match != 0 && rank == n) *chosen_ = id;
      before += tile;
    }
    return chosen();
  }

  RowLogits row_;
  Histogram* histogram_;
  int32_t* chosen_;
  SetEdge edge_;
};

__device__ inline WeightRule weight_rule(const Row& row, const SamplingRow& sampling,
                                         float reference) {
  const uint64_t min_weight = MinP::applies(row, sampling) ? MinP::min_weight(sampling) : 1;
  return WeightRule{reference, Temperature::scale(sampling), min_weight > 1 ? min_weight : 1};
}

// One row with filters on its way from logits to a token, processor by processor: the slow way.
class RowSampler : public EdgeFinder {
 public:
  __device__ RowSampler(const RowLogits& row, const WeightRule& rule, Histogram* histogram,
                        int32_t* chosen)
      : EdgeFinder(row, histogram, chosen), rule_(rule) {}

  __device__ auto weight() const {
    return [rule = rule_](float logit) { return token_weight(logit, rule); };
  }

  __device__ void apply(Temperature, const Row&, const SamplingRow&) {}  // part of the rule
  __device__ void apply(MinP, const Row&, const SamplingRow&) {}         // as well

  __device__ void apply(TopK, const Row&, const SamplingRow& sampling) {
    narrow<Measure::kCount>(static_cast<uint64_t>(sampling.top_k), weight());
  }

  __device__ void apply(TopP, const Row&, const SamplingRow& sampling) {
    narrow<Measure::kWeight>(TopP::target(sampling, kept_sum()), weight());
  }

  // The first id at which the running sum of kept weights exceeds the target.
  __device__ int32_t draw(uint64_t word) {
    const uint64_t target = multiply_high(word, kept_sum());
    uint64_t before = 0;
    for (int32_t first = 0; first < row_.vocab && before <= target; first += kDrawThreads) {
      const int32_t id = first + static_cast<int32_t>(threadIdx.x);
      const uint64_t weight = id < row_.vocab ? kept_weight(id) : 0;
      uint64_t tile;
      const uint64_t start = before + block_exclusive_scan<kDrawThreads>(weight, &tile);
      if (start <= target && target < start + weight) *chosen_ = id;
      before += tile;
    }
    return chosen();
  }

 private:
  __device__ uint64_t kept_weight(int32_t id) const {
    const float logit = row_.at(id);
    return keeps(logit, id) ? token_weight(logit, rule_) : 0;
  }

  __device__ uint64_t kept_sum() const {
    uint64_t sum = 0;
    for (int32_t id = threadIdx.x; id < row_.vocab; id += kDrawThreads) sum += kept_weight(id);
    return block_sum<kDrawThreads>(sum);
  }

  WeightRule rule_;
};

__device__ __forceinline__ float exponent_of(float logit, const WeightRule& rule) {
  return weight_exponent(logit, rule.reference, rule.scale);
}

// token_weight() from the exponent, done early with tokens far below the largest.
__device__ __forceinline__ uint64_t live_weight(float exponent, const WeightRule& rule) {
  if (!(exponent > -46.0f)) return 0;
  const uint64_t weight = fixed_point_exp2(exponent);
  return weight >= rule.min_weight ? weight : 0;
}

// Never falls when the logit falls.
__device__ __forceinline__ int32_t class_of(float exponent) {
  const float depth = -1.0f - exponent;
  return static_cast<int32_t>(fminf(depth * kClassesPerUnit, static_cast<float>(kClasses - 1)));
}

// Adds a warp's weights to their classes. Equal logits would meet in one word, so they are added up
// before.
__device__ __forceinline__ void add_to_class(unsigned long long* classes, int32_t cls,
                                             uint64_t weight) {
  const int32_t first = __shfl_sync(kFullWarp, cls, 0);
  if (__all_sync(kFullWarp, cls == first)) {
    weight = warp_sum(weight);
    if (threadIdx.x % kWarpSize != 0) return;
  }
  if (weight != 0) atomicAdd(&classes[cls], static_cast<unsigned long long>(weight));
}

// Classes of a row's weights, in shared memory and zero. Weights up to `lump` cannot be in the set:
// they go to the last class all together, which spares an atomic addition each.
struct ClassSums {
  unsigned long long* sums;  // [kClasses]; null: not wanted
  uint64_t lump;
};

// Weighs the tokens at or above `edge` of tiles from `first` to `end`, in stretches of a warp each,
// into sums[0, end - first) in shared memory, and by class. Ends with a barrier.
__device__ inline void weigh_tiles(const RowLogits& row, const WeightRule& rule, const Best* bests,
                                   Best edge, int32_t first, int32_t end, unsigned long long* sums,
                                   const ClassSums& classes) {
  const int32_t count = end - first;
  for (int32_t i = threadIdx.x; i < count; i += kDrawThreads) sums[i] = 0;
  __syncthreads();
  const int32_t lane = threadIdx.x % kWarpSize;
  uint64_t lumped = 0;
  for (int32_t stretch = threadIdx.x / kWarpSize; stretch < count * kTileStretches;
       stretch += kDrawWarps) {
    const int32_t tile = stretch / kTileStretches;
    const Best best = bests[first + tile];
    // No token of a tile weighs more than its best, which may be without its id.
    if (best >> 32 < edge >> 32 || best == kNoBest) continue;
    if (token_weight(best_logit(best), rule) == 0) continue;
    const int32_t first_id = first * kTile + stretch * kStretch;
    float values[kStretch / kWarpSize];
    row.load(first_id, values);
    uint64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kStretch / kWarpSize; ++i) {
      const bool kept = make_best(values[i], first_id + i * kWarpSize + lane) >= edge;
      const float exponent = exponent_of(values[i], rule);
      const uint64_t weight = kept ? live_weight(exponent, rule) : 0;
      sum += weight;
      if (classes.sums == nullptr) continue;
      const bool counts = weight > classes.lump;
      lumped += counts ? 0 : weight;
      if (__any_sync(kFullWarp, counts)) {
        add_to_class(classes.sums, class_of(exponent), counts ? weight : 0);
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) atomicAdd(&sums[tile], static_cast<unsigned long long>(sum));
  }
  if (classes.sums != nullptr) {
    lumped = warp_sum(lumped);
    if (lane == 0 && lumped != 0) {
      atomicAdd(&classes.sums[kClasses - 1], static_cast<unsigned long long>(lumped));
    }
  }
  __syncthreads();
}

// A number's place in an ordered list of amounts: which one, and what is left of the number there.
struct ListPlace {
  int32_t index;
  uint64_t rest;
};

// Finds multiply_high(word, sum of amounts) among amount(0 ... count - 1), count <= 2 *
// kDrawThreads. Whole block.
template <typename Amount>
__device__ ListPlace find_place(int32_t count, const Amount& amount, uint64_t word) {
  __shared__ ListPlace found;
  static_assert(kMaxTiles <= 2 * kDrawThreads && kTile == 2 * kDrawThreads, "a thread has two");
  const int32_t own = 2 * static_cast<int32_t>(threadIdx.x);
  const uint64_t first = own < count ? amount(own) : 0;
  const uint64_t second = own + 1 < count ? amount(own + 1) : 0;
  uint64_t total;
  const uint64_t before = block_exclusive_scan<kDrawThreads>(first + second, &total);
  const uint64_t middle = before + first;
  const uint64_t target = multiply_high(word, total);
  if (before <= target && target < middle + second) {
    found = target < middle ? ListPlace{own, target - before} : ListPlace{own + 1, target - middle};
  }
  __syncthreads();
  const ListPlace result = found;
  __syncthreads();  // it may be written again
  return result;
}

// The first id of a tile at whose end the running sum of weights relative to `rule.reference`,
// scaled by `share`, exceeds `rest`; tokens below `edge` weigh nothing. Whole block.
__device__ inline int32_t draw_in_tile(const RowLogits& row, const WeightRule& rule, Best edge,
                                       int32_t tile, uint64_t share, uint64_t rest) {
  __shared__ int32_t chosen;
  const int32_t id = tile * kTile + 2 * static_cast<int32_t>(threadIdx.x);
  uint64_t weights[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float logit = id + i < row.vocab ? row.at(id + i) : -INFINITY;
    weights[i] = make_best(logit, id + i) >= edge ? token_weight(logit, rule) : 0;
  }
  uint64_t total;
  const uint64_t start = block_exclusive_scan<kDrawThreads>(weights[0] + weights[1], &total);
  const uint64_t middle = start + weights[0];
  const auto exceeds = [=](uint64_t running) { return scale_weight(running, share) > rest; };
  if (!exceeds(start) && exceeds(middle + weights[1])) chosen = exceeds(middle) ? id : id + 1;
  __syncthreads();
  const int32_t result = chosen;
  __syncthreads();  // it may be written again
  return result;
}

// The first id at which the running sum of the weights at or above `edge` exceeds the target; tile
// i weighs tile_sum(i). Whole block.
template <typename TileSum>
__device__ int32_t draw_token(const RowLogits& row, const WeightRule& rule, Best edge,
                              int32_t tiles, const TileSum& tile_sum, uint64_t word) {
  const ListPlace place = find_place(tiles, tile_sum, word);
  return draw_in_tile(row, rule, edge, place.index, kMaxWeight, place.rest);
}

// The draw from the whole row, by tiles whose sums are relative to their own best. Whole block.
__device__ inline int32_t draw_whole_row(const RowLogits& row, const WeightRule& rule,
                                         const Best* bests, const unsigned long long* sums,
                                         int32_t tiles, uint64_t word) {
  const auto share_of = [&](int32_t tile) -> uint64_t {
    return bests[tile] == kNoBest ? 0 : token_weight(best_logit(bests[tile]), rule);
  };
  const auto mass = [&](int32_t tile) { return scale_weight(sums[tile], share_of(tile)); };
  const ListPlace place = find_place(tiles, mass, word);
  WeightRule of_tile = rule;
  of_tile.reference = best_logit(bests[place.index]);
  return draw_in_tile(row, of_tile, kNoBest, place.index, share_of(place.index), place.rest);
}

// Most pieces whose best are compared with each other.
constexpr int32_t kMaxPieces = 2 * kMaxCandidates;

// A row's best tokens, where they are few enough to be sorted. Every method is called by the whole
// block with the same arguments and returns the same in every thread.
class Candidates {
 public:
  struct Memory {
    union {
      Best found[kMaxCandidates];
      uint32_t keys[kMaxPieces];
    };
    union {
      Best sorted[kMaxCandidates];
      int32_t pieces[kMaxPieces];
    };
    union {
      unsigned long long weights[kMaxCandidates];
      int32_t looked_at[kMaxPieces];
    };
    int32_t count;
    int32_t chosen;
    uint32_t nth;
    Best edge;
  };
  static_assert(kMaxCandidates == 2 * kDrawThreads, "a thread has two in order");

  __device__ Candidates(Memory* memory, const RowLogits& row, const Best* bests, int32_t tiles)
      : memory_(memory), row_(row), bests_(bests), tiles_(tiles) {}

  __device__ int32_t count() const { return count_; }
  __device__ Best sorted(int32_t i) const { return memory_->sorted[i]; }

  // Takes at least the n best tokens, or all of them, of those with an ordered key of `least` or
  // more. The n-th best of the tiles' best is a bound, and the n-th best of the pieces' best, whose
  // keys `pieces` has, a closer one. False if they are too many.
  __device__ bool gather_best(int32_t n, uint32_t least, const uint32_t* pieces) {
    if (n < tiles_) {
      for (int32_t i = threadIdx.x; i < tiles_; i += kDrawThreads) {
        memory_->keys[i] = static_cast<uint32_t>(bests_[i] >> 32);
      }
      least = max(least, nth_key(n, tiles_));
    }
    if (threadIdx.x == 0) memory_->count = 0;
    __syncthreads();
    const int32_t num_pieces = (row_.vocab + kPiece - 1) / kPiece;
    for (int32_t piece = threadIdx.x; piece < num_pieces; piece += kDrawThreads) {
      const uint32_t key = pieces[piece];
      if (key < least) continue;
      const int32_t at = atomicAdd(&memory_->count, 1);
      if (at >= kMaxPieces) continue;
      memory_->keys[at] = key;
      memory_->pieces[at] = piece;
    }
    __syncthreads();
    const int32_t num_reaching = memory_->count;
    if (num_reaching > kMaxPieces) return false;
    if (n < num_reaching) least = max(least, nth_key(n, num_reaching));
    __syncthreads();
    if (threadIdx.x == 0) memory_->count = 0;
    __syncthreads();
    for (int32_t i = threadIdx.x; i < num_reaching; i += kDrawThreads) {
      if (memory_->keys[i] < least) continue;
      memory_->looked_at[atomicAdd(&memory_->count, 1)] = memory_->pieces[i];
    }
    __syncthreads();
    const int32_t num_looked_at = memory_->count;
    __syncthreads();
    if (threadIdx.x == 0) memory_->count = 0;
    __syncthreads();
    // A warp has several pieces on their way at a time.
    constexpr int kAtOnce = 4;
    constexpr int kOwn = kPiece / kWarpSize;
    for (int32_t first = threadIdx.x / kWarpSize; first < num_looked_at;
         first += kAtOnce * kDrawWarps) {
      float values[kAtOnce][kOwn];
      int32_t first_id[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int32_t at = first + k * kDrawWarps;
        first_id[k] = at < num_looked_at ? memory_->looked_at[at] * kPiece : row_.vocab;
        row_.load(first_id[k], values[k]);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        collect(first_id[k], values[k],
                [=](float, Best code) { return static_cast<uint32_t>(code >> 32) >= least; });
      }
    }
    return sort();
  }

  // Takes the tokens of one class. False if they are too many.
  __device__ bool gather_class(int32_t cls, const WeightRule& rule) {
    return gather(
        [&](Best best) {
          return best != kNoBest && class_of(exponent_of(best_logit(best), rule)) <= cls;
        },
        [&](float logit, Best code) {
          return code >= kLeastBest && class_of(exponent_of(logit, rule)) == cls;
        });
  }

  // Takes the tokens up to an edge. False if they are too many.
  __device__ bool gather_prefix(const SetEdge& edge) {
    return gather([](Best) { return true; },
                  [=](float logit, Best code) { return is_kept(logit, best_id(code), edge); });
  }

  // Weighs the first `limit` candidates; returns their sum.
  __device__ uint64_t weigh(int32_t limit, const WeightRule& rule) {
    const int32_t first = 2 * threadIdx.x;
    const int32_t end = min(limit, count_);
    for (int i = 0; i < 2; ++i) {
      own_[i] = first + i < end ? token_weight(best_logit(memory_->sorted[first + i]), rule) : 0;
    }
    uint64_t total;
    before_ = block_exclusive_scan<kDrawThreads>(own_[0] + own_[1], &total);
    return total;
  }

  // The last token of the shortest prefix that weighs `target`, which is at least 1 and no more
  // than weigh() has returned.
  __device__ Best edge(uint64_t target) {
    const int32_t first = 2 * threadIdx.x;
    const uint64_t middle = before_ + own_[0];
    if (before_ < target && target <= middle + own_[1]) {
      memory_->edge = memory_->sorted[first + (target <= middle ? 0 : 1)];
    }
    __syncthreads();
    return memory_->edge;
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
    const uint64_t total = block_sum<kDrawThreads>(own_[0] + own_[1]);
    const uint64_t drawn = multiply_high(word, total);
    for (int32_t i = threadIdx.x; i < kept; i += kDrawThreads) {
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
  // The n-th largest of memory_->keys, which the threads have written. Ends with a barrier.
  __device__ uint32_t nth_key(int32_t n, int32_t count) {
    __syncthreads();
    for (int32_t i = threadIdx.x; i < count; i += kDrawThreads) {
      const uint32_t own = memory_->keys[i];
      int32_t before = 0;
      for (int32_t j = 0; j < count; ++j) {
        const uint32_t key = memory_->keys[j];
        before += key > own || (key == own && j < i) ? 1 : 0;
      }
      if (before == n - 1) memory_->nth = own;
    }
    __syncthreads();
    return memory_->nth;
  }

  // Collects and sorts the tokens that `takes` likes, in tiles that `looks` likes the best of.
  template <typename Looks, typename Takes>
  __device__ bool gather(const Looks& looks, const Takes& takes) {
    if (threadIdx.x == 0) memory_->count = 0;
    __syncthreads();
    for (int32_t tile = threadIdx.x / kWarpSize; tile < tiles_; tile += kDrawWarps) {
      if (!looks(bests_[tile])) continue;
      float values[kLaneLogits];
      row_.load(tile * kTile, values);
      collect(tile * kTile, values, takes);
    }
    return sort();
  }

  // What a warp has loaded from first_id on.
  template <int kCount, typename Takes>
  __device__ void collect(int32_t first_id, const float (&values)[kCount], const Takes& takes) {
#pragma unroll
    for (int32_t i = 0; i < kCount; ++i) {
      const int32_t id = first_id + i * kWarpSize + static_cast<int32_t>(threadIdx.x) % kWarpSize;
      const Best code = make_best(values[i], id);
      if (id >= row_.vocab || !takes(values[i], code)) continue;
      const int32_t at = atomicAdd(&memory_->count, 1);
      if (at < kMaxCandidates) memory_->found[at] = code;
    }
  }

  // Sorts what was collected. False if that is too much.
  __device__ bool sort() {
    __syncthreads();
    count_ = memory_->count;
    if (count_ > kMaxCandidates) return false;
    for (int32_t i = threadIdx.x; i < count_; i += kDrawThreads) {
      const Best own = memory_->found[i];
      int32_t rank = 0;
      for (int32_t j = 0; j < count_; ++j) rank += memory_->found[j] > own;
      memory_->sorted[rank] = own;
    }
    __syncthreads();
    return true;
  }

  Memory* memory_;
  RowLogits row_;
  const Best* bests_;
  int32_t tiles_;
  int32_t count_ = 0;
  uint64_t own_[2] = {};  // weights of the thread's two candidates
  uint64_t before_ = 0;   // of all candidates before them
};

// Where the edge of top_p lies.
struct ClassEdge {
  int32_t cls;
  uint64_t target;  // what its tokens have to weigh up to the edge
};

// Whole block.
__device__ inline ClassEdge find_class(const unsigned long long* class_sums,
                                       const SamplingRow& sampling) {
  __shared__ ClassEdge found;
  static_assert(kClasses == 2 * kDrawThreads);
  const ulonglong2 own = __ldcg(reinterpret_cast<const ulonglong2*>(class_sums) + threadIdx.x);
  uint64_t total;
  const uint64_t before = block_exclusive_scan<kDrawThreads>(uint64_t{own.x + own.y}, &total);
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

}  // namespace mrv1::cuda
