// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <vector>

#include "bind/bind.h"
#include "bind/ops_call.h"
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

// A weight of a call: an array, or what pack_linear made of one.
struct WeightOperand {
  WeightView view;  // an array's has no address before pack()
  Operand plain;    // the array, where there is one: kernels of a GPU read it as it lies
  std::shared_ptr<PackedWeight> packed;  // null for an array
};

// [out, in], or with `is_many` [matrices, out, in].
WeightOperand weight_operand(OpCall& call, const char* name, nb::handle object, bool is_many);
// Brings an array into the layout that the device's linear reads, for the length of the call:
// packed on the CPU, as it lies on a GPU.
void pack(OpCall& call, WeightOperand& weight);

}  // namespace mrv1
