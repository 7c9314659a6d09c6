// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "bind/runner_arrays.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

namespace mrv1 {

void load_tensors(const RunnerHandle& self, const MappedFile& file,
                  const std::vector<TensorTuple>& tensors, ProgressFunction progress) {
  std::vector<TensorSource> sources;
  for (const auto& [weight, segment, offset, dtype] : tensors) {
    sources.push_back({weight, segment, offset, dtype_from_name(dtype)});
  }
  const std::shared_ptr<ModelRunner> runner = self.share();
  nb::gil_scoped_release release;
  // Called even when nothing is done yet, so that an interrupt is seen.
  runner->weights().load(file, sources, [&](size_t bytes) {
    nb::gil_scoped_acquire acquire;
    progress(bytes);
  });
}

std::unique_ptr<DeviceArray> device_logits(const RunnerHandle& self, int32_t item) {
  const std::shared_ptr<ModelRunner> runner = self.share();
  nb::gil_scoped_release release;
  const float* row = runner->device_logits(item);
  const Program& program = runner->program();
  const int64_t size = row == nullptr ? 0 : program.values()[program.logits_value()].cols;
  return copy_to_array(runner->shared_device(), row, {static_cast<size_t>(size)}, DType::kF32);
}

}  // namespace mrv1
