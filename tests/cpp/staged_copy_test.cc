// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "io/staged_copy.h"

#include <doctest/doctest.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "core/error.h"
#include "core/pinned_buffer.h"

namespace mrv1 {
namespace {

// Copies when it is waited for and no sooner, so that a slot that is reused too early shows.
class LateCopies final : public CopyStream {
 public:
  void copy_in(void* device_dst, const void* pinned_src, size_t bytes) override {
    queue_.push_back({device_dst, pinned_src, bytes});
  }
  uint64_t record() override { return done_ + queue_.size(); }
  void wait(uint64_t ticket) override {
    while (done_ < ticket) {
      const Copy& copy = queue_.front();
      std::memcpy(copy.target, copy.source, copy.bytes);
      queue_.erase(queue_.begin());
      ++done_;
    }
  }

 private:
  struct Copy {
    void* target;
    const void* source;
    size_t bytes;
  };
  std::vector<Copy> queue_;
  uint64_t done_ = 0;
};

// The CPU with copy streams.
class StagingDevice final : public Device {
 public:
  DeviceType type() const override { return cpu_->type(); }
  std::string name() const override { return cpu_->name(); }
  const Kernels& kernels() const override { return cpu_->kernels(); }
  MemoryInfo memory() const override { return cpu_->memory(); }
  Buffer allocate(size_t bytes, std::string_view what) override {
    return cpu_->allocate(bytes, what);
  }
  Buffer allocate_mapped(size_t bytes, std::string_view what) override {
    return cpu_->allocate_mapped(bytes, what);
  }
  void copy_in(void* to, const void* from, size_t bytes) override {
    cpu_->copy_in(to, from, bytes);
  }
  void copy_out(void* to, const void* from, size_t bytes) override {
    cpu_->copy_out(to, from, bytes);
  }
  void set_word(uint64_t* word, uint64_t value) override { cpu_->set_word(word, value); }
  void submit(void (*fn)(void*), void* arg) override { cpu_->submit(fn, arg); }
  void wait_sequence(const std::atomic<uint64_t>& sequence, uint64_t value) override {
    cpu_->wait_sequence(sequence, value);
  }
  bool wait_sequence_until(const std::atomic<uint64_t>& sequence, uint64_t value,
                           std::chrono::steady_clock::time_point until) override {
    return cpu_->wait_sequence_until(sequence, value, until);
  }
  void synchronize() override { cpu_->synchronize(); }
  std::unique_ptr<Graph> capture(std::function<void()> fn) override {
    return cpu_->capture(std::move(fn));
  }
  void launch(const Graph& graph) override { cpu_->launch(graph); }
  std::unique_ptr<CopyStream> make_copy_stream() override { return std::make_unique<LateCopies>(); }

 private:
  // Its buffers are the other device's.
  void release(void*, void*, size_t) noexcept override {}
  std::unique_ptr<Device> cpu_ = make_cpu_device(1);
};

// A file of bytes that is gone at the end of the test.
class TemporaryFile {
 public:
  explicit TemporaryFile(size_t bytes) : bytes_(bytes) {
    uint32_t state = 1;
    for (uint8_t& byte : bytes_) {
      state = state * 1664525u + 1013904223u;
      byte = static_cast<uint8_t>(state >> 24);
    }
    const int fd = mkstemp(path_);
    REQUIRE(fd >= 0);
    REQUIRE(write(fd, bytes_.data(), bytes_.size()) == static_cast<ssize_t>(bytes_.size()));
    close(fd);
  }
  ~TemporaryFile() { std::remove(path_); }
  const char* path() const { return path_; }
  const std::vector<uint8_t>& bytes() const { return bytes_; }

 private:
  char path_[32] = "/tmp/mrv1-staged-XXXXXX";
  std::vector<uint8_t> bytes_;
};

struct Loaded {
  StagedTensor tensor;
  std::vector<char> memory;
};

// Tensors of odd sizes and offsets, whole ones and columns of wider ones, in all the conversions
// there are.
std::vector<Loaded> tensors_of(const MappedFile& file) {
  struct Shape {
    int64_t count, cols, stride;
  };
  constexpr Shape kShapes[] = {{1, 0, 0},      {1000, 0, 0},        {30001, 0, 0},
                               {2048, 0, 0},   {0, 0, 0},           {77777, 0, 0},
                               {1110, 37, 91}, {30000, 5000, 7001}, {640, 64, 64}};
  std::vector<Loaded> all;
  size_t offset = 3;
  for (const auto& [count, cols, stride] : kShapes) {
    for (DType source : {DType::kF32, DType::kBF16, DType::kF16}) {
      for (DType stored : {DType::kF32, DType::kBF16}) {
        Loaded loaded{{&file, offset, source, nullptr, stored, count, cols, stride}, {}};
        loaded.memory.assign(static_cast<size_t>(count) * dtype_size(stored), '\xcd');
        loaded.tensor.target = loaded.memory.data();
        const int64_t elements = cols == 0 ? count : count / cols * stride;
        offset += static_cast<size_t>(elements) * dtype_size(source);
        all.push_back(std::move(loaded));
      }
    }
  }
  return all;
}

TEST_CASE("staged tensors arrive whole, converted, and are told of once") {
  const TemporaryFile content(size_t{3} << 20);
  const MappedFile file(content.path());
  StagingDevice device;
  for (const StagingSizes& sizes : {StagingSizes{1, 1, 4096}, StagingSizes{3, 2, 4096},
                                    StagingSizes{2, 5, 65536}, StagingSizes{}}) {
    StagedCopy copy(device, size_t{1} << 20, sizes);
    for (int round = 0; round < 2; ++round) {  // the staging memory serves again
      std::vector<Loaded> all = tensors_of(file);
      std::vector<StagedTensor> tensors;
      size_t expected = 0;
      for (const Loaded& loaded : all) {
        tensors.push_back(loaded.tensor);
        expected += static_cast<size_t>(loaded.tensor.count) * dtype_size(loaded.tensor.source);
      }
      size_t told = 0;
      copy.copy(tensors, [&](size_t bytes) { told += bytes; });
      CHECK(told == expected);
      for (const Loaded& loaded : all) {
        const StagedTensor& tensor = loaded.tensor;
        std::vector<char> source(static_cast<size_t>(tensor.count) * dtype_size(tensor.source));
        const size_t size = dtype_size(tensor.source);
        const auto cols = static_cast<size_t>(tensor.cols == 0 ? tensor.count : tensor.cols);
        for (size_t row = 0; row * cols < static_cast<size_t>(tensor.count); ++row) {
          std::memcpy(source.data() + row * cols * size,
                      content.bytes().data() + tensor.offset +
                          row * static_cast<size_t>(tensor.stride) * size,
                      cols * size);
        }
        std::vector<char> wanted(loaded.memory.size());
        convert_elements(source.data(), tensor.source, wanted.data(), tensor.stored, tensor.count);
        CHECK(loaded.memory == wanted);
      }
    }
  }
}

TEST_CASE("what progress throws, and what a file refuses, ends a staged copy") {
  const TemporaryFile content(size_t{1} << 20);
  const MappedFile file(content.path());
  StagingDevice device;
  std::vector<char> target(size_t{1} << 20);
  StagedCopy copy(device, target.size(), {2, 2, 4096});
  std::vector<StagedTensor> tensors = {
      {&file, 0, DType::kBF16, target.data(), DType::kBF16, int64_t{1} << 19}};
  CHECK_THROWS_AS(copy.copy(tensors, [](size_t) { throw 7; }), int);
  tensors[0].offset = 2;
  try {
    copy.copy(tensors, [](size_t) {});
    FAIL("a tensor that ends past the file was read");
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::kWeights);
    CHECK(std::string(error.what()).find("past the end of the file") != std::string::npos);
  }
  tensors[0].offset = 0;
  copy.copy(tensors, [](size_t) {});
  CHECK(std::memcmp(target.data(), content.bytes().data(), target.size()) == 0);
}

TEST_CASE("halves convert as they are defined") {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const int exponent = static_cast<int>(bits >> 10 & 0x1f);
    const double mantissa = static_cast<double>(bits & 0x3ff) / 1024.0;
    const float value = to_float(Float16{static_cast<uint16_t>(bits)});
    REQUIRE(std::signbit(value) == (bits >= 0x8000));
    if (exponent == 31 && mantissa != 0.0) {
      REQUIRE(std::isnan(value));
      continue;
    }
    const double magnitude = exponent == 31  ? HUGE_VAL
                             : exponent == 0 ? std::ldexp(mantissa, -14)
                                             : std::ldexp(1.0 + mantissa, exponent - 15);
    REQUIRE(std::fabs(static_cast<double>(value)) == magnitude);
  }
}

TEST_CASE("a pinned buffer is in use until the work before its fences has ended") {
  const std::shared_ptr<Device> device = make_cpu_device(1);
  std::atomic<bool> ended{false};
  const auto sleep = [](void* arg) {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    *static_cast<std::atomic<bool>*>(arg) = true;
  };
  {
    PinnedBuffer buffer(device, 100);
    CHECK(buffer.bytes() == 100);
    CHECK(buffer.host() == buffer.data());
    CHECK(buffer.is_free());
    for (int round = 0; round < 3; ++round) {
      ended = false;
      device->submit(sleep, &ended);
      buffer.fence(nullptr);
      buffer.fence(nullptr);
      CHECK((!buffer.is_free() || ended));
      buffer.wait();
      CHECK(ended);
      CHECK(buffer.is_free());
    }
    int elsewhere = 0;
    CHECK_THROWS_AS(buffer.fence(&elsewhere), Error);
    CHECK(buffer.is_free());
    ended = false;
    device->submit(sleep, &ended);
    buffer.fence(nullptr);
  }
  CHECK(ended);  // its end waited
}

}  // namespace
}  // namespace mrv1
