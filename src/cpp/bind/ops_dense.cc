// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Methods of _core.Ops for the ops whose operands are matrices. python/mrv1/ops documents them.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include <cmath>
#include <optional>

#include "bind/ops_call.h"
#include "bind/ops_weight.h"

namespace mrv1 {
namespace {

void set_tokens(OpCall& call, const Operand& x) {
  call.context().sizes.num_tokens = static_cast<int32_t>(x.rows());
}

nb::object add(const OpsHandle& self, nb::handle a_array, nb::handle b_array, nb::handle out_array,
               nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "add", stream);
  const Operand a = call.input("a", a_array);
  const DType dtype = call.matrix(a);
  const Operand b = call.input("b", b_array);
  call.shaped(call.typed(call.contiguous(b), dtype), a.sizes());
  const Operand out = call.output("out", out_array, a.sizes(), dtype);
  call.no_partial_overlap(out, a);
  call.no_partial_overlap(out, b);
  set_tokens(call, a);
  call.launch(0, [&](const Kernels& kernels, const StepContext& ctx) {
    kernels.add({a.data, b.data, out.data, a.cols(), dtype}, ctx);
  });
  return call.result(out);
}

void check_eps(const OpCall& call, float eps) {
  call.require(std::isfinite(eps) && eps >= 0.0f, "eps = ", eps,
               ": must be finite and not negative");
}

nb::object rms_norm(const OpsHandle& self, nb::handle x_array, nb::handle weight_array, float eps,
                    nb::handle out_array, nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "rms_norm", stream);
  check_eps(call, eps);
  const Operand x = call.input("x", x_array);
  const DType dtype = call.matrix(x);
  const Operand weight = call.input("weight", weight_array);
  call.floats(weight, x.cols());
  const Operand out = call.output("out", out_array, x.sizes(), dtype);
  call.no_partial_overlap(out, x);
  call.no_partial_overlap(out, weight);
  set_tokens(call, x);
  call.launch(0, [&](const Kernels& kernels, const StepContext& ctx) {
    kernels.rms_norm({x.data, nullptr, static_cast<const float*>(weight.data), out.data, nullptr,
                      x.cols(), eps, dtype, false},
                     ctx);
  });
  return call.result(out);
}

nb::object add_rms_norm(const OpsHandle& self, nb::handle x_array, nb::handle residual_array,
                        nb::handle weight_array, float eps, nb::handle out_array,
                        nb::handle sum_array, nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "add_rms_norm", stream);
  check_eps(call, eps);
  const Operand x = call.input("x", x_array);
  const DType dtype = call.matrix(x);
  const Operand residual = call.input("residual", residual_array);
  call.shaped(call.typed(call.contiguous(residual), dtype), x.sizes());
  const Operand weight = call.input("weight", weight_array);
  call.floats(weight, x.cols());
  const Operand out = call.output("out", out_array, x.sizes(), dtype);
  const Operand sum = call.output("sum_out", sum_array, x.sizes(), dtype);
  for (const Operand* written : {&out, &sum}) {
    for (const Operand* read : {&x, &residual, &weight}) call.no_partial_overlap(*written, *read);
  }
  call.require(out.data != sum.data || x.size() == 0, "out and sum_out are the same array");
  call.no_partial_overlap(out, sum);
  set_tokens(call, x);
  call.launch(0, [&](const Kernels& kernels, const StepContext& ctx) {
    kernels.rms_norm({x.data, residual.data, static_cast<const float*>(weight.data), out.data,
                      sum.data, x.cols(), eps, dtype, false},
                     ctx);
  });
  return nb::make_tuple(call.result(out), call.result(sum));
}

nb::object gated_mul(const OpsHandle& self, nb::handle x_array, const std::string& activation,
                     nb::handle out_array, nb::handle stream) {
  const auto context = self.share();
  const Activation gate = activation_from_name(activation, "gated_mul");
  OpCall call(*context, gate == Activation::kSilu ? "silu_mul" : "gelu_mul", stream);
  const Operand x = call.input("x", x_array);
  const DType dtype = call.matrix(x);
  call.require(x.cols() % 2 == 0, "x has ", x.cols(), " columns; must be gate and up of one width");
  std::vector<int64_t> shape = x.sizes();
  shape.back() /= 2;
  const Operand out = call.output("out", out_array, shape, dtype);
  call.require(out.data != x.data || x.size() == 0, "out is x, whose shape differs");
  call.no_partial_overlap(out, x);
  set_tokens(call, x);
  call.launch(0, [&](const Kernels& kernels, const StepContext& ctx) {
    kernels.gated_mul({x.data, out.data, x.cols() / 2, dtype, gate}, ctx);
  });
  return call.result(out);
}

nb::object soft_cap(const OpsHandle& self, nb::handle x_array, float cap, nb::handle out_array,
                    nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "soft_cap", stream);
  call.require(std::isfinite(cap) && cap > 0.0f, "cap = ", cap, ": must be finite and positive");
  const Operand x = call.input("x", x_array);
  call.typed(x, DType::kF32);
  call.matrix(x);
  const Operand out = call.output("out", out_array, x.sizes(), DType::kF32);
  call.no_partial_overlap(out, x);
  call.context().sizes.num_logits = static_cast<int32_t>(x.rows());
  call.launch(0, [&](const Kernels& kernels, const StepContext& ctx) {
    kernels.soft_cap(
        {static_cast<const float*>(x.data), static_cast<float*>(out.data), x.cols(), cap}, ctx);
  });
  return call.result(out);
}

nb::object gather_rows(const OpsHandle& self, nb::handle x_array, nb::handle indices_array,
                       nb::handle out_array, nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "gather_rows", stream);
  const Operand x = call.input("x", x_array);
  const DType dtype = call.matrix(call.ndim(x, 2, "[rows, cols]"));
  const Operand indices = call.input("indices", indices_array);
  call.ints(indices);
  call.in_range(indices, 0, x.rows(), "rows of x");
  const Operand out = call.output("out", out_array, {indices.cols(), x.cols()}, dtype);
  call.require(out.data != x.data || x.size() == 0, "out is x");
  call.no_partial_overlap(out, x);
  call.no_partial_overlap(out, indices);
  call.context().sizes.num_logits = static_cast<int32_t>(indices.cols());
  call.context().infer.logits_indices = static_cast<int32_t*>(indices.data);
  call.launch(0, [&](const Kernels& kernels, const StepContext& ctx) {
    kernels.gather_rows({x.data, out.data, x.cols(), dtype}, ctx);
  });
  return call.result(out);
}

nb::object embedding(const OpsHandle& self, nb::handle ids_array, nb::handle table_array,
                     float scale, const std::optional<std::string>& dtype_name,
                     nb::handle out_array, nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "embedding", stream);
  call.require(std::isfinite(scale), "scale = ", scale, ": must be finite");
  const Operand table = call.input("table", table_array);
  const DType table_dtype = call.matrix(call.ndim(table, 2, "[vocab, cols]"));
  call.require(table.rows() > 0, "table has no rows");
  DType dtype = table_dtype;
  if (dtype_name) {
    dtype = dtype_from_name(*dtype_name);
    call.require(dtype == DType::kF32 || dtype == DType::kBF16, "dtype = '", *dtype_name,
                 "': must be float32 or bfloat16");
  }
  const Operand ids = call.input("token_ids", ids_array);
  call.ints(ids);
  call.in_range(ids, -1, table.rows(), "ids, or -1 for a zero row,");
  const Operand out = call.output("out", out_array, {ids.cols(), table.cols()}, dtype);
  call.require(out.data != table.data || out.size() == 0, "out is table");
  call.no_partial_overlap(out, table);
  call.no_partial_overlap(out, ids);
  call.context().sizes.num_tokens = static_cast<int32_t>(ids.cols());
  call.context().infer.token_ids = static_cast<int32_t*>(ids.data);
  call.launch(0, [&](const Kernels& kernels, const StepContext& ctx) {
    kernels.embedding(
        {{table.data, table_dtype, WeightLayout::kRowMajor, table.rows(), table.cols()},
         out.data,
         dtype,
         scale,
         0},
        ctx);
  });
  return call.result(out);
}

nb::object linear(const OpsHandle& self, nb::handle x_array, nb::handle weight_object,
                  nb::handle bias_array, nb::handle residual_array,
                  const std::optional<std::string>& activation,
                  const std::optional<std::string>& out_dtype, nb::handle out_array,
                  nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "linear", stream);
  const Activation gate =
      activation ? activation_from_name(*activation, "linear") : Activation::kNone;
  const Operand x = call.input("x", x_array);
  const DType dtype = call.matrix(x);
  WeightOperand operand = weight_operand(call, "weight", weight_object, false);
  const WeightView& weight = operand.view;
  const Operand& plain = operand.plain;
  call.require(weight.dtype == dtype, "weight is ", dtype_name(weight.dtype), " and x is ",
               dtype_name(dtype), "; they must be equal");
  call.require(weight.cols == x.cols(), "x has ", x.cols(), " columns; must be ", weight.cols,
               ", as weight is [", weight.rows, ", ", weight.cols, "]");
  call.require(gate == Activation::kNone || weight.rows % (2 * kPanelRows) == 0, "weight has ",
               weight.rows, " rows; must be a multiple of ", 2 * kPanelRows, " with an activation");
  DType result_dtype = dtype;
  if (out_dtype) {
    result_dtype = dtype_from_name(*out_dtype);
    call.require(result_dtype == dtype || result_dtype == DType::kF32, "out_dtype = '", *out_dtype,
                 "': must be float32 or ", dtype_name(dtype));
  }
  call.require(gate == Activation::kNone || result_dtype == dtype, "out_dtype = '",
               out_dtype.value_or(""), "': must be ", dtype_name(dtype), " with an activation");
  LinearParams params{x.data, weight, nullptr, nullptr, dtype, result_dtype, gate, false, false};
  std::vector<int64_t> shape = x.sizes();
  shape.back() = params.out_cols();
  Operand bias, residual;
  if (!bias_array.is_none()) {
    bias = call.input("bias", bias_array);
    call.floats(bias, weight.rows);
    params.bias = static_cast<const float*>(bias.data);
  }
  if (!residual_array.is_none()) {
    residual = call.input("residual", residual_array);
    call.shaped(call.typed(call.contiguous(residual), result_dtype), shape);
  }
  const Operand out = call.output("out", out_array, shape, result_dtype);
  call.require(out.data != x.data || out.size() == 0, "out is x; they must share nothing");
  call.no_partial_overlap(out, x);
  if (plain.data != nullptr) {
    call.require(out.data != plain.data || out.size() == 0, "out is weight");
    call.no_partial_overlap(out, plain);
  }
  if (params.bias != nullptr) call.no_partial_overlap(out, bias);
  // The product is written before the residual is read.
  const bool in_place = residual.data != nullptr && residual.data == out.data;
  if (residual.data != nullptr) call.no_partial_overlap(out, residual);
  params.out = out.data;
  if (in_place) {
    params.out = call.scratch(out.size() * static_cast<int64_t>(dtype_size(result_dtype)), false);
  }
  pack(call, operand);
  params.weight = weight;
  set_tokens(call, x);
  WorkspaceLimits limits{};
  limits.max_tokens = x.rows();
  limits.gated_rows = gate != Activation::kNone || params.bias != nullptr ? weight.rows : 0;
  limits.num_threads = call.num_threads();
  const bool on_gpu = call.device().type() == DeviceType::kCuda;
  const int64_t workspace = on_gpu ? call.device().kernels().workspace_bytes(limits) : 0;
  call.launch(workspace, [&](const Kernels& kernels, const StepContext& ctx) {
    kernels.linear(params, ctx);
    if (residual.data != nullptr) {
      kernels.add({params.out, residual.data, out.data, shape.back(), result_dtype}, ctx);
    }
  });
  return call.result(out);
}

}  // namespace

void bind_dense_ops(nb::class_<OpsHandle>& ops) {
  const auto none = [](const char* name) { return nb::arg(name) = nb::none(); };
  ops.def("add", &add, nb::arg("a"), nb::arg("b"), none("out"), none("stream"))
      .def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), none("out"),
           none("stream"))
      .def("add_rms_norm", &add_rms_norm, nb::arg("x"), nb::arg("residual"), nb::arg("weight"),
           nb::arg("eps"), none("out"), none("sum_out"), none("stream"))
      .def("gated_mul", &gated_mul, nb::arg("x"), nb::arg("activation"), none("out"),
           none("stream"))
      .def("soft_cap", &soft_cap, nb::arg("x"), nb::arg("cap"), none("out"), none("stream"))
      .def("gather_rows", &gather_rows, nb::arg("x"), nb::arg("indices"), none("out"),
           none("stream"))
      .def("embedding", &embedding, nb::arg("token_ids"), nb::arg("table"), nb::arg("scale") = 1.0f,
           none("dtype"), none("out"), none("stream"))
      .def("linear", &linear, nb::arg("x"), nb::arg("weight"), none("bias"), none("residual"),
           none("activation"), none("out_dtype"), none("out"), none("stream"));
}

}  // namespace mrv1
