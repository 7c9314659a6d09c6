// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>

#include "core/device.h"

namespace mrv1::cuda {

// What benchmarks measure of a GPU by its own clock. Implemented by src/cuda, or by src/cpp/no_cuda
// in a build without CUDA, where every call throws kDevice. To be called from inside tasks of the
// device's stream (run_on_stream).

// Seconds from the start to the end of what fn() launches. Waits for it.
double time_launches(Device& device, const std::function<void()>& fn);

// Keeps the device busy for so many nanoseconds, with nothing.
void delay(Device& device, uint64_t nanoseconds);

// Fills `count` words with i * 0x9e3779b97f4a7c15.
void fill_words(Device& device, uint64_t* words, int64_t count);

// Reads `words`, aligned to 16 bytes, from end to end and adds them to *total, modulo 2^64; all
// addresses are the device's.
void read_words(Device& device, const uint64_t* words, int64_t count, uint64_t* total);

}  // namespace mrv1::cuda
