// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "bind/ops_context.h"

#include <nanobind/stl/string.h>

#include <string>

namespace mrv1 {
namespace {

// NumPy's own types come first; bfloat16 of ml_dtypes is one that was registered.
constexpr int kFirstRegisteredType = 256;
// Dtypes with parameters are new objects each time, and not worth remembering.
constexpr size_t kMaxDtypes = 32;

}  // namespace

OpsContext::OpsContext(nb::object host, bool sync_launches, bool check_slots)
    : host_(std::move(host)), sync_launches_(sync_launches), check_slots_(check_slots) {
  ndarray_ = host_.attr("ndarray");
  empty_ = host_.attr("empty");
  uint8_ = host_.attr("uint8");
  uint16_ = host_.attr("uint16");
}

OpsDevice& OpsContext::device(DeviceType type, int ordinal) {
  std::unique_ptr<OpsDevice>& found = devices_[{type, ordinal}];
  if (found == nullptr) {
    const nb::object opened =
        host_.attr("open_device")(type == DeviceType::kCpu ? "cpu" : "cuda", ordinal);
    // Another thread may have been here meanwhile; its device is in use.
    if (found == nullptr) {
      auto made = std::make_unique<OpsDevice>();
      made->device = nb::cast<const DeviceHandle&>(opened).share();
      found = std::move(made);
    }
  }
  return *found;
}

const ArrayKind& OpsContext::kind(nb::handle array) {
  const auto found = kinds_.find(array.type().ptr());
  if (found != kinds_.end()) return found->second;
  ArrayKind kind;
  kind.type = nb::borrow(array.type());
  if (PyObject_IsInstance(array.ptr(), ndarray_.ptr()) == 1) {
    kind.access = ArrayKind::Access::kNumpy;
  } else if (nb::isinstance<DeviceArray>(array)) {
    kind.access = ArrayKind::Access::kOwn;
    kind.is_mutable = true;
    kind.importer = nb::none();
  } else if (nb::hasattr(array, names_.dlpack) && nb::hasattr(array, names_.dlpack_device)) {
    kind.access = ArrayKind::Access::kDlpack;
    kind.is_mutable = nb::cast<bool>(host_.attr("is_mutable")(array));
    kind.importer = host_.attr("importer")(array);
    kind.may_need_grad = nb::hasattr(array, names_.requires_grad);
    kind.exchange = find_exchange(kind.type);
  } else {
    // An object may have what its type has not; it is asked again.
    return kinds_.try_emplace(Py_None).first->second;
  }
  PyObject* type = kind.type.ptr();
  return kinds_.try_emplace(type, std::move(kind)).first->second;
}

const ElementType* OpsContext::registered_type(nb::handle dtype, const char* op, const char* name) {
  for (const auto& [known, type] : dtypes_) {
    if (known.is(dtype)) return type;
  }
  const ElementType* found = nullptr;
  if (nb::cast<int>(dtype.attr("num")) >= kFirstRegisteredType) {
    const auto text = nb::cast<std::string>(dtype.attr("name"));
    for (DType type : {DType::kBF16, DType::kE4M3, DType::kE5M2}) {
      if (text == dtype_name(type)) found = &element_type(type);
    }
    if (found == nullptr) {
      fail(ErrorKind::kInvalidArgument, op, name, " is ", text,
           ", which no op takes; float32 and bfloat16 are the element types of values");
    }
  }
  if (dtypes_.size() < kMaxDtypes) dtypes_.emplace_back(nb::borrow(dtype), found);
  return found;
}

nb::object OpsContext::empty(std::span<const int64_t> shape, DType dtype) {
  nb::object& type = made_dtypes_[dtype];
  if (type.ptr() == nullptr) type = host_.attr("dtype")(std::string(dtype_name(dtype)));
  nb::object sizes = nb::steal(PyTuple_New(static_cast<Py_ssize_t>(shape.size())));
  for (size_t i = 0; i < shape.size(); ++i) {
    PyTuple_SetItem(sizes.ptr(), static_cast<Py_ssize_t>(i), PyLong_FromLongLong(shape[i]));
  }
  return empty_(sizes, type);
}

}  // namespace mrv1
