// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Ranks with requests of their own: they run the same steps, and one that fails or hangs ends all.
#include "runner/data_ranks.h"

#include <doctest/doctest.h>

#include <chrono>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "engine/engine_group.h"
#include "error_text.h"
#include "hold.h"
#include "runner/rank_followers.h"
#include "small_model.h"

namespace mrv1 {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

// Ranks with the whole model each. As it has no experts, nothing travels between them: they keep
// step by what the host does alone.
struct Ranks {
  std::vector<std::shared_ptr<Device>> devices;
  std::shared_ptr<ModelRunner> first;

  explicit Ranks(int size, RunnerConfig config = small_config()) {
    config.num_ranks = size;
    config.rank_timeout = milliseconds(300);
    config.data_parallel = true;
    std::vector<Program> programs;
    for (int rank = 0; rank < size; ++rank) {
      devices.push_back(make_cpu_device(1));
      programs.push_back(small_model({0}));
    }
    first = make_runner(devices, std::move(programs),
                        std::vector<RunnerConfig>(static_cast<size_t>(size), config));
    for (int rank = 0; rank < size; ++rank) {
      WeightStore& weights = first->rank_runner(rank).weights();
      for (size_t i = 0; i < first->program().weights().size(); ++i) {
        weights.fill_random(static_cast<int32_t>(i), 7, 0.2f);
      }
      weights.check_complete();
    }
  }
};

NamedRequest request(const std::string& id, int32_t max_tokens = 40) {
  NamedRequest named;
  named.id = id;
  RowSpec& row = named.spec.row;
  row.token_ids = {5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
  row.prompt_len = static_cast<int32_t>(row.token_ids.size());
  row.temperature = 0.0f;
  row.max_tokens = max_tokens;
  return named;
}

std::vector<RequestOutput> run_out(EngineGroup& engine) {
  std::vector<RequestOutput> all;
  while (engine.has_unfinished()) {
    std::vector<RequestOutput> outputs = engine.wait_outputs(1.0);
    std::move(outputs.begin(), outputs.end(), std::back_inserter(all));
  }
  return all;
}

}  // namespace

TEST_CASE("Ranks with requests of their own run the same steps") {
  for (const StepMode mode : {StepMode::kEager, StepMode::kFull}) {
    RunnerConfig config = small_config();
    config.graph_mode = mode;
    config.capture_sizes = {{1, 1}, {4, 1}};
    Ranks ranks(3, config);
    ranks.first->capture_graphs();
    const uint64_t captured = ranks.first->launched_batches();
    EngineGroup engine(ranks.first, {});
    REQUIRE(engine.size() == 3);
    engine.add_request(request("a"), 1);
    CHECK(run_out(engine).size() == 40);
    // An id is one request's, on whichever rank; without a rank, the emptiest one takes it.
    engine.add_request(request("b"), 2);
    CHECK_THROWS_WITH_AS(engine.add_request(request("b"), 0), doctest::Contains("has this id"),
                         Error);
    engine.add_request(request("c"));
    CHECK(engine.abort("b", -1, /*report=*/false));
    CHECK(!engine.abort("b", -1, /*report=*/false));
    CHECK(run_out(engine).size() == 40);
    CHECK(engine.rank_stats(0).decode_tokens == 39);
    CHECK(engine.stats().prefill_tokens >= 24);
    engine.check_idle();
    engine.check_invariants();
    engine.stop();
    const uint64_t batches = ranks.first->launched_batches();
    CHECK(batches >= captured + 80);
    for (int rank = 1; rank < 3; ++rank) {
      CHECK(ranks.first->rank_runner(rank).launched_batches() == batches);
    }
  }
}

TEST_CASE("A rank that hangs ends all, and nobody waits for it") {
  for (const int rank : {0, 1}) {
    for (const bool comes_back : {true, false}) {
      CAPTURE(rank);
      CAPTURE(comes_back);
      auto ranks = std::make_unique<Ranks>(2);
      const std::shared_ptr<Device> stuck = ranks->devices[rank];
      const auto start = Clock::now();
      Hold hold(*stuck);
      {
        EngineGroup engine(ranks->first, {});
        // Of the other rank; this one would only go along.
        engine.add_request(request("a", 200), 1 - rank);
        const std::vector<RequestOutput> outputs = run_out(engine);
        REQUIRE(!outputs.empty());
        CHECK(outputs.back().end == RequestEnd::kError);
        CHECK(outputs.back().error.find(concat("rank ", rank, " did not end step")) !=
              std::string::npos);
        CHECK_THROWS_WITH_AS(engine.add_request(request("b")), doctest::Contains("did not end"),
                             Error);
        if (comes_back) hold.let_go();
        engine.stop();
      }
      ranks.reset();
      CHECK(Clock::now() - start < seconds(10));
      if (!comes_back) {
        hold.let_go();
        stuck->synchronize();
      }
    }
  }
}

TEST_CASE("Nothing is launched on any rank if one refuses its batch") {
  Ranks ranks(2);
  DataRanks& all = *ranks.first->data_ranks();
  const std::vector<std::vector<BatchItem>> wrong{{}, {{3, 1}}};
  CHECK_THROWS_AS(all.execute(wrong), Error);
  CHECK(ranks.first->launched_batches() == 0);
  const std::vector<std::vector<BatchItem>> empty(2);
  const std::vector<uint64_t> steps = all.execute(empty);
  for (int rank = 0; rank < 2; ++rank) {
    const StepOutput output = all.runner(rank).result(steps[static_cast<size_t>(rank)]);
    CHECK(output.error.empty());
    CHECK(output.entries.empty());
    CHECK(all.runner(rank).has_ended_batch(1));
    CHECK(!all.runner(rank).has_ended_batch(2));
  }
  // Memory of the device is not to be had while another rank is a step ahead.
  CHECK(!all.is_behind(1));
  const uint64_t ahead = all.runner(0).execute({});
  CHECK(all.is_behind(1));
  CHECK(!all.is_behind(0));
  CHECK_THROWS_WITH_AS(all.capture_graphs(), doctest::Contains("rank 1 has a step to launch"),
                       Error);
  all.runner(1).execute({});
  CHECK(all.runner(0).result(ahead).error.empty());
}

}  // namespace mrv1
