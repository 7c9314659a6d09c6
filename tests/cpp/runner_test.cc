// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The runner over a small random model: steps that run ahead, and what a steady step allocates.
#include <doctest/doctest.h>

#include <memory>
#include <numeric>
#include <vector>

#include "allocations.h"
#include "small_model.h"

namespace mrv1 {
namespace {

RowSpec request_of(int32_t row, float temperature) {
  RowSpec spec;
  spec.token_ids = {1, 2, 3, 4, 5};
  spec.prompt_len = 5;
  spec.temperature = temperature;
  spec.top_p = 0.9f;
  spec.top_k = temperature > 0 ? 20 : 0;
  spec.seed = 11;
  spec.max_tokens = 200;
  std::vector<int32_t>& blocks = spec.block_ids.emplace_back(16);
  std::iota(blocks.begin(), blocks.end(), 1 + row * 16);
  return spec;
}

int32_t add_request(ModelRunner& runner, int32_t row, float temperature) {
  return runner.add_row(request_of(row, temperature)).row;
}

}  // namespace

TEST_CASE("a steady decode step allocates nothing, on the host or on the stream") {
  RunnerConfig config = small_config();
  config.max_logprobs = 3;
  const auto runner = small_runner(config);
  std::vector<BatchItem> prefill, decode;
  for (int32_t row = 0; row < 4; ++row) {
    RowSpec spec = request_of(row, row % 2 == 0 ? 0.0f : 0.7f);
    if (row >= 2) {
      spec.num_logprobs = row;
      spec.num_prompt_logprobs = row;
      spec.repetition_penalty = 1.1f;
      spec.frequency_penalty = 0.1f;
      spec.logit_bias = {{4, 0.5f}};
      spec.bad_words = {{6}, {7, 8}};
      spec.stop_sequences = {{90, 91, 92, 93}};
    }
    const int32_t added = runner->add_row(spec).row;
    prefill.push_back({added, 5});
    decode.push_back({added, 1});
  }
  runner->result(runner->execute(prefill));
  for (int i = 0; i < 4; ++i) runner->result(runner->execute(decode));
  for (int i = 0; i < 50; ++i) {
    const int64_t before = count_allocations();
    const uint64_t step = runner->execute(decode);
    runner->device().synchronize();
    CHECK(count_allocations() == before);
    CHECK(runner->result(step).entries.size() == 4);
  }
}

TEST_CASE("steps that run ahead give the tokens of steps that do not") {
  std::vector<std::vector<int32_t>> all;
  for (size_t ahead : {1, 2, 4}) {
    const auto runner = small_runner();
    const int32_t row = add_request(*runner, 0, 0.7f);
    std::vector<uint64_t> launched;
    std::vector<int32_t> tokens;
    for (int i = 0; i < 60; ++i) {
      launched.push_back(runner->execute(std::vector<BatchItem>{{row, i == 0 ? 5 : 1}}));
      if (launched.size() - tokens.size() >= ahead) {
        tokens.push_back(runner->result(launched[tokens.size()]).tokens(0)[0]);
      }
    }
    while (tokens.size() < launched.size()) {
      tokens.push_back(runner->result(launched[tokens.size()]).tokens(0)[0]);
    }
    all.push_back(tokens);
  }
  CHECK(all[0] == all[1]);
  CHECK(all[0] == all[2]);
}

TEST_CASE("a failed step reports its error and the next one runs") {
  const auto runner = small_runner();
  const int32_t row = add_request(*runner, 0, 0.0f);
  runner->fail_next_step("planned");
  const StepOutput failed = runner->result(runner->execute(std::vector<BatchItem>{{row, 5}}));
  CHECK(failed.entries.empty());
  CHECK(failed.error.find("planned") != std::string::npos);
  runner->free_row({row});
  const int32_t other = add_request(*runner, 0, 0.0f);
  CHECK(runner->result(runner->execute(std::vector<BatchItem>{{other, 5}})).entries[0].num_tokens ==
        1);
}

}  // namespace mrv1
