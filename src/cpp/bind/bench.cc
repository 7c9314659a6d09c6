// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <chrono>
#include <memory>

#include "bind/bind.h"
#include "core/probes.h"

namespace mrv1 {
namespace {

// Words that one piece of work covers: long enough for the prefetchers, short enough that threads
// finish together.
constexpr int64_t kWordsPerPiece = int64_t{1} << 17;
// Independent sums, so that the loop waits for memory and not for its own additions.
constexpr int kLanes = 32;

[[gnu::always_inline]] inline uint64_t sum_body(const uint64_t* words, int64_t count) {
  uint64_t sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += words[i + lane];
  }
  for (; i < count; ++i) sums[0] += words[i];
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

// Narrow loads alone would be the limit on some machines, so the widest there are are used.
using SumWords = uint64_t (*)(const uint64_t* words, int64_t count);
uint64_t sum_baseline(const uint64_t* words, int64_t count) { return sum_body(words, count); }
#if defined(__x86_64__)
[[gnu::target("avx2")]] uint64_t sum_avx2(const uint64_t* words, int64_t count) {
  return sum_body(words, count);
}
[[gnu::target("avx512f")]] uint64_t sum_avx512(const uint64_t* words, int64_t count) {
  return sum_body(words, count);
}
#endif

SumWords widest_sum() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return sum_avx512;
  if (__builtin_cpu_supports("avx2")) return sum_avx2;
#endif
  return sum_baseline;
}

// A buffer that is larger than every cache, for plain reads.
class ReadProbe {
 public:
  ReadProbe(std::shared_ptr<Device> device, int64_t bytes) : device_(std::move(device)) {
    check(bytes >= int64_t{1} << 20, "read_probe", "bytes must be at least 2**20, not ", bytes);
    const MemoryInfo memory = device_->memory();
    if (static_cast<size_t>(bytes) > memory.free_bytes) {
      fail(ErrorKind::kOutOfMemory, "read_probe", "a buffer of ", bytes, " bytes is needed, ",
           memory.free_bytes, " are free");
    }
    num_words_ = bytes / static_cast<int64_t>(sizeof(uint64_t));
    buffer_ = device_->allocate(static_cast<size_t>(bytes), "read probe");
    if (device_->type() == DeviceType::kCuda) {
      total_ = device_->allocate(sizeof(uint64_t), "read probe");
      run_on_stream(*device_, [this] { cuda::fill_words(*device_, words(), num_words_); });
      return;
    }
    // Pages that were never written would all be the one zero page, which stays in cache.
    each_piece([words = words()](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i)
        words[i] = static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15;
    });
  }

  int64_t bytes() const { return num_words_ * static_cast<int64_t>(sizeof(uint64_t)); }

  // Seconds that one read of the whole buffer takes.
  double run() { return device_->type() == DeviceType::kCuda ? run_cuda() : run_cpu(); }

  uint64_t checksum() const { return checksum_; }

 private:
  uint64_t* words() const { return static_cast<uint64_t*>(buffer_.data()); }

  double run_cuda() {
    double seconds = 0.0;
    checksum_ = 0;
    auto* total = static_cast<uint64_t*>(total_.data());
    device_->copy_in(total, &checksum_, sizeof(checksum_));
    run_on_stream(*device_, [&] {
      seconds = cuda::time_launches(
          *device_, [&] { cuda::read_words(*device_, words(), num_words_, total); });
    });
    device_->copy_out(&checksum_, total, sizeof(checksum_));
    return seconds;
  }

  double run_cpu() {
    const uint64_t* words = this->words();
    std::atomic<uint64_t> total{0};
    const SumWords sum_words = widest_sum();
    const auto start = std::chrono::steady_clock::now();
    each_piece([words, &total, sum_words](int64_t begin, int64_t end, int) {
      total.fetch_add(sum_words(words + begin, end - begin), std::memory_order_relaxed);
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    checksum_ = total.load();  // the sum is used, so the reads are not left out
    return elapsed.count();
  }

  // Runs fn over the words in the device's stream, which is where the pool may be used.
  template <typename Fn>
  void each_piece(const Fn& fn) {
    run_on_stream(*device_, [&] { device_->pool()->parallel_for(num_words_, kWordsPerPiece, fn); });
  }

  std::shared_ptr<Device> device_;  // outlives the buffer
  Buffer buffer_, total_;
  int64_t num_words_ = 0;
  uint64_t checksum_ = 0;
};

struct ReadProbeHandle : Handle<ReadProbe> {
  using Handle::Handle;
};

}  // namespace

void bind_bench(nb::module_& m) {
  nb::class_<ReadProbeHandle>(
      m, "ReadProbe",
      "A buffer that a device reads from end to end with all it has: measures read bandwidth.\n\n"
      "Args:\n"
      "    device: Where it lies.\n"
      "    bytes: Size of the buffer, at least 2**20.\n\n"
      "Raises:\n"
      "    OutOfMemoryError: less memory is free.")
      .def(
          "__init__",
          [](ReadProbeHandle* self, const DeviceHandle& device, int64_t bytes) {
            new (self)
                ReadProbeHandle(std::make_shared<ReadProbe>(device.share(), bytes), "read probe");
          },
          nb::arg("device"), nb::arg("bytes"), nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("bytes", [](const ReadProbeHandle& self) { return self->bytes(); })
      .def_prop_ro(
          "checksum", [](const ReadProbeHandle& self) { return self->checksum(); },
          "Sum of the 64-bit words that the last run read, modulo 2**64.")
      .def(
          "run", [](const ReadProbeHandle& self) { return self->run(); },
          nb::call_guard<nb::gil_scoped_release>(),
          "Reads the buffer once; returns the seconds it took.")
      .def("close", &ReadProbeHandle::close);
}

}  // namespace mrv1
