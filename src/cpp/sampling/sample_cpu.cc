// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "sampling/sample_cpu.h"

#include <algorithm>
#include <cstddef>
#include <limits>

#include "ops/cpu_isa.h"
#include "ops/kernels.h"
#include "sampling/processors.h"
#include "sampling/sample.h"
#include "sampling/sample_loops.h"

namespace mrv1 {
namespace {

constexpr int64_t kTileBlocks = kDrawTile / kSampleBlock;
static_assert(kTileBlocks * kSampleBlock == kDrawTile);
constexpr int32_t kRadixBits = 8;
constexpr int32_t kRadix = 1 << kRadixBits;

// Scratch of one row, carved from one thread's slice of the workspace.
struct RowScratch {
  uint64_t* class_sum;   // [kNumClasses]
  uint64_t* block_sum;   // [blocks], or of draw tiles
  int32_t* class_count;  // [kNumClasses]
  int32_t* block_max;    // [blocks] largest key
  int32_t* block_order;  // [blocks]
  float* candidates;     // [vocab]
};

int64_t num_blocks(int64_t vocab_size) { return (vocab_size + kSampleBlock - 1) / kSampleBlock; }

int64_t slice_bytes(int64_t vocab_size) {
  const int64_t bytes =
      kNumClasses * (8 + 4) + num_blocks(vocab_size) * (8 + 4 + 4) + vocab_size * 4;
  return (bytes + 63) / 64 * 64;
}

RowScratch carve(void* workspace, int64_t vocab_size, int64_t index) {
  char* at = static_cast<char*>(workspace) + index * slice_bytes(vocab_size);
  const int64_t blocks = num_blocks(vocab_size);
  RowScratch scratch;
  scratch.class_sum = reinterpret_cast<uint64_t*>(at);
  scratch.block_sum = scratch.class_sum + kNumClasses;
  scratch.class_count = reinterpret_cast<int32_t*>(scratch.block_sum + blocks);
  scratch.block_max = scratch.class_count + kNumClasses;
  scratch.block_order = scratch.block_max + blocks;
  scratch.candidates = reinterpret_cast<float*>(scratch.block_order + blocks);
  return scratch;
}

// How much of a sorted list a prefix takes: at least `limit`, counted in tokens or in weight.
enum class Measure { kCount, kWeight };

// One row on its way from logits to a token. apply() implements the table of processors.
class RowSampler {
 public:
  RowSampler(float* logits, int64_t vocab_size, const int32_t* words, const RowScratch& scratch,
             const SampleLoops& loops)
      : logits_(logits),
        vocab_(vocab_size),
        blocks_(num_blocks(vocab_size)),
        words_(words),
        scratch_(scratch),
        loops_(loops) {}

  void apply(MinTokens, const Row&, const SamplingRow& sampling) {
    const int32_t* stop_ids = words_ + sampling.stop_ids.offset;
    int64_t survivor = 0;
    while (survivor < vocab_ &&
           !survives_stop_mask(logits_[survivor], static_cast<int32_t>(survivor), stop_ids,
                               sampling.stop_ids.count)) {
      ++survivor;
    }
    if (survivor == vocab_) {
      return;
    }
    for (int32_t i = 0; i < sampling.stop_ids.count; ++i) {
      const int64_t id = stop_ids[i];
      if (id >= 0 && id < vocab_ && logits_[id] == logits_[id]) {
        logits_[id] = -std::numeric_limits<float>::infinity();
      }
    }
  }

  // Finds the largest logit. False if there is nothing to draw.
  bool scan() {
    int32_t low = INT32_MAX;
    int32_t high = INT32_MIN;
    for (int64_t block = 0; block < blocks_; ++block) {
      const KeyRange range = loops_.key_range(block_logits(block), block_count(block));
      scratch_.block_max[block] = range.high;
      low = std::min(low, range.low);
      high = std::max(high, range.high);
    }
    max_key_ = high;
    return low >= kMinusInfKey && high <= kPlusInfKey && high > kMinusInfKey;
  }

  int32_t largest() const {
    const int64_t block =
        std::find(scratch_.block_max, scratch_.block_max + blocks_, max_key_) - scratch_.block_max;
    int64_t id = block * kSampleBlock;
    while (logit_key(logits_[id]) != max_key_) {
      ++id;
    }
    return static_cast<int32_t>(id);
  }

  void apply(Temperature, const Row&, const SamplingRow& sampling) {
    rule_.reference = logits_[largest()];
    rule_.scale = Temperature::scale(sampling);
    rule_.min_weight = 1;
  }

  void apply(MinP, const Row&, const SamplingRow& sampling) {
    rule_.min_weight = std::max<uint64_t>(MinP::min_weight(sampling), 1);
  }

  void apply(TopK, const Row&, const SamplingRow& sampling) {
    build_histogram(top_k_floor(sampling.top_k));
    narrow<Measure::kCount>(static_cast<uint64_t>(sampling.top_k));
  }

  void apply(TopP, const Row&, const SamplingRow& sampling) {
    if (!has_histogram_) {
      build_histogram(INT32_MIN);
    }
    narrow<Measure::kWeight>(TopP::target(sampling, total_));
  }

  // From the whole row.
  int32_t draw_by_tiles(uint64_t word) {
    uint64_t* const masses = scratch_.block_sum;
    const int64_t num_tiles = (blocks_ + kTileBlocks - 1) / kTileBlocks;
    uint64_t total = 0;
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const WeightRule rule = tile_rule(tile);
      const uint64_t share = token_weight(rule.reference, rule_);
      uint64_t sum = 0;
      for (int64_t block = tile * kTileBlocks; share > 0 && block < tile_end(tile); ++block) {
        sum += loops_.weight_sum(block_logits(block), block_count(block), rule);
      }
      masses[tile] = scale_weight(sum, share);
      total += masses[tile];
    }
    uint64_t target = multiply_high(word, total);
    int64_t tile = 0;
    while (target >= masses[tile]) target -= masses[tile++];
    const WeightRule rule = tile_rule(tile);
    const uint64_t share = token_weight(rule.reference, rule_);
    uint64_t weights[kSampleBlock];
    uint64_t running = 0;
    for (int64_t block = tile * kTileBlocks;; ++block) {
      loops_.weights(block_logits(block), block_count(block), rule, weights);
      for (int64_t i = 0; i < block_count(block); ++i) {
        running += weights[i];
        if (scale_weight(running, share) > target) return first_id(block) + static_cast<int32_t>(i);
      }
    }
  }

  int32_t draw(uint64_t word) {
    uint64_t total = 0;
    for (int64_t block = 0; block < blocks_; ++block) {
      uint64_t sum = 0;
      if (scratch_.block_max[block] >= edge_.key) {
        sum =
            loops_.kept_sum(block_logits(block), block_count(block), first_id(block), rule_, edge_);
      }
      scratch_.block_sum[block] = sum;
      total += sum;
    }
    uint64_t target = multiply_high(word, total);
    int64_t block = 0;
    while (target >= scratch_.block_sum[block]) {
      target -= scratch_.block_sum[block++];
    }
    uint64_t weights[kSampleBlock];
    const float* logits = block_logits(block);
    loops_.weights(logits, block_count(block), rule_, weights);
    int32_t id = first_id(block);
    for (int64_t i = 0;; ++i, ++id) {
      const uint64_t weight = is_kept(logits[i], id, edge_) ? weights[i] : 0;
      if (target < weight) {
        return id;
      }
      target -= weight;
    }
  }

 private:
  int64_t tile_end(int64_t tile) const { return std::min((tile + 1) * kTileBlocks, blocks_); }
  // Weights relative to the tile's largest logit.
  WeightRule tile_rule(int64_t tile) const {
    int32_t* const first = scratch_.block_max + tile * kTileBlocks;
    const int32_t key = *std::max_element(first, scratch_.block_max + tile_end(tile));
    return WeightRule{logit_of_key(key), rule_.scale, 1};
  }

  const float* block_logits(int64_t block) const { return logits_ + block * kSampleBlock; }
  int64_t block_count(int64_t block) const {
    return std::min(kSampleBlock, vocab_ - block * kSampleBlock);
  }
  static int32_t first_id(int64_t block) { return static_cast<int32_t>(block * kSampleBlock); }

  // A key at or below that of the k-th token: the k-th largest of the blocks' maxima. Blocks whose
  // maximum is lower hold none of the first k tokens. (Should one of the k maxima have weight 0,
  // all tokens of the blocks left out have weight 0 too, as weights never decrease with the logit.)
  int32_t top_k_floor(int32_t top_k) {
    if (top_k > blocks_) {
      return INT32_MIN;
    }
    std::copy(scratch_.block_max, scratch_.block_max + blocks_, scratch_.block_order);
    std::nth_element(scratch_.block_order, scratch_.block_order + top_k - 1,
                     scratch_.block_order + blocks_, [](int32_t a, int32_t b) { return a > b; });
    return scratch_.block_order[top_k - 1];
  }

  // Counts and weighs the tokens of each class, over the blocks that reach the floor.
  void build_histogram(int32_t floor) {
    std::fill(scratch_.class_count, scratch_.class_count + kNumClasses, 0);
    std::fill(scratch_.class_sum, scratch_.class_sum + kNumClasses, uint64_t{0});
    uint64_t weights[kSampleBlock];
    int32_t classes[kSampleBlock];
    uint64_t total = 0;
    // Locals: a store to the histogram might else change the pointers and the total.
    uint64_t* const class_sum = scratch_.class_sum;
    int32_t* const class_count = scratch_.class_count;
    for (int64_t block = 0; block < blocks_; ++block) {
      if (scratch_.block_max[block] < floor) {
        continue;
      }
      const int64_t count = block_count(block);
      loops_.classify(block_logits(block), count, rule_, weights, classes);
      for (int64_t i = 0; i < count; ++i) {
        class_count[classes[i]] += weights[i] != 0 ? 1 : 0;
        class_sum[classes[i]] += weights[i];
        total += weights[i];
      }
    }
    total_ = total;
    has_histogram_ = true;
  }

  // Moves the edge to the end of the shortest prefix that measures `limit`, if there is one, and
  // sets total_ to the prefix's weight.
  template <Measure kMeasure>
  void narrow(uint64_t limit) {
    uint64_t before = 0;  // weight of the classes that are wholly inside
    for (int32_t cls = 0; cls < kNumClasses; ++cls) {
      const uint64_t weight = scratch_.class_sum[cls];
      const uint64_t amount =
          kMeasure == Measure::kCount ? static_cast<uint64_t>(scratch_.class_count[cls]) : weight;
      if (amount >= limit) {
        total_ = before + cut_class<kMeasure>(cls, limit);
        return;
      }
      limit -= amount;
      before += weight;
    }
  }

  // Finds the edge inside a class, whose tokens measure at least `limit`, by a radix descent on the
  // key. Returns the weight of the class's tokens up to the edge.
  template <Measure kMeasure>
  uint64_t cut_class(int32_t cls, uint64_t limit) {
    int64_t count = gather_class(cls);
    float* candidates = scratch_.candidates;
    uint64_t inside = 0;
    for (int32_t shift = 32 - kRadixBits; shift >= 0; shift -= kRadixBits) {
      uint64_t digit_count[kRadix] = {};
      uint64_t digit_sum[kRadix] = {};
      uint64_t weights[kSampleBlock];
      for (int64_t start = 0; start < count; start += kSampleBlock) {
        const int64_t piece = std::min(kSampleBlock, count - start);
        loops_.weights(candidates + start, piece, rule_, weights);
        for (int64_t i = 0; i < piece; ++i) {
          const uint32_t digit = digit_of(candidates[start + i], shift);
          ++digit_count[digit];
          digit_sum[digit] += weights[i];
        }
      }
      const uint64_t* amount = kMeasure == Measure::kCount ? digit_count : digit_sum;
      uint32_t digit = kRadix - 1;
      while (amount[digit] < limit) {
        limit -= amount[digit];
        inside += digit_sum[digit];
        --digit;
      }
      int64_t kept = 0;
      for (int64_t i = 0; i < count; ++i) {
        const float candidate = candidates[i];
        if (digit_of(candidate, shift) == digit) {
          candidates[kept++] = candidate;
        }
      }
      count = kept;
    }
    // All candidates left have the edge's key, and so one weight.
    uint64_t weight;
    loops_.weights(candidates, 1, rule_, &weight);
    const uint64_t ties = kMeasure == Measure::kCount ? limit : (limit + weight - 1) / weight;
    edge_.key = logit_key(candidates[0]);
    edge_.id = ties == static_cast<uint64_t>(count) ? INT32_MAX : id_of_tie(edge_.key, ties);
    return inside + ties * weight;
  }

  // Collects the live logits of a class; returns their number.
  int64_t gather_class(int32_t cls) {
    uint64_t weights[kSampleBlock];
    int32_t classes[kSampleBlock];
    int64_t found = 0;
    float* const candidates = scratch_.candidates;
    for (int64_t block = 0; block < blocks_; ++block) {
      const float* logits = block_logits(block);
      if (class_of_key(scratch_.block_max[block]) > cls) {
        continue;
      }
      const int64_t count = block_count(block);
      loops_.classify(logits, count, rule_, weights, classes);
      for (int64_t i = 0; i < count; ++i) {
        candidates[found] = logits[i];
        found += (classes[i] == cls) & (weights[i] != 0) ? 1 : 0;
      }
    }
    return found;
  }

  int32_t class_of_key(int32_t key) const {
    const float logit = logit_of_key(key);
    uint64_t weight;
    int32_t cls;
    loops_.classify(&logit, 1, rule_, &weight, &cls);
    return cls;
  }

  // The id of the n-th logit (from 1) with this key.
  int32_t id_of_tie(int32_t key, uint64_t n) const {
    int64_t block = 0;
    int64_t id = -1;
    while (n > 0) {
      while (scratch_.block_max[block] < key) {
        ++block;
      }
      const int64_t end = block * kSampleBlock + block_count(block);
      for (int64_t i = block * kSampleBlock; i < end && n > 0; ++i) {
        if (logit_key(logits_[i]) == key) {
          --n;
          id = i;
        }
      }
      ++block;
    }
    return static_cast<int32_t>(id);
  }

  static uint32_t digit_of(float logit, int32_t shift) {
    const uint32_t ordered = static_cast<uint32_t>(logit_key(logit)) ^ 0x80000000u;
    return (ordered >> shift) & (kRadix - 1);
  }

  float* logits_;
  int64_t vocab_;
  int64_t blocks_;
  const int32_t* words_;
  RowScratch scratch_;
  const SampleLoops& loops_;
  int32_t max_key_ = 0;
  WeightRule rule_ = {};
  SetEdge edge_;
  uint64_t total_ = 0;  // weight of the set while it is narrowed; needs the histogram
  bool has_histogram_ = false;
};

int32_t sample_row(RowSampler& sampler, const Row& row, const SamplingRow& sampling) {
  Processors::run<ProcessorStage::kLogits>(row, sampling, sampler);
  if (!sampler.scan()) {
    return kErrorToken;
  }
  if (!Temperature::applies(row, sampling)) {
    return sampler.largest();
  }
  Processors::run<ProcessorStage::kSet>(row, sampling, sampler);
  const uint64_t word = random_word(sampling.seed, static_cast<uint32_t>(row.total_len));
  return draws_whole_row(row, sampling) ? sampler.draw_by_tiles(word) : sampler.draw(word);
}

}  // namespace

int64_t sample_workspace_cpu(const WorkspaceLimits& limits) {
  return slice_bytes(limits.vocab_size) * std::max(limits.num_threads, 1);
}

void sample_cpu(const SampleParams& params, const StepContext& ctx) {
  check_internal(params.vocab_size > 0 && params.vocab_size <= kMaxSampledVocab, "sample",
                 "vocab_size is ", params.vocab_size, ", expected 1 to ", kMaxSampledVocab);
  const int64_t needed = slice_bytes(params.vocab_size) * ctx.pool->num_threads();
  check_internal(ctx.workspace_bytes >= static_cast<size_t>(needed), "sample", "workspace has ",
                 ctx.workspace_bytes, " bytes, expected at least ", needed);
  const InferParams& infer = ctx.infer;
  const SampleLoops& loops = sample_loops(current_cpu_isa());
  ctx.pool->parallel_for(ctx.sizes.num_logits, 1, [&](int64_t begin, int64_t end, int thread) {
    const RowScratch scratch = carve(ctx.workspace, params.vocab_size, thread);
    for (int64_t i = begin; i < end; ++i) {
      const int32_t batch = infer.logits_batch[i];
      infer.sampled[i] = kNoToken;
      if (batch < 0 || infer.row[batch] < 0) {
        continue;
      }
      const int32_t index = infer.row[batch];
      const SamplingRow& sampling = ctx.rows.sampling[index];
      Row row = ctx.rows.rows[index];
      row.total_len += infer.logits_place[i];
      RowSampler sampler(params.logits + i * params.vocab_size, params.vocab_size, sampling.words,
                         scratch, loops);
      infer.sampled[i] = forced_token(ctx.rows, index, sampling, row.total_len,
                                      sample_row(sampler, row, sampling));
    }
  });
}

}  // namespace mrv1
