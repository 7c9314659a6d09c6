// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// One block per logits row follows sampling/processors.h word for word: every weight comes from the
// shared fixed-point arithmetic, and sums of integers do not depend on the order of threads. A set
// is cut by a radix descent on the logit's key (8 bits a pass over the whole row, counted and
// weighed in shared histograms); ties at the edge and the draw go by id, in tiles of one id a
// thread. Nothing is kept between passes but the rule and the edge.
#include "block.cuh"
#include "check.h"
#include "sampling/processors.h"
#include "sampling/sample.h"

namespace mrv1 {
namespace {

constexpr std::string_view kOp = "sample";
constexpr int kThreads = 512;
constexpr int32_t kRadixBits = 8;
constexpr int32_t kRadix = 1 << kRadixBits;

// Live tokens by one digit of their key: how many, and their weight. In shared memory.
struct Histogram {
  unsigned long long count[kRadix];
  unsigned long long weight[kRadix];
};

// How much of the ordered tokens a prefix takes: at least `limit`, counted in tokens or in weight.
enum class Measure { kCount, kWeight };

// One row on its way from logits to a token. Every method is called by the whole block with the
// same arguments and leaves the same members in every thread. apply() implements the processors.
class RowSampler {
 public:
  __device__ RowSampler(float* logits, int32_t vocab_size, const int32_t* stop_ids,
                        Histogram* histogram, int32_t* chosen)
      : logits_(logits),
        vocab_(vocab_size),
        stop_ids_(stop_ids),
        histogram_(histogram),
        chosen_(chosen) {}

  __device__ void apply(MinTokens, const Row&, const SamplingRow& sampling) {
    const int32_t* stop_ids = stop_ids_ + sampling.stop_offset;
    int survives = 0;
    for (int32_t id = threadIdx.x; id < vocab_; id += kThreads) {
      survives |= survives_stop_mask(logits_[id], id, stop_ids, sampling.stop_count);
    }
    if (!__syncthreads_or(survives)) return;
    for (int32_t i = threadIdx.x; i < sampling.stop_count; i += kThreads) {
      const int32_t id = stop_ids[i];
      if (id >= 0 && id < vocab_ && logits_[id] == logits_[id]) logits_[id] = -INFINITY;
    }
    __syncthreads();
  }

  // Finds the largest logit. False if there is nothing to draw.
  __device__ bool scan() {
    int32_t low = INT32_MAX;
    int32_t high = INT32_MIN;
    for (int32_t id = threadIdx.x; id < vocab_; id += kThreads) {
      const int32_t key = logit_key(logits_[id]);
      low = min(low, key);
      high = max(high, key);
    }
    low = cuda::block_min<kThreads>(low);
    max_key_ = cuda::block_max<kThreads>(high);
    return low >= kMinusInfKey && max_key_ <= kPlusInfKey && max_key_ > kMinusInfKey;
  }

  // The lowest id among the largest logits.
  __device__ int32_t largest() const {
    int32_t lowest = INT32_MAX;
    for (int32_t id = threadIdx.x; id < vocab_; id += kThreads) {
      if (logit_key(logits_[id]) == max_key_) lowest = min(lowest, id);
    }
    return cuda::block_min<kThreads>(lowest);
  }

  __device__ void apply(Temperature, const Row&, const SamplingRow& sampling) {
    rule_.max_logit = logits_[largest()];
    rule_.inverse_temperature = Temperature::inverse(sampling);
    rule_.min_weight = 1;
  }

  __device__ void apply(MinP, const Row&, const SamplingRow& sampling) {
    const uint64_t min_weight = MinP::min_weight(sampling);
    rule_.min_weight = min_weight > 1 ? min_weight : 1;
  }

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
  // Keys as unsigned numbers in the same order, for digits.
  __device__ static uint32_t ordered_key(float logit) {
    return static_cast<uint32_t>(logit_key(logit)) ^ 0x80000000u;
  }

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
  const int32_t* stop_ids_;
  Histogram* histogram_;
  int32_t* chosen_;
  int32_t max_key_ = 0;
  WeightRule rule_ = {};
  SetEdge edge_;
};

__device__ int32_t sample_row(RowSampler& sampler, const Row& row, const SamplingRow& sampling) {
  Processors::run<ProcessorStage::kLogits>(row, sampling, sampler);
  if (!sampler.scan()) return kErrorToken;
  if (!Temperature::applies(row, sampling)) return sampler.largest();
  Processors::run<ProcessorStage::kSet>(row, sampling, sampler);
  return sampler.draw(random_word(sampling.seed, static_cast<uint32_t>(row.total_len)));
}

__global__ void __launch_bounds__(kThreads)
    sample_kernel(SampleParams params, RowState state, InferParams infer) {
  __shared__ Histogram histogram;
  __shared__ int32_t chosen;
  const int32_t batch = infer.logits_batch[blockIdx.x];
  if (batch < 0) return;
  const int32_t index = infer.row[batch];
  if (index < 0) return;
  RowSampler sampler(params.logits + int64_t{blockIdx.x} * params.vocab_size,
                     static_cast<int32_t>(params.vocab_size), state.stop_ids, &histogram, &chosen);
  const int32_t token = sample_row(sampler, state.rows[index], state.sampling[index]);
  if (threadIdx.x == 0) infer.sampled[batch] = token;
}

}  // namespace

void sample_cuda(const SampleParams& params, const StepContext& ctx) {
  check_internal(params.vocab_size > 0 && params.vocab_size <= kMaxSampledVocab, kOp,
                 "vocab_size is ", params.vocab_size, ", expected 1 to ", kMaxSampledVocab);
  static_assert(kNoToken == -1, "all bits set, as the memset below writes");
  const cudaStream_t stream = cuda::stream_of(ctx);
  cuda::check_cuda(
      cudaMemsetAsync(ctx.infer.sampled, 0xff, sizeof(int32_t) * ctx.sizes.num_requests, stream),
      kOp, "cudaMemsetAsync");
  if (ctx.sizes.num_logits == 0) return;
  sample_kernel<<<ctx.sizes.num_logits, kThreads, 0, stream>>>(params, ctx.rows, ctx.infer);
  cuda::check_launch(kOp);
}

}  // namespace mrv1
