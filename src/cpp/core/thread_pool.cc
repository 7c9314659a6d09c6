// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "core/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "core/error.h"

namespace mrv1 {
namespace {

// How long an idle worker looks for the next loop before it parks. Loops of one step follow each
// other within a few microseconds.
constexpr std::chrono::microseconds kSpinTime{40};
constexpr int kPausesPerClockRead = 32;

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The gate word: loop number in the upper half (odd while the loop is open), and in the lower half
// the workers that are inside it.
constexpr uint64_t kLoop = uint64_t{1} << 32;
constexpr bool is_open(uint64_t gate) { return (gate & kLoop) != 0; }
constexpr uint64_t loop_of(uint64_t gate) { return gate >> 32; }
constexpr uint32_t workers_in(uint64_t gate) { return static_cast<uint32_t>(gate); }

}  // namespace

struct ThreadPool::Impl {
  // Workers enter only an open loop, so that the caller waits for those inside it and never for one
  // that is still asleep.
  alignas(64) std::atomic<uint64_t> gate{0};
  alignas(64) std::atomic<int64_t> next{0};
  // Written by the caller while the gate is closed and nobody is inside.
  alignas(64) int64_t count = 0;
  int64_t grain = 1;
  const void* state = nullptr;
  Body body = nullptr;

  alignas(64) std::atomic<int> parked{0};
  std::atomic<bool> stopping{false};
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> threads;

  void work(int thread) {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      body(state, begin, std::min(begin + grain, count), thread);
    }
  }

  bool has_news(uint64_t seen_loop) const {
    const uint64_t now = gate.load(std::memory_order_seq_cst);
    return stopping.load(std::memory_order_seq_cst) || (is_open(now) && loop_of(now) != seen_loop);
  }

  void wait_for_news(uint64_t seen_loop) {
    const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
    do {
      for (int i = 0; i < kPausesPerClockRead; ++i) {
        if (has_news(seen_loop)) return;
        pause_cpu();
      }
    } while (std::chrono::steady_clock::now() < deadline);
    std::unique_lock<std::mutex> lock(mutex);
    parked.fetch_add(1, std::memory_order_seq_cst);
    wake.wait(lock, [&] { return has_news(seen_loop); });
    parked.fetch_sub(1, std::memory_order_seq_cst);
  }

  void worker_main(int thread) {
    uint64_t seen_loop = 0;
    for (;;) {
      wait_for_news(seen_loop);
      if (stopping.load(std::memory_order_seq_cst)) return;
      uint64_t now = gate.load(std::memory_order_relaxed);
      while (is_open(now) && !gate.compare_exchange_weak(now, now + 1, std::memory_order_acquire,
                                                         std::memory_order_relaxed)) {
      }
      if (!is_open(now)) continue;
      seen_loop = loop_of(now);
      work(thread);
      gate.fetch_sub(1, std::memory_order_release);
    }
  }

  void notify() {
    if (parked.load(std::memory_order_seq_cst) == 0) return;
    // Taking the lock orders the wake-up after the check of a worker that is about to park.
    {
      std::lock_guard<std::mutex> lock(mutex);
    }
    wake.notify_all();
  }

  void stop() {
    stopping.store(true, std::memory_order_seq_cst);
    {
      std::lock_guard<std::mutex> lock(mutex);
    }
    wake.notify_all();
    for (std::thread& thread : threads) thread.join();
  }
};

ThreadPool::ThreadPool(int num_threads) : impl_(std::make_unique<Impl>()) {
  check(num_threads >= 1, "thread_pool", "num_threads is ", num_threads, ", must be at least 1");
  impl_->threads.reserve(static_cast<size_t>(num_threads - 1));
  try {
    for (int thread = 1; thread < num_threads; ++thread) {
      impl_->threads.emplace_back([impl = impl_.get(), thread] { impl->worker_main(thread); });
#if defined(__linux__)
      // The kernel takes 15 characters at most.
      const std::string name = concat("mrv1-cpu-", thread).substr(0, 15);
      pthread_setname_np(impl_->threads.back().native_handle(), name.c_str());
#endif
    }
  } catch (const std::system_error& error) {
    impl_->stop();
    fail(ErrorKind::kDevice, "thread_pool", "cannot start ", num_threads,
         " threads: ", error.what());
  }
}

ThreadPool::~ThreadPool() { impl_->stop(); }

int ThreadPool::num_threads() const { return static_cast<int>(impl_->threads.size()) + 1; }

void ThreadPool::run(int64_t count, int64_t grain, const void* state, Body body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  if (impl_->threads.empty() || count <= grain) {
    body(state, 0, count, 0);
    return;
  }
  Impl& impl = *impl_;
  impl.count = count;
  impl.grain = grain;
  impl.state = state;
  impl.body = body;
  impl.next.store(0, std::memory_order_relaxed);
  impl.gate.fetch_add(kLoop, std::memory_order_seq_cst);
  impl.notify();
  impl.work(0);
  uint64_t now = impl.gate.fetch_add(kLoop, std::memory_order_acquire) + kLoop;
  for (int spins = 0; workers_in(now) != 0; ++spins) {
    if (spins < 1 << 10) {
      pause_cpu();
    } else {
      std::this_thread::yield();
    }
    now = impl.gate.load(std::memory_order_acquire);
  }
}

}  // namespace mrv1
