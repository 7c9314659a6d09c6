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

// More drafts than any model is asked to verify at once.
constexpr int32_t kMaxDrafts = 1024;

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
  params.vocab_size = logits.cols();
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
  ctx.rows.max_logprobs = -1;
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

nb::object ngram_propose(const OpsHandle& self, nb::handle token_ids_array,
                         nb::handle lengths_array, int32_t max_drafts, int32_t ngram_min,
                         int32_t ngram_max, nb::handle limits_array, nb::handle out_array,
                         nb::handle count_array, nb::handle stream) {
  const auto context = self.share();
  OpCall call(*context, "ngram_propose", stream);
  call.require(max_drafts >= 1 && max_drafts <= kMaxDrafts, "max_drafts = ", max_drafts,
               ": must be in [1, ", kMaxDrafts, "]");
  call.require(ngram_min >= 1 && ngram_min <= ngram_max, "ngram_min = ", ngram_min,
               ": must be in [1, ngram_max], and ngram_max is ", ngram_max);
  const Operand histories = call.input("token_ids", token_ids_array);
  call.typed(call.ndim(histories, 2, "[requests, tokens]"), DType::kI32);
  const int64_t most = std::numeric_limits<int32_t>::max();
  call.require(histories.rows() <= most && histories.cols() <= most, "token_ids is [",
               histories.rows(), ", ", histories.cols(), "]; must have fewer than 2**31 of each");
  call.require(histories.size() == 0 || ((histories.strides[1] == 1 || histories.cols() == 1) &&
                                         histories.strides[0] >= 0),
               "token_ids has strides [", histories.strides[0], ", ", histories.strides[1],
               "]; the tokens of a row must be contiguous");
  const Operand lengths = call.input("lengths", lengths_array);
  call.ints(lengths, histories.rows());
  call.in_range(lengths, 0, histories.cols() + 1, "lengths");
  NgramProposeParams params{};
  std::vector<Operand> inputs = {histories, lengths};
  if (!limits_array.is_none()) {
    const Operand limits = call.input("limits", limits_array);
    call.ints(limits, histories.rows());
    call.in_range(limits, 0, most, "limits");
    params.limits = static_cast<const int32_t*>(limits.data);
    inputs.push_back(limits);
  }
  const Operand out = call.output("out", out_array, {histories.rows(), max_drafts}, DType::kI32);
  const Operand count = call.output("num_out", count_array, {histories.rows()}, DType::kI32);
  for (const Operand* written : {&out, &count}) {
    for (const Operand& read : inputs) {
      call.require(written->data != read.data || written->size() == 0, written->name, " is ",
                   read.name, "; they must share nothing");
      call.no_partial_overlap(*written, read);
    }
  }
  call.require(out.data != count.data || out.size() == 0, "out and num_out are the same array");
  call.no_partial_overlap(out, count);
  params.num_requests = static_cast<int32_t>(histories.rows());
  params.histories = static_cast<const int32_t*>(histories.data);
  params.history_stride = histories.strides[0];
  params.lengths = static_cast<const int32_t*>(lengths.data);
  params.max_drafts = max_drafts;
  params.range = {ngram_min, ngram_max};
  params.drafts = static_cast<int32_t*>(out.data);
  params.num_drafts = static_cast<int32_t*>(count.data);
  call.launch(0, [&](const Kernels& kernels, const StepContext& ctx) {
    kernels.ngram_propose(params, ctx);
  });
  return nb::make_tuple(call.result(out), call.result(count));
}

}  // namespace

void bind_sampling_ops(nb::class_<OpsHandle>& ops) {
  ops.def("sample", &sample, nb::arg("logits"), nb::arg("temperature"), nb::arg("top_k"),
          nb::arg("top_p"), nb::arg("min_p"), nb::arg("seed"), nb::arg("position"),
          nb::arg("out") = nb::none(), nb::arg("stream") = nb::none())
      .def("ngram_propose", &ngram_propose, nb::arg("token_ids"), nb::arg("lengths"),
           nb::arg("max_drafts"), nb::arg("ngram_min"), nb::arg("ngram_max"),
           nb::arg("limits") = nb::none(), nb::arg("out") = nb::none(),
           nb::arg("num_out") = nb::none(), nb::arg("stream") = nb::none());
}

}  // namespace mrv1
