// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <future>

#include "core/device.h"

namespace mrv1 {

// Keeps a device's stream from going on until it is let go.
class Hold {
 public:
  explicit Hold(Device& device) {
    device.submit([](void* arg) { static_cast<Hold*>(arg)->let_go_.get_future().wait(); }, this);
  }
  void let_go() { let_go_.set_value(); }

 private:
  std::promise<void> let_go_;
};

}  // namespace mrv1
