// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The engine over stages of a pipeline: the tokens of one device, and one end for all when a rank
// fails or hangs. For the sanitizers too.
#include <doctest/doctest.h>

#include <chrono>
#include <iterator>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "engine/engine_thread.h"
#include "hold.h"
#include "pipeline.h"

namespace mrv1 {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

const std::vector<int32_t> kWindows{0, 8, 8, 0};
constexpr int32_t kRequests = 9;

// Less memory than the rows would take, and rows than requests.
RunnerConfig tight_config() {
  RunnerConfig config = small_config();
  config.block_size = 4;
  config.num_blocks = 48;
  config.max_model_len = 64;
  config.max_num_batched_tokens = 24;
  config.num_speculative_tokens = 2;
  return config;
}

NamedRequest numbered(int32_t number) {
  NamedRequest request;
  request.id = std::to_string(number);
  request.samples = number % 4 == 1 ? 2 : 1;
  RowSpec& row = request.spec.row;
  for (int32_t i = 0; i < 5 + 3 * number; ++i) row.token_ids.push_back((7 * i + number) % kVocab);
  row.prompt_len = static_cast<int32_t>(row.token_ids.size());
  row.temperature = number % 2 == 0 ? 0.0f : 0.8f;
  row.seed = static_cast<uint64_t>(number);
  row.max_tokens = 12 + 2 * number;
  request.spec.priority = number % 2;
  return request;
}

using Tokens = std::map<std::pair<std::string, int32_t>, std::vector<int32_t>>;

void take(std::vector<RequestOutput> outputs, Tokens& tokens) {
  for (const RequestOutput& output : outputs) {
    CHECK(output.error == "");
    std::vector<int32_t>& all = tokens[{output.id, output.index}];
    all.insert(all.end(), output.token_ids.begin(), output.token_ids.end());
  }
}

std::vector<RequestOutput> run_out(EngineThread& engine) {
  std::vector<RequestOutput> all;
  while (engine.has_unfinished()) {
    std::vector<RequestOutput> outputs = engine.wait_outputs(1.0);
    std::move(outputs.begin(), outputs.end(), std::back_inserter(all));
  }
  return all;
}

// Everybody is told the same, in time, and nobody is taken any more.
void check_end(EngineThread& engine, Clock::time_point start, const std::string& reason) {
  const std::vector<RequestOutput> outputs = run_out(engine);
  CHECK(Clock::now() - start < seconds(4));
  size_t ends = 0;
  for (const RequestOutput& output : outputs) {
    if (output.end == RequestEnd::kNone) continue;
    ++ends;
    CHECK(output.end == RequestEnd::kError);
    CHECK(output.error.find(reason) != std::string::npos);
  }
  CHECK(ends == kRequests + 2);  // two have two samples
  CHECK_THROWS_WITH_AS(engine.add_request(numbered(0)), doctest::Contains(reason.c_str()), Error);
}

}  // namespace

TEST_CASE("an engine over stages draws what one device draws, with little memory") {
  Tokens expected;
  for (const auto& layers :
       {std::vector<int32_t>{4}, std::vector<int32_t>{2, 2}, std::vector<int32_t>{1, 1, 1, 1}}) {
    CAPTURE(layers.size());
    for (const bool background : {false, true}) {
      Pipeline pipeline(layers, 1, tight_config(), kWindows);
      EngineThread engine(pipeline.runner, {.background = background});
      Tokens tokens;
      for (int32_t number = 0; number < kRequests; ++number) {
        engine.add_request(numbered(number));
        if (number % 3 == 2) {
          // One that ends in flight, wherever it is.
          NamedRequest aborted = numbered(number);
          aborted.id = "aborted";
          engine.add_request(std::move(aborted));
        }
        for (int i = 0; i < 3; ++i) {
          take(background ? engine.wait_outputs(0.001) : engine.step(), tokens);
        }
        engine.abort("aborted", -1, /*report=*/false);
        engine.check_invariants();
      }
      while (engine.has_unfinished()) {
        take(background ? engine.wait_outputs(1.0) : engine.step(), tokens);
      }
      engine.check_idle();
      if (!background) CHECK(engine.stats().preemptions > 0);
      tokens.erase({"aborted", 0});
      tokens.erase({"aborted", 1});
      if (expected.empty()) expected = tokens;
      CHECK(expected.size() == kRequests + 2);
      CHECK(tokens == expected);
    }
  }
}

TEST_CASE("a rank of a pipeline that fails ends all requests, with its name and its step") {
  for (int rank = 0; rank < 3; ++rank) {
    CAPTURE(rank);
    Pipeline pipeline({1, 2, 1}, 1, tight_config(), kWindows);
    EngineThread engine(pipeline.runner, {});
    NamedRequest before = numbered(2);
    before.id = "before";
    engine.add_request(std::move(before));
    CHECK(run_out(engine).back().end == RequestEnd::kLength);
    pipeline.runner->fail_next_step("no luck", rank);
    const auto start = Clock::now();
    // Those of the step, those in other steps, and those that wait for a row. The first of them may
    // find that it has ended.
    try {
      for (int32_t number = 0; number < kRequests; ++number) engine.add_request(numbered(number));
    } catch (const Error&) {
      CHECK_THROWS_WITH_AS(pipeline.runner->check_ranks(), doctest::Contains("no luck"), Error);
      for (const RequestOutput& output : run_out(engine)) CHECK(output.end == RequestEnd::kError);
      continue;
    }
    check_end(engine, start, concat("rank ", rank, " (stage ", rank, ") failed in step "));
    engine.check_idle();
  }
}

TEST_CASE("a rank of a pipeline that hangs ends all requests within its time") {
  RunnerConfig config = tight_config();
  config.rank_timeout = milliseconds(250);
  for (int rank = 0; rank < 3; ++rank) {
    CAPTURE(rank);
    Pipeline pipeline({1, 2, 1}, 1, config, kWindows);
    Hold hold(*pipeline.devices[static_cast<size_t>(rank)]);
    {
      EngineThread engine(pipeline.runner, {});
      const auto start = Clock::now();
      for (int32_t number = 0; number < kRequests; ++number) engine.add_request(numbered(number));
      check_end(engine, start, concat("rank ", rank, " (stage ", rank, ") did not "));
      engine.stop();
      hold.let_go();
    }
  }
}

}  // namespace mrv1
