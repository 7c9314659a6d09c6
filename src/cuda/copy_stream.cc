// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "copy_stream.h"

#include <array>

#include "check.h"
#include "current_device.h"

namespace mrv1::cuda {
namespace {

constexpr std::string_view kWhere = "copy stream";

class Event {
 public:
  // With `blocking`, a thread that waits sleeps instead of spinning.
  explicit Event(bool blocking) {
    const unsigned flags = cudaEventDisableTiming | (blocking ? cudaEventBlockingSync : 0u);
    check_cuda(cudaEventCreateWithFlags(&event_, flags), kWhere, "cudaEventCreateWithFlags");
  }
  ~Event() {
    cudaEventDestroy(event_);
    cudaGetLastError();
  }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) {
    check_cuda(cudaEventRecord(event_, stream), kWhere, "cudaEventRecord");
  }
  void wait() { check_cuda(cudaEventSynchronize(event_), kWhere, "cudaEventSynchronize"); }
  bool passed() {
    const cudaError_t status = cudaEventQuery(event_);
    if (status == cudaErrorNotReady) {
      cudaGetLastError();  // it is remembered, and the next launch must not report it
      return false;
    }
    check_cuda(status, kWhere, "cudaEventQuery");
    return true;
  }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class Stream {
 public:
  Stream() {
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), kWhere,
               "cudaStreamCreateWithFlags");
  }
  ~Stream() {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
    cudaGetLastError();
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class CudaCopyStream final : public CopyStream {
 public:
  explicit CudaCopyStream(int ordinal) : ordinal_(ordinal) {
    const CurrentDevice current(ordinal, kWhere);
    queue_ = std::make_unique<Queue>();
  }

  void copy_in(void* device_dst, const void* pinned_src, size_t bytes) override {
    if (bytes == 0) return;
    const CurrentDevice current(ordinal_, kWhere);
    check_cuda(cudaMemcpyAsync(device_dst, pinned_src, bytes, cudaMemcpyHostToDevice,
                               queue_->stream.get()),
               kWhere, "cudaMemcpyAsync");
  }

  // An event that is taken again stands for a later point, which implies the earlier one.
  uint64_t record() override {
    const CurrentDevice current(ordinal_, kWhere);
    event(++ticket_).record(queue_->stream.get());
    return ticket_;
  }

  void wait(uint64_t ticket) override {
    check_internal(ticket <= ticket_, kWhere, "there is no ticket ", ticket);
    if (ticket == 0) return;
    const CurrentDevice current(ordinal_, kWhere);
    event(ticket).wait();
  }

 private:
  static constexpr uint64_t kEvents = 4;
  struct Queue {
    // The stream ends first, and with it the work that the events stand for.
    std::array<Event, kEvents> events{Event(true), Event(true), Event(true), Event(true)};
    Stream stream;
  };

  Event& event(uint64_t ticket) { return queue_->events[ticket % kEvents]; }

  const int ordinal_;
  std::unique_ptr<Queue> queue_;
  uint64_t ticket_ = 0;
};

class EventFence final : public Fence {
 public:
  EventFence(int ordinal, cudaStream_t own) : own_(own), ordinal_(ordinal) {
    const CurrentDevice current(ordinal, kWhere);
    event_ = std::make_unique<Event>(false);
  }

  void record(void* stream) override {
    const CurrentDevice current(ordinal_, kWhere);
    event_->record(stream == nullptr ? own_ : static_cast<cudaStream_t>(stream));
  }
  bool passed() override {
    const CurrentDevice current(ordinal_, kWhere);
    return event_->passed();
  }
  void wait() override {
    const CurrentDevice current(ordinal_, kWhere);
    event_->wait();
  }

 private:
  cudaStream_t own_;
  int ordinal_;
  std::unique_ptr<Event> event_;
};

// Called from inside tasks, where the GPU is current.
class EventMark final : public StreamMark {
 public:
  explicit EventMark(cudaStream_t own) : own_(own) {}

  void record(void* stream) override { event_.record(handle_of(stream)); }
  void wait(void* stream) override {
    check_cuda(cudaStreamWaitEvent(handle_of(stream), event_.get(), 0), kWhere,
               "cudaStreamWaitEvent");
  }

 private:
  cudaStream_t handle_of(void* stream) const {
    return stream == nullptr ? own_ : static_cast<cudaStream_t>(stream);
  }

  cudaStream_t own_;
  Event event_{false};
};

}  // namespace

std::unique_ptr<StreamMark> make_mark(int ordinal, cudaStream_t own) {
  const CurrentDevice current(ordinal, kWhere);
  return std::make_unique<EventMark>(own);
}

std::unique_ptr<CopyStream> make_copy_stream(int ordinal) {
  return std::make_unique<CudaCopyStream>(ordinal);
}

std::unique_ptr<Fence> make_fence(int ordinal, cudaStream_t own) {
  return std::make_unique<EventFence>(ordinal, own);
}

void order_streams(int ordinal, cudaStream_t before, cudaStream_t after) {
  if (before == after) return;
  const CurrentDevice current(ordinal, kWhere);
  Event event(false);  // what is queued on it stays valid when it is destroyed
  event.record(before);
  check_cuda(cudaStreamWaitEvent(after, event.get(), 0), kWhere, "cudaStreamWaitEvent");
}

void check_external_stream(int ordinal, cudaStream_t stream) {
  check(stream != nullptr && stream != cudaStreamLegacy && stream != cudaStreamPerThread, "device",
        "stream = ", reinterpret_cast<uintptr_t>(stream),
        " is a default stream; steps need one that was made, as graphs cannot be captured from it");
  int found = -1;
  const cudaError_t status = cudaStreamGetDevice(stream, &found);
  if (status != cudaSuccess) cudaGetLastError();
  check(status == cudaSuccess, "device", "stream = ", reinterpret_cast<uintptr_t>(stream),
        " is no stream: ", cudaGetErrorString(status));
  check(found == ordinal, "device", "stream = ", reinterpret_cast<uintptr_t>(stream),
        " belongs to GPU ", found, ", not ", ordinal);
}

}  // namespace mrv1::cuda
