// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "runner/row_lists.h"
#include "runner/word_pool.h"
#include "state/output_ring.h"
#include "state/propose.h"

namespace mrv1 {
namespace {

NgramMatch best_match(const std::vector<int32_t>& history, NgramRange range) {
  return best_ngram_match(history.data(), static_cast<int32_t>(history.size()), range);
}

}  // namespace

TEST_CASE("the longest occurrence counts, then the most recent, and never the tokens themselves") {
  CHECK(best_match({5, 6, 7}, {1, 3}) == 0);
  CHECK(best_match({5}, {1, 3}) == 0);
  CHECK(ngram_match_end(best_match({5, 5}, {1, 3})) == 1);
  CHECK(ngram_match_end(best_match({5, 6, 7, 20, 6, 7, 30, 5, 6, 7}, {1, 3})) == 3);
  CHECK(ngram_match_end(best_match({5, 6, 7, 20, 6, 7, 30, 5, 6, 7}, {1, 2})) == 6);
  CHECK(best_match({7, 20, 8, 7}, {2, 3}) == 0);
  CHECK(ngram_match_end(best_match({7, 20, 8, 7}, {1, 1})) == 1);
}

TEST_CASE("drafts end with the history and with what is allowed") {
  std::vector<int32_t> history = {7, 8, 9, 7, 0, 0, 0, 0};
  CHECK(copy_drafts(history.data(), 4, best_match({7, 8, 9, 7}, {1, 3}), 9, &history[4]) == 3);
  CHECK(history == std::vector<int32_t>{7, 8, 9, 7, 8, 9, 7, 0});
  CHECK(copy_drafts(history.data(), 4, best_match({7, 8, 9, 7}, {1, 3}), 2, &history[4]) == 2);
  CHECK(copy_drafts(history.data(), 4, 0, 9, &history[4]) == 0);
}

TEST_CASE("drafts leave room for the token that follows them") {
  Row row{};
  row.phase = RowPhase::kDecode;
  row.total_len = 10;
  row.max_total_len = 14;
  SamplingRow sampling{};
  sampling.num_speculative_tokens = 5;
  CHECK(most_drafts({0, 0, 6, 6}, row, sampling) == 3);
  CHECK(most_drafts({0, 0, 3, 3}, row, sampling) == 2);
  CHECK(most_drafts({0, 0, 1, 1}, row, sampling) == 0);
  CHECK(most_drafts({0, 1, 6, 6}, row, sampling) == 0);  // another generation
  row.total_len = 13;
  CHECK(most_drafts({0, 0, 6, 6}, row, sampling) == 0);
  row.phase = RowPhase::kFinished;
  CHECK(most_drafts({0, 0, 6, 6}, row, sampling) == 0);
}

TEST_CASE("a row takes the draws up to the first that is not the next draft") {
  std::vector<int32_t> tokens = {1, 2, 3, 20, 21, 22, 0, 0};
  std::vector<int32_t> stop_ids = {21};
  Row row{};
  row.phase = RowPhase::kDecode;
  row.num_computed = 2;
  row.total_len = 3;
  row.max_total_len = 8;
  row.num_drafts = 3;
  SamplingRow sampling{};
  RowState state{};
  state.rows = &row;
  state.sampling = &sampling;
  state.tokens = tokens.data();
  state.max_model_len = 8;
  sampling.words = stop_ids.data();
  const BatchEntry entry{0, 0, 5, 5};
  const Row before = row;
  int32_t out[5];

  const int32_t mismatch[] = {20, 30, 22, 40};
  OutputEntry result = advance_row(state, entry, mismatch, out);
  CHECK(result.num_tokens == 2);
  CHECK(result.num_drafts == 3);
  CHECK(result.num_accepted == 1);
  CHECK(result.num_computed == 4);
  CHECK(result.total_len == 5);
  CHECK(tokens[4] == 30);

  row = before;
  tokens = {1, 2, 3, 20, 21, 22, 0, 0};
  const int32_t all[] = {20, 21, 22, 40};
  result = advance_row(state, entry, all, out);
  CHECK(result.num_tokens == 4);
  CHECK(result.num_accepted == 3);
  CHECK(result.num_computed == result.total_len - 1);

  row = before;
  sampling.stop_ids.count = 1;
  tokens = {1, 2, 3, 20, 21, 22, 0, 0};
  result = advance_row(state, entry, all, out);
  CHECK(result.num_tokens == 2);
  CHECK(result.finish_reason == FinishReason::kStop);

  row = before;
  sampling.stop_ids.count = 0;
  tokens = {1, 2, 3, 20, 21, 22, 0, 0};
  const int32_t error[] = {20, kErrorToken, 22, 40};
  result = advance_row(state, entry, error, out);
  CHECK(result.num_tokens == 1);
  CHECK(result.finish_reason == FinishReason::kError);
}

TEST_CASE("a stop sequence is made of outputs, and waits for min_tokens") {
  const int32_t sequences[] = {3, 3, 20, 21, /*second*/ 2, 20, 21};
  const int32_t history[] = {1, 2, 3, 20, 21};
  // The first one begins in the prompt.
  CHECK(ending_sequence(sequences, 2, history, 3, 5) == 1);
  CHECK(ending_sequence(sequences, 2, history, 2, 5) == 0);
  CHECK(ending_sequence(sequences, 1, history, 3, 5) == -1);
  CHECK(ending_sequence(sequences, 2, history, 3, 4) == -1);

  std::vector<int32_t> words(sequences, sequences + 7);
  std::vector<int32_t> tokens = {1, 2, 3, 20, 21, 22, 0, 0};
  Row row{};
  row.phase = RowPhase::kDecode;
  row.prompt_len = 3;
  row.num_computed = 2;
  row.total_len = 3;
  row.max_total_len = 8;
  row.num_drafts = 3;
  SamplingRow sampling{};
  sampling.words = words.data();
  sampling.stop_sequences.count = 2;
  RowState state{};
  state.rows = &row;
  state.sampling = &sampling;
  state.tokens = tokens.data();
  state.max_model_len = 8;
  const int32_t drawn[] = {20, 21, 22, 40};
  const Row before = row;
  int32_t out[4];
  OutputEntry result = advance_row(state, {0, 0, 4, 4}, drawn, out);
  CHECK(result.num_tokens == 2);
  CHECK(result.finish_reason == FinishReason::kStop);
  CHECK(result.stop_sequence == 1);

  row = before;
  row.min_total_len = 5;
  tokens = {1, 2, 3, 20, 21, 22, 0, 0};
  result = advance_row(state, {0, 0, 4, 4}, drawn, out);
  CHECK(result.num_tokens == 4);
  CHECK(result.finish_reason == FinishReason::kNone);
  CHECK(result.stop_sequence == -1);
}

TEST_CASE("the word pool grows by chunks and joins what comes back") {
  std::vector<std::vector<int32_t>> chunks;
  WordPool pool(8, [&](int64_t words) {
    if (words > 1000) throw std::bad_alloc();
    chunks.emplace_back(words);
    return chunks.back().data();
  });
  CHECK(chunks.size() == 1);
  int32_t* const first = pool.allocate(3);
  int32_t* const second = pool.allocate(4);
  CHECK(second == first + 4);
  int32_t* const large = pool.allocate(21);
  CHECK(chunks.size() == 2);
  CHECK(chunks[1].size() == 24);
  CHECK_THROWS_AS(pool.allocate(1001), std::bad_alloc);
  CHECK(pool.used() == 32);
  pool.release(first, 3);
  pool.release(second, 4);
  CHECK(pool.allocate(8) == first);
  pool.release(large, 21);
  pool.release(first, 8);
  CHECK(pool.used() == 0);
  CHECK(pool.capacity() == 32);
}

TEST_CASE("the lists of a row keep nothing of the row before") {
  RowLists lists;
  RowSpec spec;
  spec.presence_penalty = 1.0f;
  SamplingRow penalised;
  penalised.presence_penalty = 1.0f;
  lists.build(spec, 100, 50, penalised);
  CHECK(penalised.penalties.count == 50);
  CHECK(lists.zeros_offset > 0);
  SamplingRow plain;
  lists.build(RowSpec{}, 100, 50, plain);
  CHECK(lists.num_words == 0);
  CHECK(lists.num_zeros == 0);
  CHECK(lists.zeros_offset == 0);
}

}  // namespace mrv1
