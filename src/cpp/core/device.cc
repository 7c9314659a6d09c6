// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "core/device.h"

#include <cstring>
#include <utility>

#include "core/error.h"

namespace mrv1 {
namespace {

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
