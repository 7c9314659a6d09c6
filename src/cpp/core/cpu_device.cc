// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#include "core/device.h"
#include "core/error.h"
#include "core/host_memory.h"
#include "ops/kernels.h"

namespace mrv1 {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kQueueLength = 64;

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    return std::max(1, CPU_COUNT(&set));
  }
  return std::max(1u, std::thread::hardware_concurrency());
}

// The CPU has no graphs: it keeps the function and calls it again.
struct RecordedWork final : Graph {
  explicit RecordedWork(std::function<void()> work) : run(std::move(work)) {}
  std::function<void()> run;
};

// The CPU as a device with one in-order stream: a thread that runs submitted tasks in turn, with a
// pool of workers for the loops inside them. Memory is mapped on demand, so pages that are never
// written (an unused part of the KV cache) cost nothing.
class CpuDevice final : public Device {
 public:
  explicit CpuDevice(int num_threads) : pool_(num_threads > 0 ? num_threads : usable_cores()) {
    try {
      stream_thread_ = std::thread([this] { run_stream(); });
    } catch (const std::system_error& error) {
      fail(ErrorKind::kDevice, "cpu", "cannot start the stream's thread: ", error.what());
    }
  }

  ~CpuDevice() override {
    {
      std::lock_guard lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    stream_thread_.join();
  }

  DeviceType type() const override { return DeviceType::kCpu; }
  std::string name() const override { return "cpu"; }
  const Kernels& kernels() const override { return cpu_kernels(); }
  ThreadPool* pool() override { return &pool_; }

  MemoryInfo memory() const override { return read_host_memory("/"); }

  Buffer allocate(size_t bytes, std::string_view what) override {
    return map(bytes, what, /*host_visible=*/false);
  }

  Buffer allocate_mapped(size_t bytes, std::string_view what) override {
    return map(bytes, what, /*host_visible=*/true);
  }

  void copy_in(void* device_dst, const void* host_src, size_t bytes) override {
    synchronize();
    std::memcpy(device_dst, host_src, bytes);
  }

  void copy_out(void* host_dst, const void* device_src, size_t bytes) override {
    synchronize();
    std::memcpy(host_dst, device_src, bytes);
  }

  void set_word(uint64_t* device_word, uint64_t value) override { *device_word = value; }

  void submit(void (*fn)(void*), void* arg) override {
    std::unique_lock lock(mutex_);
    drained_.wait(lock, [this] { return tail_ - head_ < kQueueLength; });
    queue_[tail_++ % kQueueLength] = {fn, arg};
    lock.unlock();
    wake_.notify_one();
  }

  void wait_sequence(const std::atomic<uint64_t>& sequence, uint64_t value) override {
    if (sequence.load(std::memory_order_acquire) >= value) return;
    std::unique_lock lock(mutex_);
    drained_.wait(
        lock, [&] { return sequence.load(std::memory_order_acquire) >= value || head_ == tail_; });
    check_internal(sequence.load(std::memory_order_acquire) >= value, "cpu",
                   "the stream is idle but sequence ", value, " was never written");
  }

  bool wait_sequence_until(const std::atomic<uint64_t>& sequence, uint64_t value,
                           std::chrono::steady_clock::time_point until) override {
    std::unique_lock lock(mutex_);
    return drained_.wait_until(lock, until,
                               [&] { return sequence.load(std::memory_order_acquire) >= value; });
  }

  std::unique_ptr<Graph> capture(std::function<void()> fn) override {
    return std::make_unique<RecordedWork>(std::move(fn));
  }

  void launch(const Graph& graph) override {
    ++counters().graph_launches;
    static_cast<const RecordedWork&>(graph).run();
  }

  void synchronize() override {
    std::unique_lock lock(mutex_);
    // Not for an empty queue, which others may keep filled.
    drained_.wait(lock, [this, last = tail_] { return head_ >= last; });
  }

 private:
  struct Task {
    void (*fn)(void*);
    void* arg;
  };

  Buffer map(size_t bytes, std::string_view what, bool host_visible) {
    const size_t length =
        round_up(std::max<size_t>(bytes, 1), bytes >= kHugePage ? kHugePage : 4096);
    void* data = mmap(nullptr, length, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) {
      fail(ErrorKind::kOutOfMemory, "cpu", what, " needs ", bytes,
           " bytes, which cannot be mapped (", memory().free_bytes, " bytes are available)");
    }
    // Large pages halve the page walks of a weight stream. Advice only: failure is harmless.
    if (length >= 2 * kHugePage) madvise(data, length, MADV_HUGEPAGE);
    return Buffer(this, data, host_visible ? data : nullptr, length);
  }

  void run_stream() {
    pthread_setname_np(pthread_self(), "mrv1-stream");
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return closing_ || head_ != tail_; });
      if (head_ == tail_) return;
      const Task task = queue_[head_ % kQueueLength];
      lock.unlock();
      task.fn(task.arg);
      lock.lock();
      ++head_;
      drained_.notify_all();
    }
  }

  void release(void* data, void*, size_t bytes) noexcept override { munmap(data, bytes); }

  ThreadPool pool_;
  std::mutex mutex_;
  std::condition_variable wake_, drained_;
  std::array<Task, kQueueLength> queue_{};
  uint64_t head_ = 0, tail_ = 0;
  bool closing_ = false;
  std::thread stream_thread_;
};

}  // namespace

std::unique_ptr<Device> make_cpu_device(int num_threads) {
  return std::make_unique<CpuDevice>(num_threads);
}

}  // namespace mrv1
