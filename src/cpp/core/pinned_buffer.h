// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "core/device.h"

namespace mrv1 {

// Host memory that the device addresses too, and the fences of the device work that uses it. Its
// end waits for them. Any thread may call it.
class PinnedBuffer {
 public:
  PinnedBuffer(std::shared_ptr<Device> device, size_t bytes);
  ~PinnedBuffer();
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;

  void* host() const { return buffer_.host(); }
  void* data() const { return buffer_.data(); }
  size_t bytes() const { return bytes_; }
  const std::shared_ptr<Device>& device() const { return device_; }

  // The memory is in use until the work queued so far in `stream` has ended; null is the device's
  // own stream. Fences of several streams hold together.
  void fence(void* stream);
  // Whether all fences have passed.
  bool is_free();
  // Waits until they have.
  void wait();

 private:
  void drop_passed();

  std::shared_ptr<Device> device_;
  size_t bytes_;
  Buffer buffer_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Fence>> pending_, spare_;
};

}  // namespace mrv1
