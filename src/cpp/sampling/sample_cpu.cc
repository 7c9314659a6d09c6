// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "sampling/sample_cpu.h"

#include <algorithm>
#include <cstddef>

#include "core/thread_pool.h"
#include "ops/cpu_isa.h"
#include "ops/kernels.h"
#include "sampling/edits_cpu.h"
#include "sampling/logprobs_cpu.h"
#include "sampling/processors.h"
#include "sampling/row_blocks_cpu.h"
#include "sampling/sample.h"
#include "sampling/sample_loops.h"
#include "state/output_ring.h"

namespace mrv1 {
namespace {

constexpr int32_t kRadixBits = 8;
constexpr int32_t kRadix = 1 << kRadixBits;

// How much of a sorted list a prefix takes: at least `limit`, counted in tokens or in weight.
enum class Measure { kCount, kWeight };

// One row on its way from edited logits to a token. apply() implements the processors that narrow
// the set.
class RowSampler {
 public:
  RowSampler(const float* logits, int64_t vocab_size, const RowScratch& scratch,
             const SampleLoops& loops)
      : logits_(logits),
        row_(logits, vocab_size, scratch, loops),
        scratch_(scratch),
        loops_(loops) {}

  bool scan() { return row_.scan(); }
  int32_t largest() const { return row_.largest(); }

  void apply(Temperature, const Row&, const SamplingRow& sampling) {
    rule_ = WeightRule{row_.max_logit(), Temperature::scale(sampling), 1};
  }

  void apply(MinP, const Row&, const SamplingRow& sampling) {
    rule_.min_weight = std::max<uint64_t>(MinP::min_weight(sampling), 1);
  }

  void apply(TopK, const Row&, const SamplingRow& sampling) {
    // (Should the floor have weight 0, all tokens of the blocks left out have weight 0 too, as
    // weights never decrease with the logit.)
    build_histogram(row_.key_floor(sampling.top_k));
    narrow<Measure::kCount>(static_cast<uint64_t>(sampling.top_k));
  }

  void apply(TopP, const Row&, const SamplingRow& sampling) {
    if (!has_histogram_) {
      build_histogram(INT32_MIN);
    }
    narrow<Measure::kWeight>(TopP::target(sampling, total_));
  }

  int32_t draw_from_whole_row(uint64_t word) {
    const uint64_t total = row_.weigh_tiles(rule_.scale, scratch_.block_sum);
    return row_.draw_from_tiles(rule_.scale, scratch_.block_sum, multiply_high(word, total));
  }

  int32_t draw(uint64_t word) {
    uint64_t total = 0;
    for (int64_t block = 0; block < row_.blocks(); ++block) {
      uint64_t sum = 0;
      if (row_.max_key(block) >= edge_.key) {
        sum = loops_.kept_sum(row_.logits(block), row_.count(block), RowBlocks::first_id(block),
                              rule_, edge_);
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
    const float* logits = row_.logits(block);
    loops_.weights(logits, row_.count(block), rule_, weights);
    int32_t id = RowBlocks::first_id(block);
    for (int64_t i = 0;; ++i, ++id) {
      const uint64_t weight = is_kept(logits[i], id, edge_) ? weights[i] : 0;
      if (target < weight) {
        return id;
      }
      target -= weight;
    }
  }

 private:
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
    for (int64_t block = 0; block < row_.blocks(); ++block) {
      if (row_.max_key(block) < floor) {
        continue;
      }
      const int64_t count = row_.count(block);
      loops_.classify(row_.logits(block), count, rule_, weights, classes);
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
    for (int64_t block = 0; block < row_.blocks(); ++block) {
      const float* logits = row_.logits(block);
      if (class_of_key(row_.max_key(block)) > cls) {
        continue;
      }
      const int64_t count = row_.count(block);
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
      while (row_.max_key(block) < key) {
        ++block;
      }
      const int64_t end = block * kSampleBlock + row_.count(block);
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

  const float* logits_;
  RowBlocks row_;
  RowScratch scratch_;
  const SampleLoops& loops_;
  WeightRule rule_ = {};
  SetEdge edge_;
  uint64_t total_ = 0;  // weight of the set while it is narrowed; needs the histogram
  bool has_histogram_ = false;
};

int32_t sample_row(RowSampler& sampler, const Row& row, const SamplingRow& sampling) {
  if (!sampler.scan()) {
    return kErrorToken;
  }
  if (!Temperature::applies(row, sampling)) {
    return sampler.largest();
  }
  Processors::run<ProcessorStage::kSet>(row, sampling, sampler);
  const uint64_t word = random_word(sampling.seed, static_cast<uint32_t>(row.total_len));
  return draws_whole_row(row, sampling) ? sampler.draw_from_whole_row(word) : sampler.draw(word);
}

}  // namespace

int64_t sample_workspace_cpu(const WorkspaceLimits& limits) {
  return row_scratch_bytes(limits.vocab_size) * std::max(limits.num_threads, 1);
}

void check_sample_workspace(std::string_view op, int64_t vocab_size, const StepContext& ctx) {
  check_internal(vocab_size > 0 && vocab_size <= kMaxSampledVocab, op, "vocab_size is ", vocab_size,
                 ", expected 1 to ", kMaxSampledVocab);
  const int64_t needed = row_scratch_bytes(vocab_size) * ctx.pool->num_threads();
  check_internal(ctx.workspace_bytes >= static_cast<size_t>(needed), op, "workspace has ",
                 ctx.workspace_bytes, " bytes, expected at least ", needed);
}

void sample_cpu(const SampleParams& params, const StepContext& ctx) {
  const int64_t vocab_size = params.vocab_size;
  check_sample_workspace("sample", vocab_size, ctx);
  const InferParams& infer = ctx.infer;
  const RowState& state = ctx.rows;
  const SampleLoops& loops = sample_loops(current_cpu_isa());
  ctx.pool->parallel_for(ctx.sizes.num_logits, 1, [&](int64_t begin, int64_t end, int thread) {
    const RowScratch scratch = carve_row_scratch(ctx.workspace, vocab_size, thread);
    for (int64_t i = begin; i < end; ++i) {
      const int32_t batch = infer.logits_batch[i];
      infer.sampled[i] = kNoToken;
      if (batch < 0 || infer.row[batch] < 0) {
        continue;
      }
      const int32_t index = infer.row[batch];
      const int32_t place = infer.logits_place[i];
      const SamplingRow& sampling = state.sampling[index];
      const Row row = row_at_place(state.rows[index], place);
      float* logits = params.logits + i * vocab_size;
      LogitEdits edits(logits, vocab_size, state.tokens + int64_t{index} * state.max_model_len,
                       place, scratch.raw, loops);
      Processors::run<ProcessorStage::kRaw>(row, sampling, edits);
      Processors::run<ProcessorStage::kLogits>(row, sampling, edits);
      RowSampler sampler(logits, vocab_size, scratch, loops);
      const int32_t drawn = sample_row(sampler, row, sampling);
      const int32_t token = forced_token(state, index, sampling, row.total_len, drawn);
      infer.sampled[i] = token;
      if (RawLogprobs::applies(row, sampling)) {
        write_logprobs(edits.raw(), vocab_size, token, RawLogprobs::count(sampling, vocab_size),
                       scratch, loops,
                       output_logprobs(ctx.rings.output_slot(), infer.max_requests, state,
                                       infer.logits_entry[i], place));
      }
    }
  });
}

}  // namespace mrv1
