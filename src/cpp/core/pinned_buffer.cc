// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "core/pinned_buffer.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace mrv1 {

PinnedBuffer::PinnedBuffer(std::shared_ptr<Device> device, size_t bytes)
    : device_(std::move(device)),
      bytes_(bytes),
      // An empty array has an address too.
      buffer_(device_->allocate_mapped(std::max<size_t>(bytes, 1), "pinned array")) {}

PinnedBuffer::~PinnedBuffer() {
  try {
    wait();
  } catch (const Error&) {
    // A device that failed cannot be waited for, and runs nothing any more.
  }
}

void PinnedBuffer::drop_passed() {
  for (size_t i = 0; i < pending_.size();) {
    if (pending_[i]->passed()) {
      spare_.push_back(std::move(pending_[i]));
      pending_[i] = std::move(pending_.back());
      pending_.pop_back();
    } else {
      ++i;
    }
  }
}

void PinnedBuffer::fence(void* stream) {
  std::lock_guard lock(mutex_);
  drop_passed();
  if (spare_.empty()) spare_.push_back(device_->make_fence());
  std::unique_ptr<Fence> fence = std::move(spare_.back());
  spare_.pop_back();
  fence->record(stream);
  pending_.push_back(std::move(fence));
}

bool PinnedBuffer::is_free() {
  std::lock_guard lock(mutex_);
  drop_passed();
  return pending_.empty();
}

void PinnedBuffer::wait() {
  std::lock_guard lock(mutex_);
  for (const auto& fence : pending_) fence->wait();
  drop_passed();
}

}  // namespace mrv1
