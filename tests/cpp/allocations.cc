// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "allocations.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

std::atomic<int64_t> allocations{0};

std::atomic<const char*> failing_thread{nullptr};
std::atomic<int64_t> first_failure, end_of_failures, of_thread;

bool fails() {
  const char* wanted = failing_thread.load(std::memory_order_acquire);
  if (wanted == nullptr) [[likely]] {
    return false;
  }
  char name[16];  // what the system keeps of a name
  if (pthread_getname_np(pthread_self(), name, sizeof(name)) != 0) return false;
  if (std::strcmp(name, wanted) != 0) return false;
  const int64_t number = of_thread.fetch_add(1);
  return number >= first_failure && number < end_of_failures;
}

}  // namespace

[[gnu::noinline]] void* operator new(size_t bytes) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (fails()) throw std::bad_alloc();
  if (void* data = std::malloc(bytes > 0 ? bytes : 1)) return data;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* data) noexcept { std::free(data); }
[[gnu::noinline]] void operator delete(void* data, size_t) noexcept { std::free(data); }

namespace mrv1 {

int64_t count_allocations() { return allocations.load(std::memory_order_relaxed); }

FailingAllocations::FailingAllocations(const char* thread_name, int64_t skip, int64_t failures)
    : thread_name_(thread_name) {
  of_thread = 0;
  first_failure = skip;
  end_of_failures = skip + failures;
}

void FailingAllocations::arm() { failing_thread.store(thread_name_, std::memory_order_release); }

void FailingAllocations::disarm() { failing_thread = nullptr; }

int64_t FailingAllocations::failed() const {
  return std::clamp<int64_t>(of_thread - first_failure, 0, end_of_failures - first_failure);
}

}  // namespace mrv1
