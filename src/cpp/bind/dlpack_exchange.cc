// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "bind/dlpack_exchange.h"

#include <utility>
#include <vector>

namespace mrv1 {
namespace {

// What a library holds of an array of ours.
struct Exported {
  DlpackManaged managed;
  std::shared_ptr<ArrayMemory> memory;
  std::vector<int64_t> shape, strides;
};

void delete_exported(DlpackManaged* managed) {
  // Without an interpreter there is nothing to give a stream's owner back to.
  if (!nb::is_alive()) return;
  // A library may let go in any thread.
  nb::gil_scoped_acquire acquire;
  delete static_cast<Exported*>(managed->context);
}

}  // namespace

const DlpackExchange* find_exchange(nb::handle type) {
  const nb::object capsule = nb::getattr(type, "__dlpack_c_exchange_api__", nb::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* table = static_cast<const DlpackExchange*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (table != nullptr && table->version.major != DlpackVersion{}.major) {
    table = table->previous;
  }
  return table != nullptr && table->lend_tensor != nullptr ? table : nullptr;
}

std::optional<nb::dlpack::dltensor> lend_tensor(const DlpackExchange& exchange, nb::handle array) {
  nb::dlpack::dltensor tensor;
  if (exchange.lend_tensor(array.ptr(), &tensor) == 0) return tensor;
  PyErr_Clear();
  return std::nullopt;
}

nb::object export_array(const DlpackExchange& exchange, std::shared_ptr<ArrayMemory> memory) {
  auto exported = std::make_unique<Exported>();
  exported->shape.assign(memory->shape.begin(), memory->shape.end());
  exported->strides.resize(exported->shape.size());
  int64_t stride = 1;
  for (size_t i = exported->shape.size(); i-- > 0;) {
    exported->strides[i] = stride;
    stride *= exported->shape[i];
  }
  DlpackManaged& managed = exported->managed;
  managed.version = {};
  managed.context = exported.get();
  managed.deleter = delete_exported;
  managed.flags = 0;
  nb::dlpack::dltensor& tensor = managed.tensor;
  tensor = {};
  tensor.data = memory->data;
  tensor.device = {dlpack_device_type(*memory->device), memory->device->ordinal()};
  tensor.ndim = static_cast<int32_t>(exported->shape.size());
  tensor.dtype = memory->type->dlpack();
  tensor.shape = exported->shape.data();
  tensor.strides = exported->strides.data();
  exported->memory = std::move(memory);
  void* object = nullptr;
  // Theirs from here on, if they take it.
  if (exchange.object_from_managed(&managed, &object) != 0) throw nb::python_error();
  exported.release();
  return nb::steal(static_cast<PyObject*>(object));
}

}  // namespace mrv1
