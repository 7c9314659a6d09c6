// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <cstring>
#include <exception>
#include <span>
#include <thread>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"
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
