// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Ops over the integers of a batch: token_map, sampling_rows, ngram_propose.
#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "ops_test_support.h"

namespace mrv1 {
namespace {

using test::Step;
using Ints = std::vector<int32_t>;

struct Batch {
  Ints starts, lens, table;
  int32_t num_tokens, max_blocks, block_size;
  int32_t num_requests() const { return static_cast<int32_t>(lens.size()); }
};

// Tokens behind the last request are padding; requests may have no tokens, or none at all.
Batch random_batch(std::mt19937& random) {
  const auto up_to = [&](int32_t most) { return static_cast<int32_t>(random() % (most + 1)); };
  Batch batch;
  batch.block_size = 1 << up_to(4);
  batch.max_blocks = 1 + up_to(5);
  batch.starts = {0};
  const int32_t requests = up_to(5);
  for (int32_t b = 0; b < requests; ++b) {
    const int32_t queries = up_to(3) == 0 ? 0 : 1 + up_to(up_to(1) == 0 ? 0 : 9);
    batch.starts.push_back(batch.starts.back() + queries);
    // Lengths up to a little more than the table holds; 0 masks the request.
    batch.lens.push_back(up_to(4) == 0 ? 0 : up_to(batch.max_blocks * batch.block_size + 2));
    for (int32_t i = 0; i < batch.max_blocks; ++i) batch.table.push_back(up_to(9));
  }
  batch.num_tokens = batch.starts.back() + up_to(4);
  return batch;
}

}  // namespace

TEST_CASE("token_map finds request, position and slot of every token") {
  std::mt19937 random(5);
  for (int round = 0; round < 500; ++round) {
    const Batch batch = random_batch(random);
    const int32_t requests = batch.num_requests();
    const bool given = round % 2 == 0 || requests == 0;  // positions
    const auto tokens = static_cast<size_t>(batch.num_tokens);
    Ints positions(tokens), token_batch(tokens, -9), slots(tokens, -9);
    Ints row(static_cast<size_t>(requests), -9);
    const int32_t end = batch.max_blocks * batch.block_size;
    for (int32_t& position : positions) {
      position = static_cast<int32_t>(random()) & (2 * end - 1);
    }
    const Ints before = positions;
    InferCounts counts{};
    TokenMapParams params{};
    params.num_requests = requests;
    params.num_tokens = batch.num_tokens;
    params.query_start_loc = batch.starts.data();
    params.seq_lens = given ? nullptr : batch.lens.data();
    params.positions = positions.data();
    params.token_batch = token_batch.data();
    params.row = row.data();
    params.counts = &counts;
    params.slot_mapping = slots.data();
    params.block_table = batch.table.data();
    params.max_blocks = batch.max_blocks;
    params.block_size = batch.block_size;
    Step step(batch.num_tokens);
    token_map_cpu(params, step.ctx);

    for (int32_t t = 0; t < batch.num_tokens; ++t) {
      CAPTURE(t);
      const auto at = static_cast<size_t>(t);
      // By looking at every request.
      int32_t owner = -1;
      for (int32_t b = 0; b < requests; ++b) {
        if (batch.starts[static_cast<size_t>(b)] <= t &&
            t < batch.starts[static_cast<size_t>(b) + 1]) {
          owner = b;
        }
      }
      int32_t position = owner < 0 ? 0 : before[at];
      if (!given && owner >= 0) {
        const int32_t length = batch.lens[static_cast<size_t>(owner)];
        position = length - (batch.starts[static_cast<size_t>(owner) + 1] - t);
        if (length == 0 || position < 0) owner = -1;
        if (owner < 0) position = 0;
      }
      CHECK(token_batch[at] == owner);
      CHECK(positions[at] == (given ? before[at] : position));
      int32_t slot = -1;
      if (owner >= 0 && position < end) {
        const int32_t block =
            batch
                .table[static_cast<size_t>(owner * batch.max_blocks + position / batch.block_size)];
        if (block > 0) slot = block * batch.block_size + position % batch.block_size;
      }
      CHECK(slots[at] == slot);
    }
    int32_t decodes = requests;
    for (int32_t b = requests; b-- > 0;) {
      const auto at = static_cast<size_t>(b);
      CHECK(row[at] == (given || batch.lens[at] > 0 ? b : -1));
      if (batch.starts[at + 1] - batch.starts[at] > 1) decodes = b;
    }
    CHECK(counts.num_requests == requests);
    CHECK(counts.num_tokens == batch.num_tokens);
    CHECK(counts.num_decodes == decodes);
    CHECK(counts.num_extends == requests - decodes);
    CHECK(counts.num_prefills == 0);
    CHECK(counts.num_logits == 0);
  }
}

TEST_CASE("token_map writes what it was asked for and refuses a table without blocks") {
  const Ints starts = {0, 2}, table = {3};
  Ints positions = {0, 1}, slots = {-9, -9};
  TokenMapParams params{};
  params.num_requests = 1;
  params.num_tokens = 2;
  params.query_start_loc = starts.data();
  params.positions = positions.data();
  Step step(2);
  token_map_cpu(params, step.ctx);
  CHECK(positions == Ints{0, 1});
  params.slot_mapping = slots.data();
  params.block_table = table.data();
  params.max_blocks = 1;
  CHECK_THROWS_AS(token_map_cpu(params, step.ctx), Error);
  params.block_size = 4;
  token_map_cpu(params, step.ctx);
  CHECK(slots == Ints{12, 13});
}

TEST_CASE("sampling_rows gives each row its parameters, and all rows the same number") {
  const std::vector<float> temperature = {0.0f, 0.5f, 2.0f};
  const std::vector<uint64_t> seed = {1, uint64_t{1} << 63, 3};
  std::vector<Row> rows(3);
  std::vector<SamplingRow> sampling(3);
  Ints index(3, -9);
  std::fill_n(reinterpret_cast<char*>(rows.data()), 3 * sizeof(Row), '\x55');
  std::fill_n(reinterpret_cast<char*>(sampling.data()), 3 * sizeof(SamplingRow), '\x55');
  SamplingRowsParams params{};
  params.num_rows = 3;
  params.vocab_size = 8;
  params.rows = rows.data();
  params.sampling = sampling.data();
  params.index = index.data();
  params.temperature.values = temperature.data();
  params.top_p.value = 0.9f;
  params.min_p.value = 0.1f;
  params.top_k.value = 7;
  params.seed.values = seed.data();
  params.position.value = 41;
  Step step(3);
  sampling_rows_cpu(params, step.ctx);
  CHECK(index == Ints{0, 1, 2});
  for (size_t i = 0; i < 3; ++i) {
    CHECK(rows[i].phase == RowPhase::kDecode);
    CHECK(rows[i].total_len == 41);
    CHECK(rows[i].min_total_len == 0);
    CHECK(sampling[i].temperature == temperature[i]);
    CHECK(sampling[i].top_p == 0.9f);
    CHECK(sampling[i].min_p == 0.1f);
    CHECK(sampling[i].top_k == 7);
    CHECK(sampling[i].seed == seed[i]);
    CHECK(sampling[i].stop_ids.count == 0);
    CHECK(sampling[i].num_speculative_tokens == 0);
  }
  params.vocab_size = 7;  // which top_k keeps whole
  sampling_rows_cpu(params, step.ctx);
  for (const SamplingRow& each : sampling) CHECK(each.top_k == 0);
}

TEST_CASE("ngram_propose fills a row of drafts up with no token") {
  const Ints histories = {7, 8, 9, 7, 99, /*row*/ 1, 2, 3, 4, 99, /*row*/ 5, 5, 5, 99, 99};
  const Ints lengths = {4, 4, 3}, limits = {9, 9, 1};
  Ints drafts(9, -9), counts(3, -9);
  NgramProposeParams params{};
  params.num_requests = 3;
  params.histories = histories.data();
  params.history_stride = 5;
  params.lengths = lengths.data();
  params.max_drafts = 3;
  params.range = {1, 2};
  params.drafts = drafts.data();
  params.num_drafts = counts.data();
  Step step(3);
  ngram_propose_cpu(params, step.ctx);
  CHECK(drafts == Ints{8, 9, 7, -1, -1, -1, 5, -1, -1});
  CHECK(counts == Ints{3, 0, 1});
  params.limits = limits.data();
  params.max_drafts = 2;
  ngram_propose_cpu(params, step.ctx);
  CHECK(Ints(drafts.begin(), drafts.begin() + 6) == Ints{8, 9, -1, -1, 5, -1});
  CHECK(counts == Ints{2, 0, 1});
}

}  // namespace mrv1
