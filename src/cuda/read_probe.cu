// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// How long launches take by the GPU's clock, and how fast it reads: what benchmarks compare steps
// with.
#include <algorithm>

#include "block.cuh"
#include "check.h"
#include "clock.cuh"
#include "core/device.h"
#include "core/probes.h"

namespace mrv1::cuda {
namespace {

constexpr std::string_view kWhere = "read_probe";

// Sixteen blocks for each of an H200's 132 processors: the fastest of the shapes that were tried,
// with enough loads in flight to cover the memory's latency.
constexpr int kBlocks = 2112;
constexpr int kThreads = 512;
constexpr int kLoadsInFlight = 8;

__global__ void __launch_bounds__(kThreads)
    fill_words_kernel(uint64_t* __restrict__ words, int64_t count) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    words[i] = static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15;
  }
}

__device__ __forceinline__ ulonglong2 load_streaming(const ulonglong2* address) {
  return __ldcs(address);
}

__global__ void __launch_bounds__(kThreads)
    read_words_kernel(const uint64_t* __restrict__ words, int64_t count, uint64_t* total) {
  const ulonglong2* pairs = reinterpret_cast<const ulonglong2*>(words);
  const int64_t num_pairs = count / 2;
  const int64_t tile = int64_t{kThreads} * kLoadsInFlight;
  uint64_t sum = 0;
  int64_t begin = blockIdx.x * tile + threadIdx.x;
  for (; begin + (kLoadsInFlight - 1) * kThreads < num_pairs; begin += gridDim.x * tile) {
    ulonglong2 values[kLoadsInFlight];
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i)
      values[i] = load_streaming(pairs + begin + i * kThreads);
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) sum += values[i].x + values[i].y;
  }
  // The last tile of a thread, where it is cut off by the end.
  for (int i = 0; i < kLoadsInFlight && begin + i * kThreads < num_pairs; ++i) {
    const ulonglong2 value = load_streaming(pairs + begin + i * kThreads);
    sum += value.x + value.y;
  }
  if (count % 2 != 0 && blockIdx.x == 0 && threadIdx.x == 0) sum += words[count - 1];
  // One addition a block: those of all blocks meet in one word.
  sum = whole_block_sum(sum);
  if (threadIdx.x == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(sum));
  }
}

__global__ void delay_kernel(uint64_t nanoseconds) {
  const uint64_t start = device_clock_ns();
  while (device_clock_ns() - start < nanoseconds) {
  }
}

// A timestamp in a stream.
class Event {
 public:
  Event() { check_cuda(cudaEventCreate(&event_), kWhere, "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) {
    check_cuda(cudaEventRecord(event_, stream), kWhere, "cudaEventRecord");
  }
  void wait() { check_cuda(cudaEventSynchronize(event_), kWhere, "cudaEventSynchronize"); }
  double seconds_since(const Event& begin) const {
    float milliseconds = 0.0f;
    check_cuda(cudaEventElapsedTime(&milliseconds, begin.event_, event_), kWhere,
               "cudaEventElapsedTime");
    return milliseconds * 1e-3;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

cudaStream_t stream_of(Device& device) { return static_cast<cudaStream_t>(device.stream()); }

}  // namespace

double time_launches(Device& device, const std::function<void()>& fn) {
  Event begin, end;
  begin.record(stream_of(device));
  fn();
  end.record(stream_of(device));
  end.wait();
  return end.seconds_since(begin);
}

void delay(Device& device, uint64_t nanoseconds) {
  delay_kernel<<<1, 1, 0, stream_of(device)>>>(nanoseconds);
  check_launch(kWhere);
}

void fill_words(Device& device, uint64_t* words, int64_t count) {
  fill_words_kernel<<<kBlocks, kThreads, 0, stream_of(device)>>>(words, count);
  check_launch(kWhere);
}

void read_words(Device& device, const uint64_t* words, int64_t count, uint64_t* total) {
  const int64_t tiles = count / (2 * int64_t{kThreads} * kLoadsInFlight) + 1;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, kBlocks));
  read_words_kernel<<<blocks, kThreads, 0, stream_of(device)>>>(words, count, total);
  check_launch(kWhere);
}

}  // namespace mrv1::cuda
