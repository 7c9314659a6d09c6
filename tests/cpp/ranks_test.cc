// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Ranks that fail, hang or come late: the others hear of it in time, and nothing stays behind.
#include <doctest/doctest.h>

#include <array>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "allocations.h"
#include "core/error.h"
#include "dist/cpu_communicator.h"
#include "engine/engine_thread.h"
#include "error_text.h"
#include "hold.h"
#include "runner/rank_followers.h"
#include "small_model.h"

namespace mrv1 {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr milliseconds kTimeout{300};

std::vector<std::unique_ptr<Communicator>> group_of(int size, milliseconds timeout = kTimeout) {
  GroupOptions options;
  options.timeout = timeout;
  return make_cpu_group(size, options);
}

CpuCommunicator& cpu(const std::unique_ptr<Communicator>& rank) {
  return static_cast<CpuCommunicator&>(*rank);
}

// Threads of this process whose names begin so.
int count_threads(const std::string& name) {
  int count = 0;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string comm;
    std::ifstream(task.path() / "comm") >> comm;
    count += comm.starts_with(name);
  }
  return count;
}

// Ranks with the whole model each.
struct Group {
  std::vector<std::shared_ptr<Device>> devices;
  std::shared_ptr<ModelRunner> runner;

  explicit Group(int size, RunnerConfig config = small_config()) {
    config.num_ranks = size;
    config.rank_timeout = kTimeout;
    std::vector<Program> programs;
    for (int rank = 0; rank < size; ++rank) {
      devices.push_back(make_cpu_device(1));
      programs.push_back(small_model({0}, /*ranked=*/true));
    }
    runner = make_runner(devices, std::move(programs),
                         std::vector<RunnerConfig>(static_cast<size_t>(size), config));
    for (int rank = 0; rank < size; ++rank) {
      WeightStore& weights = runner->rank_runner(rank).weights();
      for (size_t i = 0; i < runner->program().weights().size(); ++i) {
        weights.fill_random(static_cast<int32_t>(i), 7, 0.2f);
      }
      weights.check_complete();
    }
  }
};

NamedRequest request(const std::string& id) {
  NamedRequest named;
  named.id = id;
  RowSpec& row = named.spec.row;
  row.token_ids = {5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22};
  row.prompt_len = static_cast<int32_t>(row.token_ids.size());
  row.temperature = 0.0f;
  row.max_tokens = 40;
  return named;
}

// What the requests of an engine give until none is left.
std::vector<RequestOutput> run_out(EngineThread& engine) {
  std::vector<RequestOutput> all;
  while (engine.has_unfinished()) {
    std::vector<RequestOutput> outputs = engine.wait_outputs(1.0);
    std::move(outputs.begin(), outputs.end(), std::back_inserter(all));
  }
  return all;
}

std::vector<int32_t> tokens_of(const std::vector<RequestOutput>& outputs, const std::string& id) {
  std::vector<int32_t> tokens;
  for (const RequestOutput& output : outputs) {
    if (output.id == id)
      tokens.insert(tokens.end(), output.token_ids.begin(), output.token_ids.end());
  }
  return tokens;
}

}  // namespace

TEST_CASE("ranks show each other what they have") {
  const auto group = group_of(3);
  std::vector<int> values{10, 20, 30};
  std::vector<std::thread> threads;
  std::vector<int> wrong(3, 0);
  for (int rank = 0; rank < 3; ++rank) {
    threads.emplace_back([&, rank] {
      for (int i = 0; i < 500; ++i) {
        const auto shown = cpu(group[rank]).exchange(&values[(rank + i) % 3], "test");
        for (int other = 0; other < 3; ++other) {
          wrong[rank] += shown[other] != &values[(other + i) % 3];
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == std::vector<int>{0, 0, 0});
  CHECK(!group[0]->is_aborted());
}

TEST_CASE("a rank that does not come is named, and the group ends for good") {
  const auto group = group_of(3);
  const auto start = Clock::now();
  std::string second;
  std::thread other([&] { second = message_of([&] { cpu(group[2]).barrier("all_reduce"); }); });
  const std::string first = message_of([&] { cpu(group[0]).barrier("all_reduce"); });
  other.join();
  CHECK(Clock::now() - start >= kTimeout);
  CHECK(has(first, "rank 1 did not come to all_reduce within 300 ms"));
  CHECK(second == first);
  // Late, it is told at once.
  const auto late = Clock::now();
  CHECK(message_of([&] { cpu(group[1]).barrier("all_gather"); }) == first);
  CHECK(Clock::now() - late < kTimeout);
  CHECK_THROWS_WITH_AS(group[1]->check_alive(), doctest::Contains("rank 1"), Error);
}

TEST_CASE("an abort wakes whoever waits, and the first reason stays") {
  const auto group = group_of(2, seconds(60));
  std::string woken;
  std::thread waiting([&] { woken = message_of([&] { cpu(group[0]).barrier("all_reduce"); }); });
  std::this_thread::sleep_for(milliseconds(20));
  group[1]->abort("rank 1 is out of memory");
  group[0]->abort("later");
  waiting.join();
  CHECK(has(woken, "rank 1 is out of memory"));
  CHECK(group[0]->abort_reason() == "rank 1 is out of memory");
}

TEST_CASE("ranks draw the same tokens in every mode of steps") {
  std::vector<int32_t> expected;
  constexpr std::array kModes{StepMode::kEager, StepMode::kPiecewise, StepMode::kFull};
  for (size_t i = 0; i < 2 * kModes.size(); ++i) {
    RunnerConfig config = small_config();
    config.graph_mode = kModes[i % kModes.size()];
    config.capture_sizes = {{1, 1}, {4, 1}};
    config.piecewise_sizes = {16, 32};
    const bool in_halves = i >= kModes.size();
    config.two_batch.mode = in_halves ? TwoBatchMode::kOn : TwoBatchMode::kOff;
    CAPTURE(i);
    Group group(2, config);
    group.runner->capture_graphs();
    EngineThread engine(group.runner, {});
    engine.add_request(request("a"));
    const std::vector<RequestOutput> outputs = run_out(engine);
    const std::vector<int32_t> tokens = tokens_of(outputs, "a");
    CHECK(tokens.size() == 40);
    if (expected.empty()) expected = tokens;
    CHECK(tokens == expected);
    CHECK((group.runner->stats().steps_in_halves > 0) == in_halves);
    CHECK(group.runner->rank_runner(1).stats().steps_in_halves ==
          group.runner->stats().steps_in_halves);
    engine.check_idle();
    // Every rank has computed every step, and holds what rank 0 holds.
    REQUIRE(group.runner->settles(Clock::now() + seconds(5)));
    CHECK(group.runner->rank_runner(1).stats().batches == group.runner->stats().batches);
    CHECK(group.runner->rank_runner(1).free_rows() == config.max_num_seqs);
  }
}

TEST_CASE("a step that fails on all ranks fails alone") {
  Group group(2);
  EngineThread engine(group.runner, {});
  group.runner->fail_next_step("meant to");
  engine.add_request(request("a"));
  const std::vector<RequestOutput> failed = run_out(engine);
  REQUIRE(failed.size() == 1);
  CHECK(has(failed[0].error, "meant to"));
  engine.add_request(request("b"));
  CHECK(tokens_of(run_out(engine), "b").size() == 40);
  engine.check_idle();
}

TEST_CASE("a rank that fails ends the engine, and is named with its step") {
  for (const int rank : {0, 1}) {
    CAPTURE(rank);
    const int threads = count_threads("mrv1-");
    {
      Group group(2);
      EngineThread engine(group.runner, {});
      engine.add_request(request("before"));
      CHECK(tokens_of(run_out(engine), "before").size() == 40);
      group.runner->fail_next_step("no luck", rank);
      const auto start = Clock::now();
      engine.add_request(request("a"));
      const std::vector<RequestOutput> outputs = run_out(engine);
      CHECK(Clock::now() - start < seconds(10));
      REQUIRE(!outputs.empty());
      CHECK(outputs.back().end == RequestEnd::kError);
      CHECK(has(outputs.back().error, concat("rank ", rank, " failed in step ")));
      CHECK(has(outputs.back().error, "no luck"));
      CHECK_THROWS_WITH_AS(engine.add_request(request("b")), doctest::Contains("no luck"), Error);
      engine.stop();
    }
    CHECK(count_threads("mrv1-") == threads);
  }
}

TEST_CASE("a rank that hangs ends the engine, and nobody waits for it") {
  for (const int rank : {0, 1}) {
    for (const bool comes_back : {true, false}) {
      CAPTURE(rank);
      CAPTURE(comes_back);
      RunnerConfig config = small_config();
      config.two_batch.mode = comes_back ? TwoBatchMode::kOn : TwoBatchMode::kOff;
      auto group = std::make_unique<Group>(2, config);
      const std::shared_ptr<Device> stuck = group->devices[rank];
      const auto start = Clock::now();
      Hold hold(*stuck);
      {
        EngineThread engine(group->runner, {});
        engine.add_request(request("a"));
        const std::vector<RequestOutput> outputs = run_out(engine);
        REQUIRE(outputs.size() == 1);
        CHECK(outputs[0].end == RequestEnd::kError);
        CHECK(has(outputs[0].error, concat("rank ", rank, " did not come to all_reduce")));
        CHECK_THROWS_WITH_AS(engine.add_request(request("b")),
                             doctest::Contains("did not come to all_reduce"), Error);
        if (comes_back) hold.let_go();
        engine.stop();
      }
      group.reset();
      CHECK(Clock::now() - start < seconds(10));
      if (comes_back) {
        CHECK(stuck.use_count() == 1);  // all is given back
      } else {
        CHECK(stuck.use_count() > 1);  // what the device may still touch is not
        hold.let_go();
        stuck->synchronize();
      }
    }
  }
}

TEST_CASE("a steady step of several ranks allocates nothing") {
  for (const bool grammar : {false, true}) {
    CAPTURE(grammar);
    RunnerConfig config = small_config();
    config.two_batch.mode = TwoBatchMode::kOn;
    Group group(2, config);
    ModelRunner& runner = *group.runner;
    RowSpec spec = request("a").spec.row;
    spec.max_tokens = 230;
    spec.grammar = grammar;
    for (int32_t block = 1; block <= 16; ++block) {
      if (spec.block_ids.empty()) spec.block_ids.emplace_back();
      spec.block_ids[0].push_back(block);
    }
    const RowHandle row = runner.add_row(spec);
    StepOutput output;
    const auto run = [&](const std::vector<BatchItem>& batch) {
      const uint64_t step = runner.execute(batch, /*in_halves=*/true);
      if (runner.cut_step() != 0) {
        runner.wait_masks();
        runner.masks().allow_all(row.row);
        runner.finish_step();
      }
      runner.result(step, output);
    };
    run({{row.row, spec.prompt_len}});
    const std::vector<BatchItem> batch{{row.row, 1}};
    for (int i = 0; i < 10; ++i) run(batch);
    REQUIRE(runner.settles(Clock::now() + seconds(5)));
    const int64_t before = count_allocations();
    for (int i = 0; i < 40; ++i) run(batch);
    while (runner.rank_runner(1).stats().batches < runner.stats().batches) {
      std::this_thread::yield();
    }
    CHECK(count_allocations() == before);
    CHECK(output.error.empty());
    CHECK(output.cut_token == 1);
  }
}

TEST_CASE("ranks that do not fit each other are refused") {
  RunnerConfig config = small_config();
  config.num_ranks = 2;
  const auto make = [&](size_t programs) {
    make_runner({make_cpu_device(1), make_cpu_device(1)},
                std::vector<Program>(programs, small_model({0}, true)), {config, config});
  };
  CHECK_THROWS_AS(make(1), Error);
  config.num_ranks = 3;
  CHECK_THROWS_WITH_AS(make(2), doctest::Contains("num_ranks"), Error);
  config.num_ranks = 2;
  for (const milliseconds timeout : {milliseconds(0), milliseconds::max()}) {
    config.rank_timeout = timeout;
    CHECK_THROWS_WITH_AS(make(2), doctest::Contains("rank_timeout"), Error);
  }
}

}  // namespace mrv1
