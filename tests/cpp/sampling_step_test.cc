// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// count_tokens and sample of the CPU over rows with every parameter: the same bits on every
// instruction set and number of threads, in scratch of the size they ask for, without allocations.
#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "allocations.h"
#include "ops_test_support.h"
#include "runner/row_lists.h"
#include "state/output_ring.h"

namespace mrv1 {
namespace {

using test::IsaScope;

constexpr int32_t kRows = 6;
constexpr int32_t kPlaces = 3;
constexpr int32_t kHistory = 24;
constexpr int32_t kMaxLogprobs = 7;

// Rows whose parameters differ, three places each.
class SampledRows {
 public:
  explicit SampledRows(int32_t vocab_size) : vocab_(vocab_size) {
    std::mt19937 random(vocab_size);
    std::normal_distribution<float> normal(0.0f, 3.0f);
    logits_.resize(static_cast<size_t>(kRows * kPlaces) * vocab_size);
    for (float& logit : logits_) logit = normal(random);
    mask_.assign(static_cast<size_t>(vocab_size + 31) / 32, 0x5a5a5a5bu);
    tokens_.resize(kRows * (kHistory + kPlaces));
    for (int32_t& token : tokens_) token = static_cast<int32_t>(random() % std::min(9, vocab_));
    for (int32_t i = 0; i < kRows; ++i) {
      const RowSpec spec = make_spec(i);
      SamplingRow row = plain_sampling_row(spec, vocab_, kPlaces - 1);
      lists_[i].build(spec, vocab_, kHistory, row);
      words_[i] = lists_[i].words;
      words_[i].resize(static_cast<size_t>(lists_[i].num_words) + 4);
      row.words = words_[i].data();
      if (i % 3 == 2) row.grammar_mask = mask_.data();
      sampling_.push_back(row);
    }
  }

  struct Result {
    std::vector<int32_t> sampled;
    std::vector<char> output;
    int64_t allocations = 0;
    bool operator==(const Result& other) const {
      return sampled == other.sampled && output == other.output;
    }
  };

  Result run(int num_threads) {
    ThreadPool pool(num_threads);
    std::vector<float> logits = logits_;
    std::vector<Row> rows(kRows);
    std::vector<int32_t> row_of(kRows), batch, place;
    for (int32_t i = 0; i < kRows; ++i) {
      rows[i].phase = RowPhase::kDecode;
      rows[i].prompt_len = kHistory / 2;
      rows[i].total_len = kHistory;
      rows[i].min_total_len = kHistory + 1;
      row_of[i] = i;
      for (int32_t j = 0; j < kPlaces; ++j) {
        batch.push_back(i);
        place.push_back(j);
      }
      // Tables begin empty in each run.
      std::fill_n(words_[i].begin() + lists_[i].zeros_offset, lists_[i].num_zeros, 0);
      std::copy(lists_[i].words.begin(), lists_[i].words.end(), words_[i].begin());
    }
    Result result;
    result.sampled.assign(kRows * kPlaces, INT32_MIN);
    const int64_t records = output_tokens_end(kRows, kPlaces - 1);
    result.output.assign(
        static_cast<size_t>(records + kRows * kPlaces * logprob_record_bytes(kMaxLogprobs)), 0);
    uint64_t step = 0;
    StepContext ctx;
    ctx.pool = &pool;
    ctx.sizes = {kRows, kRows * kPlaces, kRows * kPlaces};
    ctx.rings.output = result.output.data();
    ctx.rings.num_slots = 1;
    ctx.rings.step = &step;
    ctx.rows.rows = rows.data();
    ctx.rows.sampling = sampling_.data();
    ctx.rows.tokens = tokens_.data();
    ctx.rows.max_model_len = kHistory + kPlaces;
    ctx.rows.vocab_size = vocab_;
    ctx.rows.max_drafts = kPlaces - 1;
    ctx.rows.max_logprobs = kMaxLogprobs;
    ctx.infer.row = row_of.data();
    ctx.infer.logits_batch = ctx.infer.logits_entry = batch.data();
    ctx.infer.logits_place = place.data();
    ctx.infer.sampled = result.sampled.data();
    ctx.infer.max_requests = kRows;
    WorkspaceLimits limits = {};
    limits.vocab_size = vocab_;
    limits.num_threads = num_threads;
    std::vector<char> workspace(static_cast<size_t>(cpu_kernels().workspace_bytes(limits)));
    ctx.workspace = workspace.data();
    ctx.workspace_bytes = workspace.size();
    const int64_t before = count_allocations();
    count_tokens_cpu(ctx);
    sample_cpu({logits.data(), vocab_}, ctx);
    result.allocations = count_allocations() - before;
    return result;
  }

 private:
  RowSpec make_spec(int32_t i) const {
    RowSpec spec;
    spec.temperature = i == 3 ? 0.0f : 1.5f;
    spec.seed = 7 + static_cast<uint64_t>(i);
    if (i == 0) return spec;
    spec.prompt_len = kHistory / 2;
    spec.min_tokens = kHistory / 2 + 1;
    spec.stop_ids = {0, std::min(3, vocab_ - 1)};
    spec.stop_ids.resize(vocab_ > 1 ? 2 : 1);
    spec.presence_penalty = 0.5f;
    spec.frequency_penalty = 0.25f;
    spec.repetition_penalty = 1.25f;
    spec.logit_bias = {{vocab_ - 1, 4.0f}};
    spec.bad_words = {{vocab_ / 2}, {tokens_[0], 1 % vocab_}};
    spec.num_logprobs = i;
    if (i % 2 == 0) {
      for (int32_t id = 0; id < vocab_; id += 1 + id % 3) spec.allowed_token_ids.push_back(id);
    }
    if (i >= 4) {
      spec.top_k = 40;
      spec.top_p = 0.9f;
    }
    return spec;
  }

  int32_t vocab_;
  std::vector<float> logits_;
  std::vector<uint32_t> mask_;
  std::vector<int32_t> tokens_;
  RowLists lists_[kRows];
  std::vector<int32_t> words_[kRows];
  std::vector<SamplingRow> sampling_;
};

TEST_CASE("rows with every parameter give the same bits on all instruction sets and threads") {
  for (const int32_t vocab_size : {1, 40, 257, 5000}) {
    CAPTURE(vocab_size);
    SampledRows rows(vocab_size);
    SampledRows::Result expected;
    {
      IsaScope scope(CpuIsa::kPortable);
      expected = rows.run(1);
    }
    CHECK(std::count(expected.sampled.begin(), expected.sampled.end(), INT32_MIN) == 0);
    for (const CpuIsa isa : test::supported_isas()) {
      CAPTURE(std::string(cpu_isa_name(isa)));
      IsaScope scope(isa);
      for (const int num_threads : {1, 3}) {
        const SampledRows::Result result = rows.run(num_threads);
        CHECK(result == expected);
        CHECK(result.allocations == 0);
      }
    }
  }
}

}  // namespace
}  // namespace mrv1
