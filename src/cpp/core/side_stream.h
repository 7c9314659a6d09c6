// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace mrv1 {

// Copies from pinned host memory into device memory, beside the device's own stream. Used by one
// thread at a time, which may be any. The device must outlive it.
class CopyStream {
 public:
  virtual ~CopyStream() = default;
  // Queues a copy; the source must not change until a record() made after it has been waited for.
  virtual void copy_in(void* device_dst, const void* pinned_src, size_t bytes) = 0;
  // A ticket for all copies queued so far. Waiting for a ticket may also wait for later ones.
  virtual uint64_t record() = 0;
  virtual void wait(uint64_t ticket) = 0;
};

// A point in a stream of the device that the host can wait for. Used by one thread at a time; the
// device must outlive it. Before the first record() it counts as passed.
class Fence {
 public:
  virtual ~Fence() = default;
  // Marks the work queued so far in `stream`; null is the device's own stream.
  virtual void record(void* stream) = 0;
  virtual bool passed() = 0;
  virtual void wait() = 0;
};

// A point in a stream of the device that other streams of it wait for, in steps and in what is
// captured of them. Used from inside submitted tasks; the device must outlive it. Where streams are
// one thread, order is there already.
class StreamMark {
 public:
  virtual ~StreamMark() = default;
  // Marks the work queued so far in `stream`; null is the device's own stream.
  virtual void record(void*) {}
  // Work queued in `stream` from now on waits for the last mark.
  virtual void wait(void*) {}
};

}  // namespace mrv1
