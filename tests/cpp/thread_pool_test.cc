// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "core/thread_pool.h"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "core/error.h"

namespace mrv1 {
namespace {

TEST_CASE("parallel_for runs every item once") {
  for (int num_threads : {1, 2, 5}) {
    ThreadPool pool(num_threads);
    CHECK(pool.num_threads() == num_threads);
    for (int64_t count : {0, 1, 2, 63, 1000}) {
      for (int64_t grain : {0, 1, 7, 5000}) {
        std::vector<int> seen(static_cast<size_t>(count));
        pool.parallel_for(count, grain, [&](int64_t begin, int64_t end, int thread) {
          if (thread < 0 || thread >= num_threads) return;
          for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
        });
        for (int times : seen) REQUIRE(times == 1);
      }
    }
  }
}

TEST_CASE("parallel_for: many short loops, and loops after the workers have parked") {
  ThreadPool pool(3);
  int64_t total = 0;
  std::vector<int64_t> parts(64);
  for (int loop = 0; loop < 20000; ++loop) {
    pool.parallel_for(64, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) parts[static_cast<size_t>(i)] += loop;
    });
    total += loop;
    if (loop % 2000 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  for (int64_t part : parts) REQUIRE(part == total);
}

TEST_CASE("workers take part") {
  ThreadPool pool(2);
  std::atomic<int> arrived{0};
  // Each item waits for the other: one thread alone would never end.
  pool.parallel_for(2, 1, [&](int64_t, int64_t, int) {
    arrived.fetch_add(1);
    while (arrived.load() < 2) std::this_thread::yield();
  });
  CHECK(arrived.load() == 2);
}

TEST_CASE("a pool needs a thread") { CHECK_THROWS_AS(ThreadPool(0), Error); }

}  // namespace
}  // namespace mrv1
