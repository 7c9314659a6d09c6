// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "bind/device_array.h"
#include "ops/cpu_isa.h"
#include "ops/linear_options.h"

namespace mrv1 {

DType dtype_from_name(const std::string& name) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kI32}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  fail(ErrorKind::kInvalidArgument, "dtype", "'", name,
       "' is not one of float32, bfloat16, float16");
}

Activation activation_from_name(const std::string& name, const char* op) {
  if (name == "silu") return Activation::kSilu;
  check(name == "gelu_tanh", op, "activation = '", name, "': must be silu or gelu_tanh");
  return Activation::kGeluTanh;
}

RouterScores router_scores_from_name(const std::string& name, const char* op) {
  if (name == "softmax") return RouterScores::kSoftmax;
  check(name == "sigmoid", op, "scores = '", name, "': must be softmax or sigmoid");
  return RouterScores::kSigmoid;
}

namespace {

// Lets a device hold what its stream belongs to.
std::shared_ptr<Device> with_stream_owner(std::unique_ptr<Device> device, nb::object owner) {
  return {device.release(), [owner = std::move(owner)](Device* ended) mutable {
            delete ended;
            if (!nb::is_alive()) {
              owner.release();  // the interpreter is gone, and its objects with it
              return;
            }
            nb::gil_scoped_acquire acquire;
            owner.reset();
          }};
}

std::shared_ptr<Device> open_device(const std::string& kind, int num_threads, int ordinal,
                                    nb::object stream) {
  check(kind == "cpu" || kind == "cuda", "device", "'", kind, "' is not cpu or cuda");
  void* handle = stream_handle(stream);
  if (kind == "cpu") {
    check(handle == nullptr, "device", "stream: the CPU runs steps in a stream of its own");
    return make_cpu_device(num_threads);
  }
  std::unique_ptr<Device> device = cuda::make_device(ordinal, handle);
  if (handle == nullptr) return device;
  return with_stream_owner(std::move(device), std::move(stream));
}

uintptr_t cuda_stream(const DeviceHandle& self) {
  const std::shared_ptr<Device> device = self.share();
  check(device->type() == DeviceType::kCuda, "device", "the CPU has no CUDA stream");
  return reinterpret_cast<uintptr_t>(device->stream());
}

}  // namespace

void bind_device(nb::module_& m) {
  nb::class_<DeviceHandle>(
      m, "Device",
      "A compute device with one in-order stream.\n\n"
      "Args:\n"
      "    kind: \"cpu\" or \"cuda\".\n"
      "    num_threads: CPU threads; 0 takes the cores this process may use.\n"
      "    ordinal: GPU number.\n"
      "    stream: CUDA stream in which everything runs: an object with\n"
      "        __cuda_stream__, which is kept alive, or a handle, which must\n"
      "        outlive the device. None makes a stream.\n\n"
      "Raises:\n"
      "    InvalidArgumentError: the stream is a default stream, which graphs\n"
      "        cannot be captured from, or is of another GPU.\n"
      "    DeviceError: no such device, or a build without CUDA.")
      .def(
          "__init__",
          [](DeviceHandle* self, const std::string& kind, int num_threads, int ordinal,
             nb::object stream) {
            new (self)
                DeviceHandle(open_device(kind, num_threads, ordinal, std::move(stream)), "device");
          },
          nb::arg("kind"), nb::arg("num_threads") = 0, nb::arg("ordinal") = 0,
          nb::arg("stream") = nb::none(),
          nb::sig("def __init__(self, kind: str, num_threads: int = 0, ordinal: int = 0, "
                  "stream: object = None) -> None"))
      .def_prop_ro("name", [](const DeviceHandle& self) { return self->name(); })
      .def_prop_ro("kind",
                   [](const DeviceHandle& self) {
                     return self->type() == DeviceType::kCpu ? "cpu" : "cuda";
                   })
      .def_prop_ro("num_threads",
                   [](const DeviceHandle& self) {
                     return self->pool() != nullptr ? self->pool()->num_threads() : 0;
                   })
      .def_prop_ro("ordinal", [](const DeviceHandle& self) { return self->ordinal(); })
      .def_prop_ro("stream", &cuda_stream, "Handle of the CUDA stream in which everything runs.")
      .def(
          "__cuda_stream__",
          [](const DeviceHandle& self) { return nb::make_tuple(0, cuda_stream(self)); },
          nb::sig("def __cuda_stream__(self) -> tuple[int, int]"))
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
      .def(
          "configure_linear",
          [](const DeviceHandle& self, const std::vector<std::string>& libraries,
             const std::vector<std::string>& table_dirs, bool use_library, bool tune) {
            self->configure_linear({.libraries = libraries,
                                    .use_library = use_library,
                                    .table_dirs = table_dirs,
                                    .tune = tune});
          },
          nb::kw_only(), nb::arg("libraries"), nb::arg("table_dirs"), nb::arg("use_library") = true,
          nb::arg("tune") = false, nb::call_guard<nb::gil_scoped_release>(),
          "Opens cuBLASLt and reads the tuning tables that linears are computed by, before the\n"
          "first step; without the call, the first linear opens what the loader finds. Does\n"
          "nothing on the CPU. mrv1.tuning has the arguments.\n\n"
          "Raises:\n"
          "    InvalidArgumentError: a table is damaged.\n"
          "    DeviceError: the library was not found; the message has every name tried.")
      .def("close", &DeviceHandle::close);
  m.def("cuda_built", &cuda::is_built, "True if this build has a CUDA backend.");
  m.def("cuda_available", &cuda::is_available, "True if a driver and a GPU are there too.");
  m.def("cublaslt_describe", &cuda::describe_cublaslt, nb::arg("libraries"),
        "Opens cuBLASLt, if it is not open yet; its version and the name it was found by.\n\n"
        "Raises:\n"
        "    DeviceError: it was not found, or a build without CUDA.");
  m.def("cuda_describe", &cuda::describe, "One line on what was found of CUDA.");
  m.def(
      "cpu_isa", [] { return std::string(cpu_isa_name(current_cpu_isa())); },
      "The instruction set the CPU kernels use here.");
}

}  // namespace mrv1
