// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "dist/collective_probe.h"

namespace mrv1 {
namespace {

constexpr std::string_view kWhere = "collective_probe";

struct CollectiveProbeHandle : Handle<CollectiveProbe> {
  using Handle::Handle;
};

CollectiveKernels kernels_named(const std::string& name) {
  if (name == "auto") return CollectiveKernels::kAuto;
  if (name == "one_shot") return CollectiveKernels::kOneShot;
  if (name == "two_shot") return CollectiveKernels::kTwoShot;
  check(name == "nccl", kWhere, "kernels = '", name, "': must be auto, one_shot, two_shot or nccl");
  return CollectiveKernels::kNccl;
}

CollectiveProbe::Op op_named(const std::string& name) {
  if (name == "all_reduce") return CollectiveProbe::Op::kAllReduce;
  check(name == "all_gather", kWhere, "op = '", name, "': must be all_reduce or all_gather");
  return CollectiveProbe::Op::kAllGather;
}

std::chrono::microseconds micros(double seconds, const char* name) {
  check(seconds >= 0.0 && seconds <= 3600.0, kWhere, name, " is ", seconds,
        " s; must be in [0, 3600]");
  return std::chrono::microseconds(static_cast<int64_t>(1e6 * seconds));
}

nb::ndarray<nb::numpy, float> result(const CollectiveProbeHandle& self, int rank) {
  const std::shared_ptr<CollectiveProbe> probe = self.share();
  std::vector<float> values;
  {
    nb::gil_scoped_release release;
    values = probe->result(rank);
  }
  const CollectiveProbe::Options& options = probe->options();
  return to_numpy(values, {static_cast<size_t>(options.calls), static_cast<size_t>(options.rows),
                           static_cast<size_t>(probe->out_cols())});
}

}  // namespace

void bind_collectives(nb::module_& m) {
  nb::class_<CollectiveProbeHandle>(
      m, "CollectiveProbe",
      "Collectives of a group of devices by themselves: a graph of several calls on every rank,\n"
      "each with values of its own. What collectives are tested and measured by.\n\n"
      "Args:\n"
      "    devices: One a rank, all of one kind; GPUs are distinct.\n"
      "    op: \"all_reduce\" or \"all_gather\".\n"
      "    rows: Of a call.\n"
      "    cols: Of one rank.\n"
      "    calls: Of a graph.\n"
      "    dtype: Of the values, \"float32\" or \"bfloat16\".\n"
      "    out_dtype: Of sums; None is that of the values.\n"
      "    in_place: Whether sums take the place of the values.\n"
      "    with_bias: Whether a bias is added to sums.\n"
      "    offset: Elements that arrays lie behind an aligned address.\n"
      "    batch_invariant: Whether the order of sums may depend on nothing.\n"
      "    delay: Seconds that a rank waits before a call at most, at random.\n"
      "    kernels: Of GPUs: \"auto\", \"one_shot\", \"two_shot\" or \"nccl\".\n"
      "    nccl: Names to open NCCL by, in order, for kernels=\"nccl\".\n"
      "    timeout: Seconds that a rank waits for others before the group ends.\n\n"
      "Raises:\n"
      "    InvalidArgumentError: something is not what it must be.\n"
      "    DeviceError: GPUs do not reach each other's memory, or NCCL was asked for and not "
      "found.")
      .def(
          "__init__",
          [](CollectiveProbeHandle* self, const std::vector<const DeviceHandle*>& devices,
             const std::string& op, int32_t rows, int64_t cols, int32_t calls,
             const std::string& dtype, const std::optional<std::string>& out_dtype, bool in_place,
             bool with_bias, int64_t offset, bool batch_invariant, double delay,
             const std::string& kernels, const std::vector<std::string>& nccl, double timeout) {
            CollectiveProbe::Options options;
            options.op = op_named(op);
            options.dtype = dtype_from_name(dtype);
            options.out_dtype = out_dtype ? dtype_from_name(*out_dtype) : options.dtype;
            options.rows = rows;
            options.cols = cols;
            options.calls = calls;
            options.in_place = in_place;
            options.with_bias = with_bias;
            options.offset = offset;
            options.batch_invariant = batch_invariant;
            options.delay = micros(delay, "delay");
            GroupOptions group;
            group.max_bytes = int64_t{rows} * cols * static_cast<int64_t>(sizeof(float));
            group.timeout =
                std::chrono::duration_cast<std::chrono::milliseconds>(micros(timeout, "timeout"));
            group.kernels = kernels_named(kernels);
            group.nccl = nccl;
            std::vector<std::shared_ptr<Device>> shared;
            for (const DeviceHandle* device : devices) shared.push_back(device->share());
            nb::gil_scoped_release release;
            new (self) CollectiveProbeHandle(
                std::make_shared<CollectiveProbe>(std::move(shared), group, options),
                "collective probe");
          },
          nb::arg("devices"), nb::arg("op"), nb::kw_only(), nb::arg("rows"), nb::arg("cols"),
          nb::arg("calls") = 1, nb::arg("dtype") = "bfloat16", nb::arg("out_dtype") = nb::none(),
          nb::arg("in_place") = false, nb::arg("with_bias") = false, nb::arg("offset") = 0,
          nb::arg("batch_invariant") = false, nb::arg("delay") = 0.0, nb::arg("kernels") = "auto",
          nb::arg("nccl") = std::vector<std::string>(), nb::arg("timeout") = 8.0)
      .def(
          "set_values",
          [](const CollectiveProbeHandle& self, int rank, const FloatArray& values) {
            self->set_values(rank, {values.data(), values.size()});
          },
          nb::arg("rank"), nb::arg("values"),
          "Sets a rank's values, [calls, rows, cols], rounded to the dtype.")
      .def(
          "set_bias",
          [](const CollectiveProbeHandle& self, const FloatArray& bias) {
            self->set_bias({bias.data(), bias.size()});
          },
          nb::arg("bias"), "Sets the bias of every rank, [cols].")
      .def(
          "run",
          [](const CollectiveProbeHandle& self, int32_t launches, std::optional<int> absent) {
            self->run(launches, absent.value_or(-1));
          },
          nb::arg("launches") = 1, nb::arg("absent") = nb::none(),
          nb::call_guard<nb::gil_scoped_release>(),
          "Runs the graph of every rank, `launches` times; rank `absent` does not come.\n\n"
          "Raises:\n"
          "    DeviceError: the group has ended; the message says why.")
      .def("result", &result, nb::arg("rank"), "Of a rank: [calls, rows, columns].")
      .def(
          "time",
          [](const CollectiveProbeHandle& self, int32_t repeats, int32_t launches) {
            return self->time(repeats, launches);
          },
          nb::arg("repeats"), nb::arg("launches"), nb::call_guard<nb::gil_scoped_release>(),
          "Seconds of a call on the slowest rank, in each of `repeats` runs of `launches` graphs;\n"
          "by the clock of a GPU, else of the host.")
      .def(
          "abort",
          [](const CollectiveProbeHandle& self, const std::string& reason) { self->abort(reason); },
          nb::arg("reason"), nb::call_guard<nb::gil_scoped_release>(),
          "Ends the group, as a rank that fails does.")
      .def("close", &CollectiveProbeHandle::close, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace mrv1
