// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "bind/bind.h"
#include "bind/device_array.h"
#include "bind/runner_handle.h"
#include "io/mapped_file.h"

namespace mrv1 {

// (weight, segment, offset, dtype name, or what of an NVFP4 weight it is)
using TensorTuple = std::tuple<int32_t, int32_t, size_t, std::string>;
using ProgressFunction = nb::typed<nb::callable, nb::object(size_t)>;

// ModelRunner.load_tensors
void load_tensors(const RunnerHandle& self, const MappedFile& file,
                  const std::vector<std::vector<TensorTuple>>& tensors, ProgressFunction progress);

// ModelRunner.device_logits
std::unique_ptr<DeviceArray> device_logits(const RunnerHandle& self, int32_t item);

// ModelRunner.hidden_states and ModelRunner.device_hidden_states
nb::ndarray<nb::numpy, float> hidden_states(const RunnerHandle& self, int32_t item);
std::unique_ptr<DeviceArray> device_hidden_states(const RunnerHandle& self, int32_t item);

}  // namespace mrv1
