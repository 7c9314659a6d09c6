// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>

namespace mrv1 {

// Fixed worker threads for the CPU kernels. The calling thread works too, so a pool of one thread
// starts none. Calls come from one thread at a time (the CPU stream). Workers spin briefly between
// loops of a step and park after that, so that an idle runner uses no CPU. Nothing is allocated
// by parallel_for.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const;

  // Runs fn(begin, end, thread) over a partition of [0, count) into pieces of about `grain` items
  // that threads take as they become free; returns when all are done. `thread` is in
  // [0, num_threads). `fn` must not throw. Results must not depend on the partition.
  template <typename Fn>
  void parallel_for(int64_t count, int64_t grain, const Fn& fn) {
    run(count, grain, &fn, [](const void* state, int64_t begin, int64_t end, int thread) {
      (*static_cast<const Fn*>(state))(begin, end, thread);
    });
  }

 private:
  using Body = void (*)(const void* state, int64_t begin, int64_t end, int thread);
  void run(int64_t count, int64_t grain, const void* state, Body body);

  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace mrv1
