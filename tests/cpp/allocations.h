// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// The allocations of the test program: counted, and failing where a test asks for it.
#pragma once

#include <cstdint>

namespace mrv1 {

// Allocations so far, by any thread.
int64_t count_allocations();

// While it is armed, threads of this name get std::bad_alloc: `skip` allocations are left to them,
// then `failures` fail. One at a time.
class FailingAllocations {
 public:
  FailingAllocations(const char* thread_name, int64_t skip, int64_t failures);
  ~FailingAllocations() { disarm(); }
  FailingAllocations(const FailingAllocations&) = delete;
  FailingAllocations& operator=(const FailingAllocations&) = delete;

  void arm();
  void disarm();
  // How many have failed.
  int64_t failed() const;

 private:
  const char* thread_name_;
};

}  // namespace mrv1
