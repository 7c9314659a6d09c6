// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Ranks that agree on steps: all get the same numbers, and nobody waits for one that does not come.
#include "runner/step_agreement.h"

#include <doctest/doctest.h>

#include <atomic>
#include <thread>
#include <vector>

namespace mrv1 {
namespace {

bool never() { return false; }

// Waits until the rank is missed by others.
void await_wanted(const StepAgreement& agreement, int rank) {
  while (!agreement.is_wanted(rank)) std::this_thread::yield();
}

}  // namespace

TEST_CASE("All ranks learn what each brings to each of many steps") {
  constexpr int kRanks = 3, kSteps = 300;
  StepAgreement agreement(kRanks);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {
      const auto brings = [](int step, int by) { return step * (by + 1) % 5; };
      for (int step = 0; step < kSteps; ++step) {
        if ((step + rank) % 7 == 0) std::this_thread::yield();
        const StepLoads loads = agreement.agree(rank, {brings(step, rank), rank == 1}, never);
        bool runs = false;
        for (int other = 0; other < kRanks; ++other) {
          runs |= brings(step, other) > 0;
          wrong += loads.ranks[other].tokens != brings(step, other);
          wrong += loads.ranks[other].has_prompts != (other == 1);
        }
        wrong += loads.size != kRanks || loads.runs != runs;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
}

TEST_CASE("A rank that sleeps is woken once for a step that others want") {
  StepAgreement agreement(3);
  std::vector<int> woken(3, 0);
  for (int rank = 0; rank < 3; ++rank) agreement.set_wake(rank, [&woken, rank] { ++woken[rank]; });
  CHECK(!agreement.is_wanted(0));
  std::thread first([&] { CHECK(agreement.agree(0, {4, false}, never).runs); });
  await_wanted(agreement, 1);
  CHECK(!agreement.is_wanted(0));
  std::thread second([&] { CHECK(agreement.agree(1, {}, never).runs); });
  while (agreement.is_wanted(1)) std::this_thread::yield();
  CHECK(agreement.is_wanted(2));
  const StepLoads loads = agreement.agree(2, {}, never);
  first.join();
  second.join();
  CHECK(loads.runs);
  CHECK(loads.ranks[0].tokens == 4);
  CHECK(woken == std::vector<int>{0, 1, 1});
  for (int rank = 0; rank < 3; ++rank) CHECK(!agreement.is_wanted(rank));
}

TEST_CASE("Ranks that wait come back when the others have ended or closed") {
  StepAgreement agreement(2);
  std::atomic<bool> ended{false};
  std::thread waits(
      [&] { CHECK(!agreement.agree(0, {1, false}, [&] { return ended.load(); }).runs); });
  await_wanted(agreement, 1);
  ended = true;
  waits.join();
  // It is gone, as if it had not come: the next step needs both again.
  CHECK(!agreement.is_wanted(1));
  std::thread again([&] { CHECK(!agreement.agree(1, {1, false}, never).runs); });
  await_wanted(agreement, 0);
  CHECK(!agreement.is_closed());
  agreement.close();
  again.join();
  CHECK(agreement.is_closed());
  CHECK(!agreement.agree(0, {1, false}, never).runs);
}

}  // namespace mrv1
