// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// What passes between the stages of a pipeline on the CPU: schemas, values and their credits,
// outputs, and every wait when the one who is waited for is late, stops or fails.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "core/thread_pool.h"
#include "dist/cpu_communicator.h"
#include "dist/stage_link.h"
#include "error_text.h"
#include "ops/kernels.h"

namespace mrv1 {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr milliseconds kTimeout{200};
constexpr int64_t kMostTokens = 5;
constexpr int32_t kMostRequests = 4;
constexpr int32_t kSlots = 3;

// Ranks of a pipeline with what ops need of a step: values cross each boundary, and steps have
// records without anything in them.
class Pipeline {
 public:
  struct Rank {
    std::unique_ptr<Communicator> communicator;
    std::vector<std::vector<float>> received;
    std::vector<char> outputs, control, output;
    uint64_t step = 1;
    StepContext ctx;
  };

  explicit Pipeline(int num_stages, int size = 1, std::vector<int64_t> cols = {3},
                    milliseconds timeout = kTimeout)
      : cols_(std::move(cols)), pool_(1) {
    GroupOptions options;
    options.num_stages = num_stages;
    options.timeout = timeout;
    const auto output_bytes = static_cast<size_t>(output_tokens_end(kMostRequests, 0));
    std::vector<StageBuffers> buffers;
    std::vector<Communicator*> group;
    for (std::unique_ptr<Communicator>& communicator : make_cpu_group(num_stages * size, options)) {
      Rank& rank = *ranks_.emplace_back(std::make_unique<Rank>());
      StageBuffers& own = buffers.emplace_back();
      for (size_t i = 0; i < cols_.size(); ++i) {
        const StageValue value{std::string(1, static_cast<char>('a' + i)), cols_[i], DType::kF32};
        if (!communicator->is_last_stage()) own.sends.push_back(value);
        if (communicator->stage() == 0) continue;
        own.receives.push_back(value);
        rank.received.emplace_back(static_cast<size_t>(kMostTokens * cols_[i]));
        own.received.push_back(rank.received.back().data());
      }
      if (!communicator->is_last_stage()) {
        rank.outputs.resize(output_bytes * kSlots);
        own.outputs = rank.outputs.data();
        own.outputs_bytes = static_cast<int64_t>(output_bytes);
        own.num_slots = kSlots;
      }
      rank.control.resize(sizeof(ControlHeader));
      rank.output.resize(output_bytes);
      rank.ctx.pool = &pool_;
      rank.ctx.communicator = communicator.get();
      rank.ctx.infer.max_requests = kMostRequests;
      rank.ctx.rings.control = rank.control.data();
      rank.ctx.rings.output = rank.output.data();
      rank.ctx.rings.num_slots = 1;
      rank.ctx.rings.step = &rank.step;
      rank.communicator = std::move(communicator);
      group.push_back(rank.communicator.get());
    }
    link_stages(group, buffers);
  }

  int count() const { return static_cast<int>(ranks_.size()); }
  Rank& rank(int i) { return *ranks_[i]; }
  const StageLink& link(int i) { return *ranks_[i]->communicator->stage_link(); }

  void begin_step(int i, uint64_t step, uint64_t adopt_through = 0) {
    rank(i).step = step;
    auto& record = *reinterpret_cast<ControlHeader*>(rank(i).control.data());
    record = ControlHeader{};
    record.step = step;
    record.adopt_through = adopt_through;
  }
  void send(int i, const std::vector<std::vector<float>>& values, int64_t tokens) {
    StageSendParams params{};
    params.num_values = static_cast<int32_t>(values.size());
    for (size_t v = 0; v < values.size(); ++v) {
      params.values[v] = values[v].data();
      params.row_bytes[v] = cols_[v] * static_cast<int64_t>(sizeof(float));
    }
    StepContext ctx = rank(i).ctx;
    ctx.sizes.num_tokens = tokens;
    stage_send_cpu(params, ctx);
  }

 private:
  std::vector<int64_t> cols_;
  ThreadPool pool_;
  std::vector<std::unique_ptr<Rank>> ranks_;
};

float value_of(uint64_t step, int rank, int64_t value, int64_t i) {
  return static_cast<float>(step * 1000 + static_cast<uint64_t>(rank * 100 + value * 50 + i));
}

}  // namespace

TEST_CASE("stages are linked with those at the same place of the stages around them") {
  Pipeline pipeline(3, 2, {3, 7});
  for (int i = 0; i < 6; ++i) {
    CAPTURE(i);
    const StageLink& link = pipeline.link(i);
    const Communicator& rank = *pipeline.rank(i).communicator;
    CHECK(rank.global_rank() == i);
    CHECK(rank.size() == 2);
    CHECK(link.stage == i / 2);
    CHECK(link.num_stages == 3);
    CHECK(link.num_slots == kSlots);
    CHECK(link.last == pipeline.link(4 + i % 2).port);
    CHECK(link.previous == (i < 2 ? nullptr : pipeline.link(i - 2).port));
    CHECK(link.next == (i >= 4 ? nullptr : pipeline.link(i + 2).port));
    CHECK(link.num_values == (i < 4 ? 2 : 0));
    for (int value = 0; value < link.num_values; ++value) {
      CHECK(link.next_values[value] == pipeline.rank(i + 2).received[value].data());
    }
    for (int stage = 0; stage < 2; ++stage) {
      char* outputs = pipeline.rank(stage * 2 + i % 2).outputs.data();
      CHECK(link.stage_outputs[stage] == (link.is_last() ? outputs : nullptr));
    }
  }
  CHECK(pipeline.rank(3).communicator->name() == "rank 3 (stage 1)");
}

TEST_CASE("stages that do not fit each other are refused by the name of the value") {
  const StageValue x{"x", 64, DType::kBF16}, y{"y", 64, DType::kBF16};
  std::array<float, 64> place{};
  const auto refusal = [&](const std::vector<StageValue>& sends,
                           const std::vector<StageValue>& receives, int32_t slots = 4) {
    GroupOptions options;
    options.num_stages = 2;
    const auto group = make_cpu_group(2, options);
    StageBuffers first, second;
    first.sends = sends;
    first.outputs = place.data();
    first.outputs_bytes = 64;
    first.num_slots = slots;
    second.receives = receives;
    second.received.assign(receives.size(), place.data());
    const std::array<Communicator*, 2> ranks{group[0].get(), group[1].get()};
    const std::string message = message_of([&] { link_stages(ranks, std::array{first, second}); });
    CHECK((group[0]->stage_link() == nullptr) == !message.empty());
    return message;
  };
  CHECK(refusal({x, y}, {x, y}).empty());
  CHECK(has(refusal({x, y}, {x}), "rank 0 (stage 0) sends 'y', which rank 1 (stage 1) does not"));
  CHECK(has(refusal({x}, {x, y}), "rank 1 (stage 1) takes 'y', which rank 0 (stage 0) does not"));
  CHECK(has(refusal({x, y}, {y, x}), "value 0 is 'x'"));
  CHECK(has(refusal({x, y}, {y, x}), "order"));
  CHECK(has(refusal({x, x}, {x}), "twice"));
  CHECK(has(refusal({x}, {{"x", 32, DType::kBF16}}),
            "'x' has 64 columns of bfloat16 where rank 0 (stage 0) sends it and 32 columns"));
  CHECK(has(refusal({x}, {{"x", 64, DType::kF32}}), "64 columns of float32 where rank 1"));
  CHECK(has(refusal({x}, {x}, 1), "at least 2"));
  std::vector<StageValue> many;
  for (int i = 0; i <= kMaxStageValues; ++i) many.push_back({std::string(1, 'a' + i), 1});
  CHECK(has(refusal(many, many), "at most 4"));
}

TEST_CASE("devices make whole stages") {
  std::vector<std::shared_ptr<Device>> devices;
  for (int i = 0; i < 3; ++i) devices.push_back(make_cpu_device(1));
  GroupOptions options;
  options.num_stages = 2;
  CHECK_THROWS_WITH_AS(make_group(devices, options), doctest::Contains("3 ranks"), Error);
  options.num_stages = 0;
  CHECK_THROWS_WITH_AS(make_group(devices, options), doctest::Contains("0 stages"), Error);
  options.num_stages = 3;
  const auto group = make_group(devices, options);
  REQUIRE(group.size() == 3);
  CHECK(group[2]->stage() == 2);
  CHECK(group[2]->size() == 1);
  CHECK(group[2]->is_last_stage());
  CHECK(group[0]->stage_link() == nullptr);
}

TEST_CASE("collectives are those of a stage, and the end is everybody's") {
  GroupOptions options;
  options.num_stages = 2;
  options.timeout = kTimeout;
  const auto group = make_cpu_group(4, options);
  const auto cpu = [&](int rank) -> CpuCommunicator& {
    return static_cast<CpuCommunicator&>(*group[rank]);
  };
  std::array<int, 4> values{};
  std::array<int, 4> wrong{};
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 4; ++rank) {
    threads.emplace_back([&, rank] {
      // One stage meets more often than the other.
      for (int i = 0; i < (rank < 2 ? 300 : 100); ++i) {
        const auto shown = cpu(rank).exchange(&values[rank], "test");
        for (int other = 0; other < 2; ++other) {
          wrong[rank] += shown[other] != &values[rank / 2 * 2 + other];
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == std::array<int, 4>{});
  const std::string missed = message_of([&] { cpu(2).barrier("all_reduce"); });
  CHECK(has(missed, "rank 3 (stage 1) did not come to all_reduce within 200 ms"));
  CHECK(group[0]->abort_reason() == group[2]->abort_reason());
  CHECK(message_of([&] { cpu(0).barrier("all_reduce"); }) == missed);
}

TEST_CASE("values cross every boundary whole and in order, however late a stage is") {
  for (const auto& [num_stages, size] : {std::pair(2, 1), std::pair(3, 2), std::pair(4, 1)}) {
    CAPTURE(num_stages);
    const std::vector<int64_t> cols = {3, 9};
    Pipeline pipeline(num_stages, size, cols, seconds(20));
    std::vector<std::thread> threads;
    std::vector<int> wrong(static_cast<size_t>(pipeline.count()));
    for (int i = 0; i < pipeline.count(); ++i) {
      threads.emplace_back([&, i] {
        const int stage = i / size;
        Pipeline::Rank& rank = pipeline.rank(i);
        std::mt19937 delays(static_cast<uint32_t>(i)), sizes(7);
        const auto dawdle = [&] {
          if (delays() % 8 == 0) std::this_thread::sleep_for(microseconds(delays() % 300));
        };
        std::vector<std::vector<float>> values;
        for (const int64_t c : cols) values.emplace_back(static_cast<size_t>(kMostTokens * c));
        for (uint64_t step = 1; step <= 300; ++step) {
          const int64_t tokens = sizes() % (kMostTokens + 1);  // none, at times
          pipeline.begin_step(i, step);
          if (stage > 0) {
            stage_receive_cpu(rank.ctx);
            // Nobody writes over them until they are let go of, so two looks see the same.
            for (int look = 0; look < 2; ++look) {
              for (size_t v = 0; v < cols.size(); ++v) {
                for (int64_t j = 0; j < tokens * cols[v]; ++j) {
                  wrong[i] +=
                      rank.received[v][j] != value_of(step, i - size, static_cast<int64_t>(v), j);
                }
              }
              dawdle();
            }
            stage_release_cpu(rank.ctx);
          }
          if (stage + 1 < num_stages) {
            for (size_t v = 0; v < cols.size(); ++v) {
              for (int64_t j = 0; j < tokens * cols[v]; ++j) {
                values[v][j] = value_of(step, i, static_cast<int64_t>(v), j);
              }
            }
            dawdle();
            pipeline.send(i, values, tokens);
          }
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(std::count(wrong.begin(), wrong.end(), 0) == pipeline.count());
    for (int i = 0; i < pipeline.count(); ++i) {
      CHECK(pipeline.link(i).counters->received == (i < size ? 0 : 300));
      CHECK(pipeline.link(i).counters->sent == (i < pipeline.count() - size ? 300 : 0));
    }
  }
}

TEST_CASE("whoever waits for another stage comes back when it stops, and says for what") {
  struct Wait {
    const char* error;
    std::function<void(Pipeline&)> fn;
  };
  const std::vector<std::vector<float>> values = {std::vector<float>(3)};
  const std::vector<Wait> waits = {
      {"rank 0 (stage 0) did not send the values of step 7 within 200 ms: rank 1 (stage 1) waited",
       [](Pipeline& pipeline) {
         pipeline.begin_step(1, 7);
         stage_receive_cpu(pipeline.rank(1).ctx);
       }},
      {"rank 1 (stage 1) did not let go of the values before step 8 within 200 ms: rank 0 (stage "
       "0)",
       [&](Pipeline& pipeline) {
         pipeline.begin_step(0, 7);
         pipeline.send(0, values, 1);
         pipeline.begin_step(0, 8);
         pipeline.send(0, values, 1);
       }},
      {"rank 1 (stage 1) did not publish the outputs of step 1 within 200 ms: rank 0 (stage 0)",
       [](Pipeline& pipeline) {
         pipeline.begin_step(0, 3, 2);
         adopt_cpu(pipeline.rank(0).ctx);
       }},
      {"rank 0 (stage 0) did not adopt the outputs of step 1 within 200 ms: rank 1 (stage 1)",
       [](Pipeline& pipeline) {
         for (uint64_t step = 1; step <= 1 + kSlots; ++step) {
           pipeline.begin_step(1, step);
           advance_cpu(pipeline.rank(1).ctx);
         }
       }},
  };
  for (const Wait& wait : waits) {
    CAPTURE(wait.error);
    {
      Pipeline pipeline(2);
      const auto start = Clock::now();
      CHECK(has(message_of([&] { wait.fn(pipeline); }), wait.error));
      const auto took = Clock::now() - start;
      CHECK(took >= kTimeout);
      CHECK(took < kTimeout + seconds(5));
      CHECK(pipeline.rank(0).communicator->is_aborted());
      CHECK(pipeline.rank(1).communicator->is_aborted());
    }
    {
      Pipeline pipeline(2, 1, {3}, seconds(60));
      auto woken =
          std::async(std::launch::async, [&] { return message_of([&] { wait.fn(pipeline); }); });
      std::this_thread::sleep_for(milliseconds(20));
      pipeline.rank(0).communicator->abort("out of luck");
      REQUIRE(woken.wait_for(seconds(10)) == std::future_status::ready);
      CHECK(has(woken.get(), "out of luck"));
      // And again, without a wait.
      CHECK(has(message_of([&] { wait.fn(pipeline); }), "out of luck"));
    }
  }
}

TEST_CASE("the stage that all others wait for is the one that is named") {
  Pipeline pipeline(3);
  std::vector<std::future<std::string>> messages;
  messages.push_back(std::async(std::launch::async, [&] {
    return message_of([&] {
      pipeline.begin_step(2, 1);
      stage_receive_cpu(pipeline.rank(2).ctx);
    });
  }));
  std::this_thread::sleep_for(milliseconds(20));
  messages.push_back(std::async(std::launch::async, [&] {
    return message_of([&] {
      pipeline.begin_step(1, 1);
      stage_receive_cpu(pipeline.rank(1).ctx);
    });
  }));
  for (std::future<std::string>& message : messages) {
    CHECK(has(message.get(), "rank 0 (stage 0) did not send the values of step 1"));
  }
}

TEST_CASE("a rank that is slow is waited for") {
  Pipeline pipeline(3);
  auto late = std::async(std::launch::async, [&] {
    return message_of([&] {
      pipeline.begin_step(2, 1);
      stage_receive_cpu(pipeline.rank(2).ctx);
    });
  });
  // Not the one who is waited for, but the one who that waits for.
  for (int i = 0; i < 25; ++i) {
    std::this_thread::sleep_for(kTimeout / 10);
    pipeline.rank(0).communicator->show_life();
  }
  pipeline.begin_step(1, 1);
  pipeline.send(1, {std::vector<float>(3)}, 1);
  CHECK(late.get().empty());
  CHECK(pipeline.link(2).counters->waited_ns >=
        static_cast<uint64_t>(std::chrono::nanoseconds(2 * kTimeout).count()));
  // What a step's waits have cost is in its output.
  advance_cpu(pipeline.rank(2).ctx);
  const auto* slot = reinterpret_cast<const OutputHeader*>(pipeline.rank(2).output.data());
  CHECK(slot->waited_ns == pipeline.link(2).counters->waited_ns);
}

}  // namespace mrv1
