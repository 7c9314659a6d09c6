// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "program/session.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind/bind.h"

namespace mrv1 {
namespace {

struct SessionHandle : Handle<ProgramSession> {
  using Handle::Handle;
};

template <typename T, typename Array>
std::vector<T> to_vector(const Array& array) {
  return std::vector<T>(array.data(), array.data() + array.size());
}

}  // namespace

void bind_session(nb::module_& m) {
  nb::class_<SessionHandle>(m, "ProgramSession",
                            "Runs a program over inputs, infer_params and a KV cache set by hand: "
                            "for testing single ops\n"
                            "and fused forms on either backend. Floats cross as float32.")
      .def(
          "__init__",
          [](SessionHandle* self, const DeviceHandle& device, const Program& program,
             int32_t max_requests, int32_t max_tokens, int32_t max_logits, int32_t num_blocks,
             int32_t block_size, int32_t max_blocks, int64_t max_position) {
            ProgramSession::Limits limits{max_requests, max_tokens, max_logits,  num_blocks,
                                          block_size,   max_blocks, max_position};
            new (self) SessionHandle(
                std::make_shared<ProgramSession>(device.share(), program, limits), "session");
          },
          nb::arg("device"), nb::arg("program"), nb::kw_only(), nb::arg("max_requests") = 1,
          nb::arg("max_tokens") = 1, nb::arg("max_logits") = 1, nb::arg("num_blocks") = 1,
          nb::arg("block_size") = 16, nb::arg("max_blocks") = 1, nb::arg("max_position") = 1)
      .def(
          "load_weight",
          [](const SessionHandle& self, int32_t weight, FloatArray values) {
            const auto& specs = self->program().weights();
            check(weight >= 0 && weight < static_cast<int32_t>(specs.size()), "session",
                  "no weight ", weight);
            const WeightSpec& spec = specs[weight];
            check(static_cast<int64_t>(values.size()) == spec.rows * spec.cols, "session", "'",
                  spec.name, "' needs ", spec.rows * spec.cols, " values, got ", values.size());
            for (size_t i = 0; i < spec.segments.size(); ++i) {
              self->weights().load_segment(weight, static_cast<int32_t>(i),
                                           values.data() + spec.segments[i].row_start * spec.cols,
                                           DType::kF32);
            }
          },
          nb::arg("weight"), nb::arg("values"))
      .def(
          "set_value",
          [](const SessionHandle& self, int32_t value, FloatArray data) {
            self->set_value(value, to_vector<float>(data));
          },
          nb::arg("value"), nb::arg("data"))
      .def(
          "value",
          [](const SessionHandle& self, int32_t value, int64_t rows) {
            const std::vector<float> data = self->value(value, rows);
            const size_t cols = rows > 0 ? data.size() / rows : 0;
            return to_numpy(data, {static_cast<size_t>(rows), cols});
          },
          nb::arg("value"), nb::arg("rows"))
      .def(
          "set_ints",
          [](const SessionHandle& self, const std::string& name, IntArray data) {
            self->set_ints(name, to_vector<int32_t>(data));
          },
          nb::arg("name"), nb::arg("data"))
      .def(
          "set_cache",
          [](const SessionHandle& self, int32_t layer, bool values, FloatArray data) {
            self->set_cache(layer, values, to_vector<float>(data));
          },
          nb::arg("layer"), nb::arg("values"), nb::arg("data"))
      .def(
          "cache",
          [](const SessionHandle& self, int32_t layer, bool values) {
            const std::vector<float> data = self->cache(layer, values);
            return to_numpy(data, {data.size()});
          },
          nb::arg("layer"), nb::arg("values"))
      .def(
          "run",
          [](const SessionHandle& self, int32_t num_requests, int32_t num_tokens,
             int32_t num_logits) { self->run(num_requests, num_tokens, num_logits); },
          nb::arg("num_requests"), nb::arg("num_tokens"), nb::arg("num_logits") = 0,
          nb::call_guard<nb::gil_scoped_release>())
      .def("close", &SessionHandle::close);
}

}  // namespace mrv1
