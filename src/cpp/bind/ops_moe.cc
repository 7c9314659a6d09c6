// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Methods of _core.Ops for mixtures of experts. python/mrv1/ops documents them.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <initializer_list>
#include <optional>

#include "bind/ops_call.h"
#include "bind/ops_weight.h"

namespace mrv1 {
namespace {

nb::object moe_route(const OpsHandle& self, nb::handle logits_array, int32_t top_k,
                     nb::handle bias_array, const std::string& scores, bool renormalize,
                     float min_sum, float scale, nb::handle token_batch_array,
                     nb::handle experts_array, nb::handle weights_array, nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "moe_route", stream);
  const Operand logits = call.input("logits", logits_array);
  call.typed(logits, DType::kF32);
  call.matrix(logits);
  const int64_t num_experts = logits.cols();
  call.require(num_experts >= 1 && num_experts <= kMaxExperts, "logits has ", num_experts,
               " columns; must be 1 to ", kMaxExperts, ", one for each expert");
  call.require(top_k >= 1 && top_k <= num_experts, "top_k = ", top_k, ": must be in [1, ",
               num_experts, "]");
  call.require(std::isfinite(min_sum) && min_sum >= 0.0f, "min_sum = ", min_sum,
               ": must be finite and not negative");
  call.require(std::isfinite(scale), "scale = ", scale, ": must be finite");
  MoeRouteParams params{};
  params.logits = static_cast<const float*>(logits.data);
  params.num_experts = static_cast<int32_t>(num_experts);
  params.top_k = top_k;
  params.scores = router_scores_from_name(scores, "moe_route");
  params.renormalize = renormalize;
  params.min_sum = min_sum;
  params.scale = scale;
  Operand bias, token_batch;
  if (!bias_array.is_none()) {
    bias = call.input("bias", bias_array);
    params.bias = static_cast<const float*>(call.floats(bias, num_experts).data);
  }
  if (!token_batch_array.is_none()) {
    token_batch = call.input("token_batch", token_batch_array);
    call.context().infer.token_batch =
        static_cast<int32_t*>(call.ints(token_batch, logits.rows()).data);
  }
  std::vector<int64_t> shape = logits.sizes();
  shape.back() = top_k;
  const Operand experts = call.output("experts_out", experts_array, shape, DType::kI32);
  const Operand weights = call.output("weights_out", weights_array, shape, DType::kF32);
  for (const Operand* written : {&experts, &weights}) {
    for (const Operand* read :
         std::initializer_list<const Operand*>{&logits, &bias, &token_batch}) {
      if (read->data == nullptr) continue;
      call.require(written->data != read->data || written->size() == 0, written->name, " is ",
                   read->name);
      call.no_partial_overlap(*written, *read);
    }
  }
  call.require(experts.data != weights.data || experts.size() == 0,
               "experts_out and weights_out are the same array");
  call.no_partial_overlap(experts, weights);
  params.experts = static_cast<int32_t*>(experts.data);
  params.weights = static_cast<float*>(weights.data);
  call.context().sizes.num_tokens = static_cast<int32_t>(logits.rows());
  call.launch(
      0, [&](const Kernels& kernels, const StepContext& ctx) { kernels.moe_route(params, ctx); });
  return nb::make_tuple(call.result(experts), call.result(weights));
}

nb::object moe_experts(const OpsHandle& self, nb::handle x_array, nb::handle experts_array,
                       nb::handle weights_array, nb::handle gate_up_object, nb::handle down_object,
                       const std::string& activation, int32_t first_expert,
                       const std::optional<std::string>& out_dtype, nb::handle out_array,
                       nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "moe_experts", stream);
  MoeExpertsParams params{};
  params.activation = activation_from_name(activation, "moe_experts");
  const Operand x = call.input("x", x_array);
  params.dtype = call.matrix(x);
  const Operand experts = call.input("experts", experts_array);
  call.typed(call.contiguous(experts), DType::kI32);
  call.require(experts.cols() >= 1 && experts.cols() <= kMaxExperts, "experts has ", experts.cols(),
               " columns; must be 1 to ", kMaxExperts);
  std::vector<int64_t> shape = x.sizes();
  shape.back() = experts.cols();
  call.shaped(experts, shape);
  const Operand weights = call.input("weights", weights_array);
  call.shaped(call.typed(call.contiguous(weights), DType::kF32), shape);
  WeightOperand gate_up = weight_operand(call, "gate_up", gate_up_object, true);
  WeightOperand down = weight_operand(call, "down", down_object, true);
  for (const auto& [name, view] : {std::pair{"gate_up", &gate_up.view}, {"down", &down.view}}) {
    call.require(view->dtype == params.dtype, name, " is ", dtype_name(view->dtype), " and x is ",
                 dtype_name(params.dtype), "; they must be equal");
  }
  const int64_t count = down.view.matrices;
  call.require(gate_up.view.matrices == count && count <= kMaxExperts, "gate_up has ",
               gate_up.view.matrices, " matrices and down ", count, "; must be as many, at most ",
               kMaxExperts);
  call.require(gate_up.view.cols == x.cols() && gate_up.view.rows == 2 * count * down.view.cols &&
                   down.view.rows == count * x.cols(),
               "matrices of gate_up are [", gate_up.view.rows / count, ", ", gate_up.view.cols,
               "] and those of down [", down.view.rows / count, ", ", down.view.cols,
               "]; for x of ", x.cols(), " columns they must be [2 n, ", x.cols(), "] and [",
               x.cols(), ", n]");
  call.require(first_expert >= 0 && first_expert <= kMaxExperts - count,
               "first_expert = ", first_expert, ": must be in [0, ", kMaxExperts - count, "]");
  params.out_dtype = params.dtype;
  if (out_dtype) {
    params.out_dtype = dtype_from_name(*out_dtype);
    call.require(params.out_dtype == params.dtype || params.out_dtype == DType::kF32,
                 "out_dtype = '", *out_dtype, "': must be float32 or ", dtype_name(params.dtype));
  }
  const Operand out = call.output("out", out_array, x.sizes(), params.out_dtype);
  for (const Operand* read :
       std::initializer_list<const Operand*>{&x, &experts, &weights, &gate_up.plain, &down.plain}) {
    if (read->data == nullptr) continue;
    call.require(out.data != read->data || out.size() == 0, "out is ", read->name);
    call.no_partial_overlap(out, *read);
  }
  pack(call, gate_up);
  pack(call, down);
  params.x = x.data;
  params.experts = static_cast<const int32_t*>(experts.data);
  params.weights = static_cast<const float*>(weights.data);
  params.gate_up = gate_up.view;
  params.down = down.view;
  params.out = out.data;
  params.top_k = static_cast<int32_t>(experts.cols());
  params.first_expert = first_expert;
  params.num_experts = static_cast<int32_t>(first_expert + count);
  call.context().sizes.num_tokens = static_cast<int32_t>(x.rows());
  WorkspaceLimits limits{};
  limits.max_tokens = x.rows();
  limits.moe_rows = x.rows() * params.top_k;
  limits.moe_hidden = x.cols();
  limits.moe_intermediate = down.view.cols;
  limits.moe_experts = count;
  limits.moe_element_bytes = static_cast<int64_t>(dtype_size(params.dtype));
  limits.num_threads = call.num_threads();
  call.launch(
      call.device().kernels().workspace_bytes(limits),
      [&](const Kernels& kernels, const StepContext& ctx) { kernels.moe_experts(params, ctx); });
  return call.result(out);
}

}  // namespace

void bind_moe_ops(nb::class_<OpsHandle>& ops) {
  const auto none = [](const char* name) { return nb::arg(name) = nb::none(); };
  ops.def("moe_route", &moe_route, nb::arg("logits"), nb::arg("top_k"), none("bias"),
          nb::arg("scores") = "softmax", nb::arg("renormalize") = true, nb::arg("min_sum") = 0.0f,
          nb::arg("scale") = 1.0f, none("token_batch"), none("experts_out"), none("weights_out"),
          none("stream"))
      .def("moe_experts", &moe_experts, nb::arg("x"), nb::arg("experts"), nb::arg("weights"),
           nb::arg("gate_up"), nb::arg("down"), nb::arg("activation") = "silu",
           nb::arg("first_expert") = 0, none("out_dtype"), none("out"), none("stream"));
}

}  // namespace mrv1
