// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <vector>

#include "bind/bind.h"
#include "core/device.h"
#include "ops/weight_view.h"

namespace mrv1 {

// A weight in the layout of a device's linear: memory of its own, or on a GPU the caller's array.
struct PackedWeight {
  std::shared_ptr<Device> device;
  WeightView view;
  std::vector<StreamBuffer> buffers;
  nb::object array;
};

struct PackedWeightHandle : Handle<PackedWeight> {
  using Handle::Handle;
};

}  // namespace mrv1
