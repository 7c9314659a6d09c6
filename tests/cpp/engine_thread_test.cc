// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The engine's thread: names, queues, and an end for every wait. For ThreadSanitizer too.
#include "engine/engine_thread.h"

#include <doctest/doctest.h>

#include <atomic>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "small_model.h"

namespace mrv1 {
namespace {

NamedRequest named(std::string id, int32_t length, int32_t max_tokens, int32_t samples = 1) {
  NamedRequest request;
  request.id = std::move(id);
  request.samples = samples;
  for (int32_t i = 0; i < length; ++i) request.spec.row.token_ids.push_back((7 * i + 3) % kVocab);
  request.spec.row.prompt_len = length;
  request.spec.row.temperature = 0.0f;
  request.spec.row.max_tokens = max_tokens;
  return request;
}

using Tokens = std::map<std::pair<std::string, int32_t>, std::vector<int32_t>>;

}  // namespace

TEST_CASE("a thread steps while there is work and sleeps otherwise") {
  EngineThread engine(small_runner(), {});
  CHECK(!engine.has_unfinished());
  CHECK(engine.wait_outputs(10.0).empty());  // nothing is unfinished: at once
  engine.add_request(named("a", 9, 20));
  engine.add_request(named("b", 40, 20, 3));
  Tokens tokens;
  size_t ends = 0;
  while (engine.has_unfinished()) {
    for (const RequestOutput& output : engine.wait_outputs(10.0)) {
      auto& all = tokens[{output.id, output.index}];
      all.insert(all.end(), output.token_ids.begin(), output.token_ids.end());
      ends += output.end == RequestEnd::kLength;
    }
  }
  CHECK(ends == 4);
  CHECK(tokens.size() == 4);
  for (const auto& [name, all] : tokens) CHECK(all.size() == 20);
  engine.check_idle();
  const EngineThreadStats stats = engine.stats();
  CHECK(stats.thread_cpu_ns > 0);
  CHECK(stats.running == 0);
  CHECK(stats.waiting == 0);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(engine.stats().steps == stats.steps);
  CHECK(engine.stats().thread_cpu_ns == stats.thread_cpu_ns);
}

TEST_CASE("without a thread the caller steps, and commands take effect at once") {
  EngineThread engine(small_runner(), {.enable_prefix_caching = true, .background = false});
  CHECK_THROWS_AS(engine.wait_outputs(0), Error);
  engine.add_request(named("a", 9, 20));
  CHECK(engine.stats().waiting == 1);
  CHECK_THROWS_WITH_AS(engine.add_request(named("a", 9, 20)), doctest::Contains("unfinished"),
                       Error);
  CHECK_THROWS_AS(engine.add_request(named("b", 9, 20, 0)), Error);
  CHECK(engine.abort("a", -1, true));
  CHECK(!engine.abort("a", -1, true));
  CHECK(engine.stats().waiting == 0);
  CHECK_THROWS_AS(engine.add_request(named("a", 9, 20)), Error);  // its end was not handed out
  const auto outputs = engine.step();
  REQUIRE(outputs.size() == 1);
  CHECK(outputs[0].end == RequestEnd::kAbort);
  engine.add_request(named("a", 9, 20, 2));
  engine.step();
  CHECK(engine.abort("a", 1, false));
  CHECK(engine.abort("a", 0, false));
  engine.add_request(named("a", 9, 3));  // the name is free
  size_t count = 0;
  while (engine.has_unfinished()) {
    for (const RequestOutput& output : engine.step()) count += output.token_ids.size();
  }
  CHECK(count == 3);
  engine.check_idle();
}

TEST_CASE("waits end by wake, by the timeout and by stop") {
  EngineThread engine(small_runner(), {});
  engine.add_request(named("a", 9, 240));
  engine.wake();
  engine.wait_outputs(10.0);
  std::atomic<bool> ended = false;
  std::thread consumer([&] {
    while (!ended) {
      for (const RequestOutput& output : engine.wait_outputs(10.0)) {
        if (output.end != RequestEnd::kNone) ended = true;
      }
    }
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  engine.stop();
  consumer.join();
  CHECK_THROWS_AS(engine.add_request(named("b", 9, 3)), Error);
  CHECK(!engine.has_unfinished());
  engine.check_idle();
  engine.stop();
}

TEST_CASE("an abort without report drops what waits to be taken") {
  for (const int32_t samples : {1, 3}) {
    EngineThread engine(small_runner(), {});
    engine.add_request(named("a", 9, 20, samples));
    while (engine.stats().steps == 0 || engine.stats().running + engine.stats().waiting > 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK(!engine.abort("a", -1, /*report=*/false));  // it had ended
    CHECK(engine.wait_outputs(10.0).empty());
    // The next ones get the slots of those that nobody heard of.
    engine.add_request(named("a", 9, 3, samples));
    Tokens tokens;
    while (engine.has_unfinished()) {
      for (const RequestOutput& output : engine.wait_outputs(10.0)) {
        auto& all = tokens[{output.id, output.index}];
        all.insert(all.end(), output.token_ids.begin(), output.token_ids.end());
      }
    }
    CHECK(tokens.size() == static_cast<size_t>(samples));
    for (const auto& [name, all] : tokens) CHECK(all.size() == 3);
  }
}

TEST_CASE("closing with work in flight that nobody reads") {
  for (int round = 0; round < 20; ++round) {
    EngineThread engine(small_runner(), {});
    for (int i = 0; i < 6; ++i) engine.add_request(named(std::to_string(i), 20 + i, 100, 2));
    std::this_thread::sleep_for(std::chrono::microseconds(200 * round));
  }
}

TEST_CASE("many threads add, abort and look while one reads") {
  EngineThread engine(small_runner(), {});
  constexpr int kThreads = 3, kRequests = 40;
  std::atomic<int> running = kThreads, ends = 0, reported = 0, muted = 0;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = 0; i < kRequests; ++i) {
        const std::string id = std::to_string(thread) + "-" + std::to_string(i);
        engine.add_request(named(id, 3 + i, 12));
        ++reported;
        if (i % 5 == 0) engine.abort(id, -1, true);
        if (i % 7 == 3) {
          engine.abort(id, -1, false);
          ++muted;
        }
        if (i % 11 == 0) engine.check_invariants();
        engine.stats();
      }
      --running;
      engine.wake();
    });
  }
  while (running > 0 || engine.has_unfinished()) {
    for (const RequestOutput& output : engine.wait_outputs(1.0)) {
      ends += output.end != RequestEnd::kNone;
    }
  }
  for (std::thread& thread : threads) thread.join();
  // A muted request may have ended before.
  CHECK(ends <= reported);
  CHECK(ends >= reported - muted);
  engine.check_idle();
}

}  // namespace mrv1
