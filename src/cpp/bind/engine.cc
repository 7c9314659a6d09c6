// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "engine/engine.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind/bind.h"
#include "bind/runner_handle.h"

namespace mrv1 {
namespace {

struct EngineHandle : Handle<Engine> {
  using Handle::Handle;
};

}  // namespace

void bind_engine(nb::module_& m) {
  nb::enum_<RequestEnd>(m, "RequestEnd")
      .value("NONE", RequestEnd::kNone)
      .value("STOP", RequestEnd::kStop)
      .value("LENGTH", RequestEnd::kLength)
      .value("ABORT", RequestEnd::kAbort)
      .value("ERROR", RequestEnd::kError);
  nb::class_<RequestOutput>(m, "RequestOutput", "One event of one request.")
      .def_ro("id", &RequestOutput::id)
      .def_ro("token", &RequestOutput::token)
      .def_ro("end", &RequestOutput::end)
      .def_ro("error", &RequestOutput::error);
  nb::class_<EngineHandle>(m, "Engine", "See mrv1.engine.Engine.")
      .def(
          "__init__",
          [](EngineHandle* self, const RunnerHandle& runner) {
            new (self) EngineHandle(std::make_shared<Engine>(runner.share()), "engine");
          },
          nb::arg("runner"))
      .def(
          "add_request",
          [](const EngineHandle& self, const std::string& id, const RowSpec& row) {
            self->add_request({id, row});
          },
          nb::arg("id"), nb::arg("row"), nb::call_guard<nb::gil_scoped_release>())
      .def(
          "abort",
          [](const EngineHandle& self, const std::string& id, bool report) {
            return self->abort(id, report);
          },
          nb::arg("id"), nb::arg("report") = true)
      .def("has_unfinished", [](const EngineHandle& self) { return self->has_unfinished(); })
      .def(
          "step", [](const EngineHandle& self) { return self->step(); },
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "stats",
          [](const EngineHandle& self) {
            const EngineStats stats = self->stats();
            nb::dict dict;
            dict["steps"] = stats.steps;
            dict["prefill_tokens"] = stats.prefill_tokens;
            dict["decode_tokens"] = stats.decode_tokens;
            dict["running"] = stats.running;
            dict["waiting"] = stats.waiting;
            dict["free_blocks"] = stats.free_blocks;
            return dict;
          },
          nb::sig("def stats(self) -> dict[str, int]"))
      .def("check_idle", [](const EngineHandle& self) { self->check_idle(); })
      .def("close", &EngineHandle::close);
}

}  // namespace mrv1
