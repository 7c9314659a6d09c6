// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "bind/ops_weight.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include <string>

namespace mrv1 {
namespace {

Operand weight_array(OpCall& call, const char* name, nb::handle array, bool is_many) {
  Operand weight = call.input(name, array);
  call.matrix(is_many ? call.ndim(weight, 3, "[matrices, out, in]")
                      : call.ndim(weight, 2, "[out, in]"));
  call.require(weight.rows() > 0, name, " has no rows");
  return weight;
}

WeightView view_of(const OpCall& call, const Operand& array) {
  return {.dtype = call.activation(array),
          .rows = array.rows(),
          .cols = array.cols(),
          .matrices = array.ndim == 3 ? array.shape[0] : 1};
}

std::unique_ptr<PackedWeightHandle> pack_linear(const OpsHandle& self, nb::handle array,
                                                nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "pack_linear", stream);
  const Operand operand = call.input("weight", array);
  call.require(operand.ndim == 2 || operand.ndim == 3, "weight has ", operand.ndim,
               " dimensions; must be [out, in] or [matrices, out, in]");
  call.matrix(operand);
  call.require(operand.rows() > 0, "weight has no rows");
  WeightOperand weight{view_of(call, operand), operand, nullptr};
  pack(call, weight);
  auto packed = std::make_shared<PackedWeight>();
  packed->device = call.shared().device;
  packed->view = weight.view;
  packed->buffers = call.take_scratch();
  if (packed->buffers.empty()) packed->array = nb::borrow(array);
  return std::make_unique<PackedWeightHandle>(std::move(packed), "packed weight");
}

nb::tuple shape_of(const WeightView& view) {
  if (view.matrices == 1) return nb::make_tuple(view.rows, view.cols);
  return nb::make_tuple(view.matrices, view.rows / view.matrices, view.cols);
}

}  // namespace

WeightOperand weight_operand(OpCall& call, const char* name, nb::handle object, bool is_many) {
  WeightOperand weight;
  if (!nb::isinstance<PackedWeightHandle>(object)) {
    weight.plain = weight_array(call, name, object, is_many);
    weight.view = view_of(call, weight.plain);
    return weight;
  }
  weight.packed = nb::cast<const PackedWeightHandle&>(object).share();
  const Device& device = *weight.packed->device;
  call.require(device.type() == call.device().type() && device.ordinal() == call.device().ordinal(),
               name, " was packed for ", device.name(), " and x lies on ", call.device().name(),
               "; all arrays of a call must be on one device");
  // A GPU's weight is the caller's array, which the stream waits for.
  if (weight.packed->array.ptr() != nullptr) {
    weight.plain = call.input(name, weight.packed->array);
  }
  weight.view = weight.packed->view;
  call.require(is_many || weight.view.matrices == 1, name, " was packed as ", weight.view.matrices,
               " matrices; must be one");
  return weight;
}

void pack(OpCall& call, WeightOperand& weight) {
  if (weight.packed != nullptr) return;
  WeightView& view = weight.view;
  view.layout = call.device().kernels().linear_layout;
  if (view.layout == WeightLayout::kRowMajor) {
    view.data = weight.plain.data;
    return;
  }
  void* packed = call.scratch(weight_bytes(view), true);
  view.data = packed;
  call.launch(0, [&](const Kernels&, const StepContext& ctx) {
    pack_panels(view, packed, weight.plain.data, view.dtype, 0, view.rows, *ctx.pool);
  });
}

void bind_packed_weights(nb::class_<OpsHandle>& ops, nb::module_& m) {
  nb::class_<PackedWeightHandle>(m, "PackedWeight",
                                 "A matrix, or several equal ones, in the layout that `linear` of "
                                 "a device reads; made by\n"
                                 "mrv1.ops.pack_linear.")
      .def_prop_ro(
          "shape", [](const PackedWeightHandle& self) { return shape_of(self->view); },
          nb::sig("def shape(self) -> tuple[int, ...]"), "(out, in) or (matrices, out, in)")
      .def_prop_ro(
          "dtype",
          [](const PackedWeightHandle& self) { return std::string(dtype_name(self->view.dtype)); })
      .def_prop_ro(
          "nbytes", [](const PackedWeightHandle& self) { return weight_bytes(self->view); },
          "Bytes as stored.");
  ops.def("pack_linear", &pack_linear, nb::arg("weight"), nb::arg("stream") = nb::none());
}

}  // namespace mrv1
