// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "core/device.h"

#include <cstdlib>
#include <cstring>
#include <utility>

#include "core/error.h"

namespace mrv1 {
namespace {

constexpr size_t kAlignment = 256;

// On a device without streams of others: a task in the device's own stream counts up.
class SequenceFence final : public Fence {
 public:
  explicit SequenceFence(Device& device) : device_(device) {}
  // The last task must not store into memory that is gone.
  ~SequenceFence() override {
    try {
      wait();
    } catch (const Error&) {
    }
  }

  void record(void* stream) override {
    check(stream == nullptr, "fence", device_.name(), " has no stream but its own");
    ++recorded_;
    device_.submit([](void* arg) { static_cast<std::atomic<uint64_t>*>(arg)->fetch_add(1); },
                   &passed_);
  }
  bool passed() override { return passed_.load() >= recorded_; }
  void wait() override { device_.wait_sequence(passed_, recorded_); }

 private:
  Device& device_;
  uint64_t recorded_ = 0;
  std::atomic<uint64_t> passed_{0};
};

}  // namespace

std::unique_ptr<Fence> Device::make_fence() { return std::make_unique<SequenceFence>(*this); }

void Device::copy_within(void* device_dst, const void* device_src, size_t bytes) {
  std::memcpy(device_dst, device_src, bytes);
}

void Device::copy_in_stream(void* device_dst, const void* src, size_t bytes, void* stream) {
  check(stream == nullptr, "stream", name(), " has no stream but its own");
  std::memcpy(device_dst, src, bytes);
}

void* Device::stream_allocate(size_t bytes, bool zeroed, std::string_view what, void* stream) {
  check(stream == nullptr, "stream", name(), " has no stream but its own");
  void* data = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (data == nullptr) {
    fail(ErrorKind::kOutOfMemory, name(), what, " needs ", bytes, " bytes, which there are not (",
         memory().free_bytes, " are available)");
  }
  if (zeroed) std::memset(data, 0, bytes);
  return data;
}

void Device::stream_release(void* data, void*) noexcept { std::free(data); }

StreamBuffer allocate_in_stream(const std::shared_ptr<Device>& device, size_t bytes, bool zeroed,
                                std::string_view what, void* stream) {
  if (bytes == 0) return {};
  return {device, device->stream_allocate(bytes, zeroed, what, stream), bytes, stream};
}

StreamBuffer& StreamBuffer::operator=(StreamBuffer&& other) noexcept {
  if (this != &other) {
    if (data_ != nullptr) device_->stream_release(data_, stream_);
    device_ = std::move(other.device_);
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
    stream_ = std::exchange(other.stream_, nullptr);
  }
  return *this;
}

StreamBuffer::~StreamBuffer() {
  if (data_ != nullptr) device_->stream_release(data_, stream_);
}

void Device::order_streams(void* before, void* after) {
  check(before == nullptr && after == nullptr, "stream", name(), " has no stream but its own");
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this != &other) {
    if (device_ != nullptr) device_->release(data_, host_, bytes_);
    device_ = std::exchange(other.device_, nullptr);
    data_ = std::exchange(other.data_, nullptr);
    host_ = std::exchange(other.host_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

Buffer::~Buffer() {
  if (device_ != nullptr) device_->release(data_, host_, bytes_);
}

}  // namespace mrv1
