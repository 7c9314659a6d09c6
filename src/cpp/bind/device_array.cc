// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "bind/device_array.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include <optional>
#include <utility>

#include "core/error.h"

namespace mrv1 {
namespace {

// DLPack's codes of element types and devices.
enum Code : uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kBFloat = 4,
  kComplex = 5,
  kBool = 6,
  kFloat8E3M4 = 7,
  kFloat8E4M3 = 8,
  kFloat8E4M3B11FNUZ = 9,
  kFloat8E4M3FN = 10,
  kFloat8E4M3FNUZ = 11,
  kFloat8E5M2 = 12,
  kFloat8E5M2FNUZ = 13,
  kFloat8E8M0FNU = 14,
};
enum DlDevice { kDlCpu = 1, kDlCuda = 2, kDlCudaHost = 3, kDlCudaManaged = 13 };

constexpr ElementType kTypes[] = {
    {"bool", kBool, 8, "|b1"},
    {"int8", kInt, 8, "|i1"},
    {"int16", kInt, 16, "<i2"},
    {"int32", kInt, 32, "<i4"},
    {"int64", kInt, 64, "<i8"},
    {"uint8", kUInt, 8, "|u1"},
    {"uint16", kUInt, 16, "<u2"},
    {"uint32", kUInt, 32, "<u4"},
    {"uint64", kUInt, 64, "<u8"},
    {"float16", kFloat, 16, "<f2"},
    {"float32", kFloat, 32, "<f4"},
    {"float64", kFloat, 64, "<f8"},
    {"complex64", kComplex, 64, "<c8"},
    {"complex128", kComplex, 128, "<c16"},
    {"bfloat16", kBFloat, 16, nullptr},
    {"float8_e3m4", kFloat8E3M4, 8, nullptr},
    {"float8_e4m3", kFloat8E4M3, 8, nullptr},
    {"float8_e4m3b11fnuz", kFloat8E4M3B11FNUZ, 8, nullptr},
    {"float8_e4m3fn", kFloat8E4M3FN, 8, nullptr},
    {"float8_e4m3fnuz", kFloat8E4M3FNUZ, 8, nullptr},
    {"float8_e5m2", kFloat8E5M2, 8, nullptr},
    {"float8_e5m2fnuz", kFloat8E5M2FNUZ, 8, nullptr},
    {"float8_e8m0fnu", kFloat8E8M0FNU, 8, nullptr},
};

// CUDA's own number for the legacy default stream, for which interfaces may write 0 too.
constexpr uintptr_t kLegacyStream = 1;

void* pointer_of(uintptr_t handle) {
  return reinterpret_cast<void*>(handle == 0 ? kLegacyStream : handle);
}

// Lets the stream of a DLPack consumer see what the device's stream has written.
void order_consumer(ArrayMemory& memory, std::optional<intptr_t> stream) {
  Device& device = *memory.device;
  if (device.type() == DeviceType::kCpu) {
    check(!stream, "dlpack", "stream = ", stream.value_or(0), ": memory of the CPU has no streams");
    if (memory.written_in_stream) device.synchronize();
    return;
  }
  constexpr intptr_t kNoOrder = -1;
  if (stream == kNoOrder) return;
  check(stream.value_or(kLegacyStream) > 0, "dlpack", "stream = ", stream.value_or(0),
        ": must be None, -1, 1, 2 or the handle of a stream");
  if (!memory.written_in_stream) return;
  device.order_streams(memory.writer, pointer_of(stream.value_or(kLegacyStream)));
}

nb::object to_dlpack(nb::pointer_and_handle<DeviceArray> self, std::optional<intptr_t> stream,
                     nb::object max_version, nb::object dl_device, nb::object copy) {
  const std::shared_ptr<ArrayMemory> memory = self.p->share();
  order_consumer(*memory, stream);
  nb::ndarray<nb::array_api> array(memory->data, memory->shape.size(), memory->shape.data(), self.h,
                                   nullptr, memory->type->dlpack(),
                                   dlpack_device_type(*memory->device), memory->device->ordinal());
  nb::object exporter = nb::cast(array);
  return exporter.attr("__dlpack__")(nb::arg("max_version") = max_version,
                                     nb::arg("dl_device") = dl_device, nb::arg("copy") = copy);
}

nb::dict cuda_array_interface(const DeviceArray& self) {
  const std::shared_ptr<ArrayMemory> memory = self.share();
  if (memory->device->type() == DeviceType::kCpu) {
    throw nb::attribute_error("__cuda_array_interface__: the memory is the CPU's");
  }
  if (memory->type->typestr == nullptr) {
    throw nb::attribute_error(
        concat("__cuda_array_interface__ has no type for ", memory->type->name).c_str());
  }
  nb::list shape;
  for (size_t size : memory->shape) shape.append(size);
  nb::dict dict;
  dict["shape"] = nb::tuple(shape);
  dict["typestr"] = memory->type->typestr;
  dict["data"] = nb::make_tuple(reinterpret_cast<uintptr_t>(memory->data), false);
  dict["version"] = 3;
  dict["strides"] = nb::none();
  dict["stream"] = memory->written_in_stream
                       ? nb::cast(reinterpret_cast<uintptr_t>(
                             memory->writer != nullptr ? memory->writer : memory->device->stream()))
                       : nb::none();
  return dict;
}

}  // namespace

const ElementType& element_type(const std::string& name) {
  for (const ElementType& type : kTypes) {
    if (name == type.name) return type;
  }
  std::string names;
  for (const ElementType& type : kTypes) {
    names += (names.empty() ? "" : ", ") + std::string(type.name);
  }
  fail(ErrorKind::kInvalidArgument, "dtype", "'", name, "' is not one of ", names);
}

const ElementType* find_element_type(nb::dlpack::dtype dtype) {
  for (const ElementType& type : kTypes) {
    if (type.dlpack() == dtype) return &type;
  }
  return nullptr;
}

const ElementType& element_type(DType dtype) {
  for (const ElementType& type : kTypes) {
    if (dtype_name(dtype) == type.name) return type;
  }
  fail(ErrorKind::kInternal, "dtype", dtype_name(dtype), " has no name among arrays");
}

int dlpack_device_type(Device& device) {
  return device.type() == DeviceType::kCpu ? kDlCpu : kDlCuda;
}

size_t ArrayMemory::nbytes() const {
  size_t bytes = type->bytes();
  for (size_t size : shape) bytes *= size;
  return bytes;
}

std::unique_ptr<DeviceArray> copy_to_array(std::shared_ptr<Device> device, const void* data,
                                           std::vector<size_t> shape, DType dtype) {
  ArrayMemory memory{device, nullptr, nullptr, std::move(shape), &element_type(dtype), true};
  auto buffer =
      std::make_shared<Buffer>(device->allocate(std::max<size_t>(memory.nbytes(), 1), "array"));
  memory.data = buffer->data();
  memory.owner = buffer;
  run_on_stream(*device, [&] { device->copy_within(memory.data, data, memory.nbytes()); });
  return std::make_unique<DeviceArray>(std::make_shared<ArrayMemory>(std::move(memory)), "array");
}

nb::ndarray<nb::ro> import_array(nb::handle array, Device& device, const char* where) {
  check(nb::hasattr(array, "__dlpack__") && nb::hasattr(array, "__dlpack_device__"), where,
        "needs an array with __dlpack__ on the device ", device.name(),
        ", or a float32 array of the CPU");
  const auto [type, id] = nb::cast<std::pair<int, int>>(array.attr("__dlpack_device__")());
  nb::object capsule;
  if (device.type() == DeviceType::kCpu) {
    check(type == kDlCpu, where, "the array lies on DLPack device ", type, ", not on the CPU");
    capsule = array.attr("__dlpack__")();
  } else {
    check((type == kDlCuda && id == device.ordinal()) || type == kDlCudaHost ||
              type == kDlCudaManaged,
          where, "the array lies on DLPack device (", type, ", ", id, "), not on GPU ",
          device.ordinal(), ", (2, ", device.ordinal(), ")");
    capsule =
        array.attr("__dlpack__")(nb::arg("stream") = reinterpret_cast<intptr_t>(device.stream()));
  }
  const auto imported = nb::cast<nb::ndarray<nb::ro>>(capsule, false);
  int64_t stride = 1;
  for (size_t i = imported.ndim(); i-- > 0;) {
    check(imported.shape(i) <= 1 || imported.stride(i) == stride, where,
          "the array must be contiguous in C order");
    stride *= static_cast<int64_t>(imported.shape(i));
  }
  return imported;
}

void* stream_handle(nb::handle stream) {
  if (stream.is_none()) return nullptr;
  uintptr_t handle = 0;
  if (nb::try_cast(stream, handle, false)) return pointer_of(handle);
  if (!nb::hasattr(stream, "__cuda_stream__")) {
    for (const char* name : {"cuda_stream", "ptr"}) {
      nb::object number = nb::getattr(stream, name, nb::none());
      if (nb::try_cast(number, handle, false)) return pointer_of(handle);
    }
  }
  check(nb::hasattr(stream, "__cuda_stream__"), "stream",
        "must be None, the handle of a stream as an integer, or an object with __cuda_stream__");
  // A method by the protocol; older objects have a tuple there.
  nb::object pair = stream.attr("__cuda_stream__");
  if (PyCallable_Check(pair.ptr())) pair = pair();
  std::pair<int64_t, uintptr_t> version_and_handle;
  check(nb::try_cast(pair, version_and_handle), "stream",
        "__cuda_stream__ must give (version, handle)");
  check(version_and_handle.first == 0, "stream", "__cuda_stream__ has version ",
        version_and_handle.first, "; 0 is known");
  return pointer_of(version_and_handle.second);
}

void bind_device_array(nb::module_& m) {
  nb::class_<DeviceArray>(
      m, "DeviceArray",
      "Memory that a device addresses, for libraries that take DLPack or the "
      "CUDA array interface.\n\n"
      "What they make of it keeps the memory alive, whoever else lets go of it.")
      .def("__dlpack__", &to_dlpack, nb::kw_only(), nb::arg("stream") = nb::none(),
           nb::arg("max_version") = nb::none(), nb::arg("dl_device") = nb::none(),
           nb::arg("copy") = nb::none(),
           nb::sig("def __dlpack__(self, *, stream: int | None = None, "
                   "max_version: tuple[int, int] | None = None, "
                   "dl_device: tuple[int, int] | None = None, copy: bool | None = None) -> object"))
      .def("__dlpack_device__",
           [](const DeviceArray& self) {
             const std::shared_ptr<ArrayMemory> memory = self.share();
             return std::make_pair(dlpack_device_type(*memory->device), memory->device->ordinal());
           })
      .def_prop_ro("__cuda_array_interface__", &cuda_array_interface,
                   nb::sig("def __cuda_array_interface__(self) -> dict[str, object]"))
      .def_prop_ro(
          "shape",
          [](const DeviceArray& self) {
            nb::list shape;
            for (size_t size : self->shape) shape.append(size);
            return nb::tuple(shape);
          },
          nb::sig("def shape(self) -> tuple[int, ...]"))
      .def_prop_ro(
          "dtype", [](const DeviceArray& self) { return std::string(self->type->name); },
          "Name of the dtype, as NumPy or ml_dtypes gives it.")
      .def_prop_ro("nbytes", [](const DeviceArray& self) { return self->nbytes(); })
      .def_prop_ro(
          "ptr", [](const DeviceArray& self) { return reinterpret_cast<uintptr_t>(self->data); },
          "The address that kernels use.");
}

}  // namespace mrv1
