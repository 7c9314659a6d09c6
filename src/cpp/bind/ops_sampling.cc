// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Sampling of _core.Ops. python/mrv1/ops documents it.
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "bind/ops_call.h"
#include "sampling/math.h"

namespace mrv1 {
namespace {

// A number for all rows, or an array [rows] of a type with so many bits.
template <typename T>
RowParam<T> row_param(OpCall& call, const char* name, nb::handle given, int64_t rows) {
  RowParam<T> param;
  // An array of one element is none the less an array: to ask for its value may wait for a GPU.
  if (!call.is_array(given)) {
    if (nb::try_cast(given, param.value)) return param;
    fail(ErrorKind::kInvalidArgument, call.op(), name, " = ", nb::repr(given).c_str(),
         ": must be a number that its type holds, or an array");
  }
  const Operand array = call.input(name, given);
  call.shaped(call.contiguous(array), std::vector<int64_t>{rows});
  const ElementType* type = find_element_type(array.dtype);
  const std::string found = type != nullptr ? type->name : "of another type";
  if constexpr (std::is_same_v<T, float>) {
    call.require(found == "float32", name, " is ", found, "; must be float32");
  } else if constexpr (std::is_same_v<T, int32_t>) {
    call.require(found == "int32", name, " is ", found, "; must be int32");
  } else {
    call.require(found == "uint64" || found == "int64", name, " is ", found,
                 "; must be uint64, or int64 of the same bits");
  }
  param.values = static_cast<const T*>(array.data);
  return param;
}

void check_scalar(const OpCall& call, const RowParam<float>& param, const char* name, float low,
                  float high) {
  call.require(param.values != nullptr || (param.value >= low && param.value <= high), name, " = ",
               param.value, ": must be in [", low, ", ", high, "]");
}

nb::object sample(const OpsHandle& self, nb::handle logits_array, nb::handle temperature,
                  nb::handle top_k, nb::handle top_p, nb::handle min_p, nb::handle seed,
                  nb::handle position, nb::handle out_array, nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "sample", stream);
  const Operand logits = call.input("logits", logits_array);
  call.typed(call.ndim(logits, 2, "[rows, vocab]"), DType::kF32);
  call.matrix(logits);
  call.require(logits.cols() <= kMaxSampledVocab, "logits has ", logits.cols(),
               " columns; must have at most ", kMaxSampledVocab);
  SamplingRowsParams params{};
  const int64_t rows = logits.rows();
  params.num_rows = rows;
  params.temperature = row_param<float>(call, "temperature", temperature, rows);
  params.top_p = row_param<float>(call, "top_p", top_p, rows);
  params.min_p = row_param<float>(call, "min_p", min_p, rows);
  params.top_k = row_param<int32_t>(call, "top_k", top_k, rows);
  params.seed = row_param<uint64_t>(call, "seed", seed, rows);
  params.position = row_param<int32_t>(call, "position", position, rows);
  check_scalar(call, params.temperature, "temperature", 0.0f, std::numeric_limits<float>::max());
  check_scalar(call, params.top_p, "top_p", 0.0f, 1.0f);
  check_scalar(call, params.min_p, "min_p", 0.0f, 1.0f);
  call.require(params.top_k.values != nullptr || params.top_k.value >= 0,
               "top_k = ", params.top_k.value, ": must not be negative; 0 is off");
  call.require(params.position.values != nullptr || params.position.value >= 0,
               "position = ", params.position.value, ": must not be negative");
  const Operand out = call.output("out", out_array, {rows}, DType::kI32);
  call.no_partial_overlap(out, logits);
  params.rows = static_cast<Row*>(call.scratch(rows * static_cast<int64_t>(sizeof(Row))));
  params.sampling =
      static_cast<SamplingRow*>(call.scratch(rows * static_cast<int64_t>(sizeof(SamplingRow))));
  params.index = static_cast<int32_t*>(call.scratch(rows * static_cast<int64_t>(sizeof(int32_t))));
  StepContext& ctx = call.context();
  const auto count = static_cast<int32_t>(rows);
  ctx.sizes = {count, count, count};
  ctx.rows.num_rows = count;
  ctx.rows.vocab_size = static_cast<int32_t>(logits.cols());
  ctx.rows.rows = params.rows;
  ctx.rows.sampling = params.sampling;
  ctx.infer.row = params.index;
  ctx.infer.logits_batch = params.index;
  ctx.infer.sampled = static_cast<int32_t*>(out.data);
  // A row draws one token, at the position given.
  ctx.infer.logits_place = static_cast<int32_t*>(
      call.scratch(rows * static_cast<int64_t>(sizeof(int32_t)), /*zeroed=*/true));
  ctx.infer.max_requests = ctx.infer.max_tokens = ctx.infer.max_logits = count;
  WorkspaceLimits limits{};
  limits.vocab_size = logits.cols();
  limits.max_logits = rows;
  limits.num_threads = call.num_threads();
  call.launch(call.device().kernels().workspace_bytes(limits),
              [&](const Kernels& kernels, const StepContext& ctx) {
                kernels.sampling_rows(params, ctx);
                kernels.sample({static_cast<float*>(logits.data), logits.cols()}, ctx);
              });
  return call.result(out);
}

}  // namespace

void bind_sampling_ops(nb::class_<OpsHandle>& ops) {
  ops.def("sample", &sample, nb::arg("logits"), nb::arg("temperature"), nb::arg("top_k"),
          nb::arg("top_p"), nb::arg("min_p"), nb::arg("seed"), nb::arg("position"),
          nb::arg("out") = nb::none(), nb::arg("stream") = nb::none());
}

}  // namespace mrv1
