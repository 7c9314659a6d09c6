// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <exception>
#include <span>
#include <thread>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"
#include "core/error.h"
#include "core/probes.h"

namespace mrv1 {

// fn(rank) in a thread of each rank's own, but for `absent`; throws what one of them threw.
template <typename Fn>
void run_ranks(int count, int absent, const Fn& fn) {
  std::vector<std::exception_ptr> errors(static_cast<size_t>(count));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < count; ++rank) {
    if (rank == absent) continue;
    threads.emplace_back([&, rank] {
      try {
        fn(rank);
      } catch (...) {
        errors[static_cast<size_t>(rank)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

// A graph of what launch(rank) launches, on every rank: each has a `device` and a `graph`.
template <typename Ranks, typename Launch>
void capture_graphs(Ranks& ranks, const Launch& launch) {
  const int count = static_cast<int>(ranks.size());
  // Once before, as a step does: what is made at a first launch cannot be captured.
  run_ranks(count, -1, [&](int i) {
    auto& rank = ranks[static_cast<size_t>(i)];
    run_on_stream(*rank.device, [&] { launch(rank); });
  });
  run_ranks(count, -1, [&](int i) {
    auto& rank = ranks[static_cast<size_t>(i)];
    // A device without graphs keeps the function.
    run_on_stream(*rank.device, [&rank, launch] {
      rank.graph = rank.device->capture([&rank, launch] { launch(rank); });
    });
  });
}

// Seconds of a graph on the slowest rank, in each of `repeats` runs of `launches`. By the clock of
// a GPU, else of the host.
template <typename Ranks>
std::vector<double> time_graphs(Ranks& ranks, int32_t repeats, int32_t launches) {
  check(repeats > 0 && launches > 0, "probe", "repeats is ", repeats, " and launches ", launches,
        "; both must be positive");
  std::vector<double> slowest;
  for (int32_t repeat = 0; repeat < repeats; ++repeat) {
    std::vector<double> seconds(ranks.size());
    run_ranks(static_cast<int>(ranks.size()), -1, [&](int i) {
      auto& rank = ranks[static_cast<size_t>(i)];
      double& spent = seconds[static_cast<size_t>(i)];
      run_on_stream(*rank.device, [&] {
        const auto launch_all = [&] {
          for (int32_t launch = 0; launch < launches; ++launch) rank.device->launch(*rank.graph);
        };
        if (rank.device->type() == DeviceType::kCuda) {
          // Ranks that have met once are in step; whoever came first would count its wait.
          rank.device->launch(*rank.graph);
          spent = cuda::time_launches(*rank.device, launch_all);
          return;
        }
        const auto start = std::chrono::steady_clock::now();
        launch_all();
        spent = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      });
    });
    slowest.push_back(*std::max_element(seconds.begin(), seconds.end()) / launches);
  }
  return slowest;
}

// Keeps a device's stream from going on for so long. From inside a task of the stream.
inline void hold_stream(Device& device, std::chrono::nanoseconds time) {
  if (device.type() == DeviceType::kCuda) {
    cuda::delay(device, static_cast<uint64_t>(time.count()));
  } else {
    std::this_thread::sleep_for(time);
  }
}

// Values as they lie in memory, rounded to dtype, and back.
inline std::vector<char> stored_values(std::span<const float> values, DType dtype) {
  std::vector<char> bytes(values.size() * dtype_size(dtype));
  dispatch_activation(dtype, "probe", [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (size_t i = 0; i < values.size(); ++i) {
      const T value = from_float<T>(values[i]);
      std::memcpy(bytes.data() + i * sizeof(T), &value, sizeof(T));
    }
  });
  return bytes;
}
inline std::vector<float> loaded_values(std::span<const char> bytes, DType dtype) {
  std::vector<float> values(bytes.size() / dtype_size(dtype));
  dispatch_activation(dtype, "probe", [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (size_t i = 0; i < values.size(); ++i) {
      T value;
      std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
      values[i] = to_float(value);
    }
  });
  return values;
}

}  // namespace mrv1
