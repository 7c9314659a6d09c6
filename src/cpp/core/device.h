// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "core/side_stream.h"
#include "core/thread_pool.h"

namespace mrv1 {

struct Kernels;        // ops/kernels.h
struct LinearOptions;  // ops/linear_options.h
class Device;
namespace cuda {
class LinearContext;  // src/cuda/linear_context.h
}

enum class DeviceType { kCpu, kCuda };

// Owned device memory, zero-filled, aligned to 256 bytes. Freed with the object; the device must
// outlive it.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Device* device, void* data, void* host, size_t bytes)
      : device_(device), data_(data), host_(host), bytes_(bytes) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  // The address kernels use.
  void* data() const { return data_; }
  // The address the host uses; null unless the buffer came from allocate_mapped.
  void* host() const { return host_; }
  size_t bytes() const { return bytes_; }

 private:
  Device* device_ = nullptr;
  void* data_ = nullptr;
  void* host_ = nullptr;
  size_t bytes_ = 0;
};

// Owned memory in the order of one stream: work queued there after it was made may use it, and it
// is given back when the stream has passed the end of the object. Aligned to 256 bytes. Work in
// other streams is the caller's to order. The stream must outlive it.
class StreamBuffer {
 public:
  StreamBuffer() = default;
  StreamBuffer(std::shared_ptr<Device> device, void* data, size_t bytes, void* stream)
      : device_(std::move(device)), data_(data), bytes_(bytes), stream_(stream) {}
  StreamBuffer(StreamBuffer&& other) noexcept { *this = std::move(other); }
  StreamBuffer& operator=(StreamBuffer&& other) noexcept;
  ~StreamBuffer();

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<Device> device_;
  void* data_ = nullptr;
  size_t bytes_ = 0;
  void* stream_ = nullptr;
};

// `zeroed` fills it with zeros in stream order; null is the device's own stream.
StreamBuffer allocate_in_stream(const std::shared_ptr<Device>& device, size_t bytes, bool zeroed,
                                std::string_view what, void* stream);

struct MemoryInfo {
  size_t free_bytes = 0;   // what a new allocation could take
  size_t total_bytes = 0;  // of the device
};

// What was asked of the driver since the device was made.
struct DeviceCounters {
  uint64_t kernel_launches = 0, graph_launches = 0;  // work inside graphs is not counted again
  uint64_t waits = 0;                                // blocking calls, those of copies included
  uint64_t allocations = 0;
  uint64_t copies = 0;
};

// Work that was recorded once and can be run again with one launch.
class Graph {
 public:
  virtual ~Graph() = default;
};

// One compute device with one in-order stream. A runner owns its device object; nothing is global.
class Device {
 public:
  virtual ~Device() = default;

  virtual DeviceType type() const = 0;
  virtual std::string name() const = 0;
  virtual const Kernels& kernels() const = 0;
  virtual MemoryInfo memory() const = 0;

  // Device memory. `what` names the part in the kOutOfMemory error.
  virtual Buffer allocate(size_t bytes, std::string_view what) = 0;
  // Host memory that kernels can address too (pinned and mapped on a GPU).
  virtual Buffer allocate_mapped(size_t bytes, std::string_view what) = 0;

  // Blocking copies between pageable host memory and device memory, ordered after earlier work.
  virtual void copy_in(void* device_dst, const void* host_src, size_t bytes) = 0;
  virtual void copy_out(void* host_dst, const void* device_src, size_t bytes) = 0;

  // Stores a word in device memory, from inside a submitted task, in stream order.
  virtual void set_word(uint64_t* device_word, uint64_t value) = 0;

  // Runs fn(arg) in stream order: on the CPU's stream thread, or at once where fn's launches are
  // asynchronous themselves. `fn` must not throw. Does not allocate.
  virtual void submit(void (*fn)(void* arg), void* arg) = 0;
  // Waits until *sequence >= value, where device work stores the sequence.
  virtual void wait_sequence(const std::atomic<uint64_t>& sequence, uint64_t value) = 0;
  // The same until a point in time at most; false if it was not there by then.
  virtual bool wait_sequence_until(const std::atomic<uint64_t>& sequence, uint64_t value,
                                   std::chrono::steady_clock::time_point until) = 0;
  // Waits for all work submitted before the call, by whichever thread.
  virtual void synchronize() = 0;
  // Records what fn() launches without running it. To be called from inside a submitted task; what
  // fn throws passes through. A device without graphs keeps fn and calls it again.
  virtual std::unique_ptr<Graph> capture(std::function<void()> fn) = 0;
  // Runs a graph of this device in stream order, from inside a submitted task.
  virtual void launch(const Graph& graph) = 0;
  // From inside a task that failed: waits for what it and earlier tasks started asynchronously.
  virtual void settle() noexcept {}

  // CPU only, else null. Used from inside submitted tasks only.
  virtual ThreadPool* pool() { return nullptr; }
  DeviceCounters& counters() { return counters_; }

  // Whether a kernel may start before the one launched before it has ended.
  virtual bool overlaps_launches() const { return false; }
  // The native stream handle (cudaStream_t) or null on the CPU.
  virtual void* stream() { return nullptr; }

  // What the linears of a GPU share, null on the CPU. The first call opens cuBLASLt, with default
  // options unless configure_linear was called: kDevice if it is not there.
  virtual cuda::LinearContext* linear_context() { return nullptr; }
  virtual void configure_linear(const LinearOptions&) {}

  // Number among the devices of its type.
  virtual int ordinal() const { return 0; }
  // For loading weights; null on the CPU, where a copy is a write like any other.
  virtual std::unique_ptr<CopyStream> make_copy_stream() { return nullptr; }
  virtual std::unique_ptr<Fence> make_fence();
  // Copies between places that kernels can address, in stream order and without waiting; from
  // inside a submitted task.
  virtual void copy_within(void* device_dst, const void* device_src, size_t bytes);
  // The same in any stream, from memory that may be the host's: it is read before the call returns.
  virtual void copy_in_stream(void* device_dst, const void* src, size_t bytes, void* stream);
  // Work queued in stream `after` from now on waits for what is in `before` now; null is the
  // device's own stream.
  virtual void order_streams(void* before, void* after);
  // A second stream, whose work goes before that of the first where both have some; made at the
  // first call. Whoever uses it orders the two by marks, and lets the first wait for the second
  // before a step ends. Null where streams are one thread.
  virtual void* side_stream() { return nullptr; }
  virtual std::unique_ptr<StreamMark> make_mark() { return std::make_unique<StreamMark>(); }

 private:
  friend class Buffer;
  friend class StreamBuffer;
  friend StreamBuffer allocate_in_stream(const std::shared_ptr<Device>& device, size_t bytes,
                                         bool zeroed, std::string_view what, void* stream);
  virtual void* stream_allocate(size_t bytes, bool zeroed, std::string_view what, void* stream);
  virtual void stream_release(void* data, void* stream) noexcept;
  virtual void release(void* data, void* host, size_t bytes) noexcept = 0;

  DeviceCounters counters_;
};

// Runs fn() on the device's stream, waits, and throws what it threw: for work outside of steps.
template <typename Fn>
void run_on_stream(Device& device, Fn&& fn) {
  struct Task {
    Fn& fn;
    std::exception_ptr error;
  } task{fn, nullptr};
  device.submit(
      [](void* arg) {
        Task& task = *static_cast<Task*>(arg);
        try {
          task.fn();
        } catch (...) {
          task.error = std::current_exception();
        }
      },
      &task);
  try {
    device.synchronize();
  } catch (...) {
    // What the task threw says more than what came of it.
    if (!task.error) throw;
  }
  if (task.error) std::rethrow_exception(task.error);
}

// `num_threads` <= 0 takes the cores this process may run on.
std::unique_ptr<Device> make_cpu_device(int num_threads);

// Implemented by src/cuda, or by src/cpp/no_cuda in a build without CUDA.
namespace cuda {
bool is_built();
// True if a driver and at least one GPU are there. Never throws.
bool is_available();
// One line on what was found, for error messages and the environment report.
std::string describe();
// Steps run in `stream`, a cudaStream_t that must outlive the device, or in one of the device's own
// if it is null.
std::unique_ptr<Device> make_device(int ordinal, void* stream = nullptr);
}  // namespace cuda

}  // namespace mrv1
