// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/string.h>

#include <memory>
#include <string>

#include "bind/bind.h"
#include "ops/cpu_isa.h"

namespace mrv1 {

DType dtype_from_name(const std::string& name) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kI32}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  fail(ErrorKind::kInvalidArgument, "dtype", "'", name,
       "' is not one of float32, bfloat16, float16");
}

void bind_device(nb::module_& m) {
  nb::class_<DeviceHandle>(m, "Device",
                           "A compute device with one in-order stream.\n\n"
                           "Args:\n"
                           "    kind: \"cpu\" or \"cuda\".\n"
                           "    num_threads: CPU threads; 0 takes the cores this process may use.\n"
                           "    ordinal: GPU number.\n\n"
                           "Raises:\n"
                           "    DeviceError: no such device, or a build without CUDA.")
      .def(
          "__init__",
          [](DeviceHandle* self, const std::string& kind, int num_threads, int ordinal) {
            check(kind == "cpu" || kind == "cuda", "device", "'", kind, "' is not cpu or cuda");
            std::shared_ptr<Device> device =
                kind == "cpu" ? make_cpu_device(num_threads) : cuda::make_device(ordinal);
            new (self) DeviceHandle(std::move(device), "device");
          },
          nb::arg("kind"), nb::arg("num_threads") = 0, nb::arg("ordinal") = 0)
      .def_prop_ro("name", [](const DeviceHandle& self) { return self->name(); })
      .def_prop_ro("kind",
                   [](const DeviceHandle& self) {
                     return self->type() == DeviceType::kCpu ? "cpu" : "cuda";
                   })
      .def_prop_ro("num_threads",
                   [](const DeviceHandle& self) {
                     return self->pool() != nullptr ? self->pool()->num_threads() : 0;
                   })
      .def(
          "memory",
          [](const DeviceHandle& self) {
            const MemoryInfo info = self->memory();
            return nb::make_tuple(info.free_bytes, info.total_bytes);
          },
          nb::sig("def memory(self) -> tuple[int, int]"), "Free and total bytes.")
      .def(
          "synchronize", [](const DeviceHandle& self) { self->synchronize(); },
          nb::call_guard<nb::gil_scoped_release>())
      .def("close", &DeviceHandle::close);
  m.def("cuda_built", &cuda::is_built, "True if this build has a CUDA backend.");
  m.def("cuda_available", &cuda::is_available, "True if a driver and a GPU are there too.");
  m.def("cuda_describe", &cuda::describe, "One line on what was found of CUDA.");
  m.def(
      "cpu_isa", [] { return std::string(cpu_isa_name(current_cpu_isa())); },
      "The instruction set the CPU kernels use here.");
}

}  // namespace mrv1
