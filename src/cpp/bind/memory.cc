// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "bind/bind.h"
#include "bind/device_array.h"
#include "core/pinned_buffer.h"

namespace mrv1 {
namespace {

struct PinnedHandle : Handle<PinnedBuffer> {
  using Handle::Handle;
};

constexpr const char* kName = "pinned array";

// Holds the memory as a handle does, so that a forked child leaves it alone.
nb::ndarray<nb::numpy, uint8_t> host_view(const PinnedHandle& self) {
  const std::shared_ptr<PinnedBuffer> buffer = self.share();
  auto* view = new PinnedHandle(buffer, kName);
  nb::capsule owner(view,
                    [](void* pointer) noexcept { delete static_cast<PinnedHandle*>(pointer); });
  const size_t bytes = buffer->bytes();
  return nb::ndarray<nb::numpy, uint8_t>(buffer->host(), 1, &bytes, owner);
}

std::unique_ptr<DeviceArray> device_view(const PinnedHandle& self, std::vector<size_t> shape,
                                         const std::string& dtype) {
  const std::shared_ptr<PinnedBuffer> buffer = self.share();
  ArrayMemory memory{buffer->device(),     buffer, buffer->data(), std::move(shape),
                     &element_type(dtype), false};
  const bool empty = std::count(memory.shape.begin(), memory.shape.end(), 0) > 0;
  size_t room = buffer->bytes() / memory.type->bytes();
  for (size_t size : memory.shape) {
    // Divided, as a product may overflow.
    check(empty || size <= room, kName, "the shape does not fit ", buffer->bytes(), " bytes");
    room /= std::max<size_t>(size, 1);
  }
  return std::make_unique<DeviceArray>(std::make_shared<ArrayMemory>(std::move(memory)), kName);
}

}  // namespace

void bind_memory(nb::module_& m) {
  nb::class_<PinnedHandle>(m, "PinnedMemory", "See mrv1.memory.PinnedArray.")
      .def(
          "__init__",
          [](PinnedHandle* self, const DeviceHandle& device, size_t nbytes) {
            new (self) PinnedHandle(std::make_shared<PinnedBuffer>(device.share(), nbytes), kName);
          },
          nb::arg("device"), nb::arg("nbytes"))
      .def_prop_ro("nbytes", [](const PinnedHandle& self) { return self->bytes(); })
      .def("host", &host_view, "The bytes as the host sees them.")
      .def("device", &device_view, nb::arg("shape"), nb::arg("dtype"),
           "The bytes as the device sees them.")
      .def(
          "fence",
          [](const PinnedHandle& self, nb::object stream) { self->fence(stream_handle(stream)); },
          nb::arg("stream") = nb::none(), nb::sig("def fence(self, stream: object = None) -> None"),
          "The memory is in use until the work queued so far in the stream has ended.")
      .def("is_free", [](const PinnedHandle& self) { return self->is_free(); })
      .def(
          "wait", [](const PinnedHandle& self) { self->wait(); },
          nb::call_guard<nb::gil_scoped_release>())
      .def("close", &PinnedHandle::close);
}

}  // namespace mrv1
