// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <vector>

#include "bind/handle.h"
#include "core/device.h"
#include "core/dtype.h"
#include "program/program.h"

namespace mrv1 {

namespace nb = nanobind;

using ByteArray = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;
using FloatArray = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using IntArray = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;

struct DeviceHandle : Handle<Device> {
  using Handle::Handle;
};

// A numpy array that owns a copy of the values.
template <typename T>
nb::ndarray<nb::numpy, T> to_numpy(const std::vector<T>& values, std::vector<size_t> shape) {
  T* data = new T[values.size() + 1];
  std::copy(values.begin(), values.end(), data);
  nb::capsule owner(data, [](void* pointer) noexcept { delete[] static_cast<T*>(pointer); });
  return nb::ndarray<nb::numpy, T>(data, shape.size(), shape.data(), owner);
}

DType dtype_from_name(const std::string& name);
// "silu" or "gelu_tanh"; "softmax" or "sigmoid". kInvalidArgument naming `op`.
Activation activation_from_name(const std::string& name, const char* op);
RouterScores router_scores_from_name(const std::string& name, const char* op);

void bind_device(nb::module_& m);
void bind_device_array(nb::module_& m);
void bind_memory(nb::module_& m);
void bind_program(nb::module_& m);
void bind_session(nb::module_& m);
void bind_sampling(nb::module_& m);
void bind_runner(nb::module_& m);
void bind_engine(nb::module_& m);
void bind_bench(nb::module_& m);
void bind_cache_write_probe(nb::module_& m);
void bind_collectives(nb::module_& m);
void bind_expert_probe(nb::module_& m);
void bind_stage_probe(nb::module_& m);
void bind_ops(nb::module_& m);
void bind_fp4_weights(nb::module_& m);

}  // namespace mrv1
