// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "core/probes.h"
#include "program/attention_probe.h"
#include "program/kv_store.h"
#include "runner/sample_probe.h"

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
    each_piece(num_words_, [words = words()](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i)
        words[i] = static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15;
    });
  }

  int64_t bytes() const { return num_words_ * static_cast<int64_t>(sizeof(uint64_t)); }

  // Seconds that one read of the whole buffer takes.
  double run() { return device_->type() == DeviceType::kCuda ? run_cuda() : run_cpu(); }

  // Seconds that a copy of the first half of the buffer over the second takes.
  double copy() {
    const int64_t half = num_words_ / 2;
    const uint64_t* from = words();
    uint64_t* to = words() + half;
    double seconds = 0.0;
    if (device_->type() == DeviceType::kCuda) {
      run_on_stream(*device_, [&] {
        seconds = cuda::time_launches(*device_, [&] {
          device_->copy_within(to, from, static_cast<size_t>(half) * sizeof(uint64_t));
        });
      });
      return seconds;
    }
    const auto start = std::chrono::steady_clock::now();
    each_piece(half, [from, to](int64_t begin, int64_t end, int) {
      std::copy(from + begin, from + end, to + begin);
    });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

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
    each_piece(num_words_, [words, &total, sum_words](int64_t begin, int64_t end, int) {
      total.fetch_add(sum_words(words + begin, end - begin), std::memory_order_relaxed);
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    checksum_ = total.load();  // the sum is used, so the reads are not left out
    return elapsed.count();
  }

  // Runs fn over the first words in the device's stream, which is where the pool may be used.
  template <typename Fn>
  void each_piece(int64_t count, const Fn& fn) {
    run_on_stream(*device_, [&] { device_->pool()->parallel_for(count, kWordsPerPiece, fn); });
  }

  std::shared_ptr<Device> device_;  // outlives the buffer
  Buffer buffer_, total_;
  int64_t num_words_ = 0;
  uint64_t checksum_ = 0;
};

struct ReadProbeHandle : Handle<ReadProbe> {
  using Handle::Handle;
};

struct AttentionProbeHandle : Handle<AttentionProbe> {
  using Handle::Handle;
};

struct SampleProbeHandle : Handle<SampleProbe> {
  using Handle::Handle;
};

KvScaleKind scales_named(const std::string& name) {
  if (name == "none") return KvScaleKind::kNone;
  if (name == "tensor") return KvScaleKind::kTensor;
  if (name == "head") return KvScaleKind::kHead;
  check(name == "token", "attention_probe", "scales = '", name,
        "': must be none, tensor, head or token");
  return KvScaleKind::kToken;
}

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
      .def(
          "copy", [](const ReadProbeHandle& self) { return self->copy(); },
          nb::call_guard<nb::gil_scoped_release>(),
          "Copies the first half of the buffer over the second, so that as many bytes as the "
          "buffer\n"
          "has are read or written; returns the seconds it took.")
      .def("close", &ReadProbeHandle::close);
  nb::class_<AttentionProbeHandle>(
      m, "AttentionProbe",
      "Decode attention by itself: a bfloat16 token for each request over random caches.\n\n"
      "Args:\n"
      "    device: Where it runs.\n"
      "    lengths: Cached tokens of each request.\n"
      "    num_heads: Query heads.\n"
      "    num_kv_heads: Key/value heads.\n"
      "    head_dim: Of a head.\n"
      "    kv_cache_dtype: auto (bfloat16), fp8_e4m3 or fp8_e5m2.\n"
      "    scales: Of an FP8 cache: tensor, head or token; else none.\n"
      "    tokens_first: Whether a block lies as [block_size, kv_heads, head_dim], not as\n"
      "        [kv_heads, block_size, head_dim].\n"
      "    block_size: Tokens of a block.\n"
      "    copies: Caches that a run goes through, one call each.\n\n"
      "Raises:\n"
      "    InvalidArgumentError: what cannot be.\n"
      "    OutOfMemoryError: less memory is free.")
      .def(
          "__init__",
          [](AttentionProbeHandle* self, const DeviceHandle& device, std::vector<int32_t> lengths,
             int32_t num_heads, int32_t num_kv_heads, int32_t head_dim,
             const std::string& kv_cache_dtype, const std::string& scales, bool tokens_first,
             int32_t block_size, int32_t copies) {
            AttentionProbe::Options options;
            options.shape = {num_heads, num_kv_heads, head_dim};
            options.cache_dtype =
                kv_cache_dtype_from_name(kv_cache_dtype, "attention_probe").value_or(DType::kBF16);
            options.scales = scales_named(scales);
            options.tokens_first = tokens_first;
            options.block_size = block_size;
            options.lengths = std::move(lengths);
            options.copies = copies;
            new (self) AttentionProbeHandle(
                std::make_shared<AttentionProbe>(device.share(), options), "attention probe");
          },
          nb::arg("device"), nb::arg("lengths"), nb::kw_only(), nb::arg("num_heads"),
          nb::arg("num_kv_heads"), nb::arg("head_dim"), nb::arg("kv_cache_dtype") = "auto",
          nb::arg("scales") = "none", nb::arg("tokens_first") = false, nb::arg("block_size") = 16,
          nb::arg("copies") = 1, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro(
          "read_bytes", [](const AttentionProbeHandle& self) { return self->read_bytes(); },
          "Keys, values and scales that a call must read.")
      .def(
          "supports",
          [](const AttentionProbeHandle& self, AttentionBackend backend) {
            return self->supports(backend);
          },
          nb::arg("backend"), nb::call_guard<nb::gil_scoped_release>(),
          "Whether the backend has kernels for it.")
      .def(
          "time_runs",
          [](const AttentionProbeHandle& self, AttentionBackend backend, int32_t repeats) {
            return self->time_runs(backend, repeats);
          },
          nb::arg("backend"), nb::arg("repeats") = 1, nb::call_guard<nb::gil_scoped_release>(),
          "Seconds of a call, of each of `repeats` runs over all caches, after one that warms up;\n"
          "on a GPU by its own clock, each run launched as one graph.")
      .def(
          "output",
          [](const AttentionProbeHandle& self) {
            const std::vector<float> values = self->output();
            return to_numpy(values, {values.size()});
          },
          "Of the last call, float32 [requests * heads * head_dim], a copy.")
      .def("close", &AttentionProbeHandle::close);
  nb::class_<SampleProbeHandle>(
      m, "SampleProbe",
      "Sampling by itself: the sampler of a step over random logits, normal with a standard\n"
      "deviation of 3.\n\n"
      "Args:\n"
      "    device: Where it runs.\n"
      "    batch: Rows.\n"
      "    vocab_size: Logits of a row.\n"
      "    spec: Tokens and sampling parameters of every row; the row's number is added to the\n"
      "        seed.\n"
      "    copies: Of the logits, all different; a run goes through them, one call each.\n\n"
      "Raises:\n"
      "    InvalidArgumentError: what cannot be.\n"
      "    OutOfMemoryError: less memory is free.")
      .def(
          "__init__",
          [](SampleProbeHandle* self, const DeviceHandle& device, int32_t batch, int32_t vocab_size,
             const RowSpec& spec, int32_t copies) {
            new (self) SampleProbeHandle(
                std::make_shared<SampleProbe>(
                    device.share(), SampleProbe::Options{batch, vocab_size, spec, copies}),
                "sample probe");
          },
          nb::arg("device"), nb::arg("batch"), nb::arg("vocab_size"), nb::arg("spec"),
          nb::arg("copies") = 1, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "time_runs",
          [](const SampleProbeHandle& self, int32_t repeats) { return self->time_runs(repeats); },
          nb::arg("repeats") = 1, nb::call_guard<nb::gil_scoped_release>(),
          "Seconds of a call, of each of `repeats` runs over all copies, after one that warms up;\n"
          "on a GPU by its own clock, each run launched as one graph.")
      .def(
          "time_reads",
          [](const SampleProbeHandle& self, int32_t repeats) { return self->time_reads(repeats); },
          nb::arg("repeats") = 1, nb::call_guard<nb::gil_scoped_release>(),
          "The same for a plain read of a copy's logits; on a GPU only.")
      .def(
          "tokens",
          [](const SampleProbeHandle& self) {
            const std::vector<int32_t> values = self->tokens();
            return to_numpy(values, {values.size()});
          },
          "Of the last call, int32 [batch], a copy.")
      .def(
          "logits_address",
          [](const SampleProbeHandle& self, int32_t copy) {
            return reinterpret_cast<uintptr_t>(self->logits(copy));
          },
          nb::arg("copy"),
          "Address on the device of a copy's float32 [batch, vocab_size] logits, valid until "
          "close().")
      .def("close", &SampleProbeHandle::close);
}

}  // namespace mrv1
