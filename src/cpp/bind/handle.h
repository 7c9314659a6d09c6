// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <unistd.h>

#include <memory>
#include <mutex>

#include "core/error.h"

namespace mrv1 {

// What Python holds of a native object: it knows when it was closed, and that after a fork its
// threads and device handles belong to the parent.
template <typename T>
class Handle {
 public:
  Handle(std::shared_ptr<T> object, const char* name)
      : object_(std::move(object)), name_(name), owner_(getpid()) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  ~Handle() {
    // In a child the parent's threads do not exist: joining them would hang, so nothing is torn
    // down.
    if (getpid() != owner_) new std::shared_ptr<T>(std::move(object_));
  }

  // A reference of the caller's own: a close() in another thread does not end what is being used.
  std::shared_ptr<T> operator->() const { return share(); }

  std::shared_ptr<T> share() const {
    if (getpid() != owner_) {
      fail(ErrorKind::kFork, name_, "was made in process ", owner_,
           " and cannot be used in its forked child; make a new one here");
    }
    std::lock_guard lock(mutex_);
    if (object_ == nullptr) fail(ErrorKind::kClosed, name_, "is closed");
    return object_;
  }

  void close() {
    if (getpid() != owner_) return;
    std::shared_ptr<T> last;
    std::lock_guard lock(mutex_);
    last.swap(object_);
  }

 private:
  std::shared_ptr<T> object_;
  const char* name_;
  pid_t owner_;
  mutable std::mutex mutex_;
};

}  // namespace mrv1
