// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "bind/runner_arrays.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "runner/rank_followers.h"

namespace mrv1 {
namespace {

TensorSource tensor_source(const TensorTuple& tensor) {
  const auto& [weight, segment, offset, kind] = tensor;
  if (kind == "nvfp4_codes") {
    return {weight, segment, offset, DType::kE2M1, TensorPart::kElements};
  }
  if (kind == "nvfp4_block_scales") {
    return {weight, segment, offset, DType::kE4M3, TensorPart::kBlockScales};
  }
  if (kind == "nvfp4_global_scale") {
    return {weight, segment, offset, DType::kF32, TensorPart::kGlobalScale};
  }
  if (kind == "nvfp4_input_scale") {
    return {weight, segment, offset, DType::kF32, TensorPart::kInputScale};
  }
  return {weight, segment, offset, dtype_from_name(kind), TensorPart::kElements};
}

}  // namespace

void load_tensors(const RunnerHandle& self, const MappedFile& file,
                  const std::vector<std::vector<TensorTuple>>& tensors, ProgressFunction progress) {
  std::vector<std::vector<TensorSource>> sources;
  for (const std::vector<TensorTuple>& of_rank : tensors) {
    std::vector<TensorSource>& own = sources.emplace_back();
    for (const TensorTuple& tensor : of_rank) own.push_back(tensor_source(tensor));
  }
  const std::shared_ptr<ModelRunner> runner = self.share();
  nb::gil_scoped_release release;
  // Called even when nothing is done yet, so that an interrupt is seen.
  load_ranks(*runner, file, sources, [&](size_t bytes) {
    nb::gil_scoped_acquire acquire;
    progress(bytes);
  });
}

std::unique_ptr<DeviceArray> device_logits(const RunnerHandle& self, int32_t item) {
  const std::shared_ptr<ModelRunner> runner = self.share();
  nb::gil_scoped_release release;
  const float* row = runner->device_logits(item);
  const int64_t size = row == nullptr ? 0 : runner->program().vocab_size();
  return copy_to_array(runner->shared_device(), row, {static_cast<size_t>(size)}, DType::kF32);
}

nb::ndarray<nb::numpy, float> hidden_states(const RunnerHandle& self, int32_t item) {
  const std::shared_ptr<ModelRunner> runner = self.share();
  std::vector<float> values;
  ModelRunner::HiddenStates states;
  {
    nb::gil_scoped_release release;
    states = runner->hidden_states(item);
    values.resize(static_cast<size_t>(states.tokens * states.cols));
    Device& device = runner->device();
    if (states.dtype == DType::kF32) {
      device.copy_out(values.data(), states.data, values.size() * sizeof(float));
    } else {
      std::vector<BFloat16> raw(values.size());
      device.copy_out(raw.data(), states.data, raw.size() * sizeof(BFloat16));
      std::transform(raw.begin(), raw.end(), values.begin(),
                     [](BFloat16 value) { return to_float(value); });
    }
  }
  return to_numpy(values, {static_cast<size_t>(states.tokens), static_cast<size_t>(states.cols)});
}

std::unique_ptr<DeviceArray> device_hidden_states(const RunnerHandle& self, int32_t item) {
  const std::shared_ptr<ModelRunner> runner = self.share();
  nb::gil_scoped_release release;
  const ModelRunner::HiddenStates states = runner->hidden_states(item);
  return copy_to_array(runner->shared_device(), states.data,
                       {static_cast<size_t>(states.tokens), static_cast<size_t>(states.cols)},
                       states.dtype);
}

}  // namespace mrv1
