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
#include "dist/stage_send_probe.h"

namespace mrv1 {
namespace {

constexpr std::string_view kWhere = "collective_probe";

struct CollectiveProbeHandle : Handle<CollectiveProbe> {
  using Handle::Handle;
};

struct StageSendProbeHandle : Handle<StageSendProbe> {
  using Handle::Handle;
};

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

std::vector<std::shared_ptr<Device>> shared(const std::vector<const DeviceHandle*>& devices) {
  std::vector<std::shared_ptr<Device>> all;
  for (const DeviceHandle* device : devices) all.push_back(device->share());
  return all;
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

nb::ndarray<nb::numpy, float> received(const StageSendProbeHandle& self, int rank) {
  const std::shared_ptr<StageSendProbe> probe = self.share();
  std::vector<float> values;
  {
    nb::gil_scoped_release release;
    values = probe->received(rank);
  }
  const StageSendProbe::Options& options = probe->options();
  return to_numpy(values, {static_cast<size_t>(options.rows), static_cast<size_t>(options.cols)});
}

void bind_stage_send(nb::module_& m) {
  nb::class_<StageSendProbeHandle>(
      m, "StageSendProbe",
      "Values on their way through the stages of a pipeline by themselves: a graph of several\n"
      "messages on every rank. A message ends when the next stage has let go of it, and the next\n"
      "one begins.\n\n"
      "Args:\n"
      "    devices: One a stage, all of one kind; GPUs are distinct.\n"
      "    rows: Of a message.\n"
      "    cols: Of a message.\n"
      "    calls: Messages of a graph.\n"
      "    dtype: \"float32\" or \"bfloat16\".\n"
      "    copies: Whether devices copy to the next one's buffer instead, which tells nobody.\n\n"
      "Raises:\n"
      "    InvalidArgumentError: something is not what it must be.\n"
      "    DeviceError: GPUs do not reach each other's memory.")
      .def(
          "__init__",
          [](StageSendProbeHandle* self, const std::vector<const DeviceHandle*>& devices,
             int32_t rows, int64_t cols, int32_t calls, const std::string& dtype, bool copies) {
            const StageSendProbe::Options options{.dtype = dtype_from_name(dtype),
                                                  .rows = rows,
                                                  .cols = cols,
                                                  .calls = calls,
                                                  .copies = copies};
            std::vector<std::shared_ptr<Device>> ranks = shared(devices);
            nb::gil_scoped_release release;
            new (self) StageSendProbeHandle(
                std::make_shared<StageSendProbe>(std::move(ranks), GroupOptions{}, options),
                "stage send probe");
          },
          nb::arg("devices"), nb::kw_only(), nb::arg("rows"), nb::arg("cols"), nb::arg("calls") = 1,
          nb::arg("dtype") = "bfloat16", nb::arg("copies") = false)
      .def(
          "set_values",
          [](const StageSendProbeHandle& self, const FloatArray& values) {
            self->set_values({values.data(), values.size()});
          },
          nb::arg("values"), "Sets what the first stage sends, [calls, rows, cols].")
      .def(
          "run", [](const StageSendProbeHandle& self, int32_t launches) { self->run(launches); },
          nb::arg("launches") = 1, nb::call_guard<nb::gil_scoped_release>(),
          "Runs the graph of every rank, `launches` times.")
      .def("received", &received, nb::arg("rank"),
           "What has come last to a stage after the first: [rows, cols].")
      .def(
          "time",
          [](const StageSendProbeHandle& self, int32_t repeats, int32_t launches) {
            return self->time(repeats, launches);
          },
          nb::arg("repeats"), nb::arg("launches"), nb::call_guard<nb::gil_scoped_release>(),
          "Seconds of a message on the slowest rank, in each of `repeats` runs of `launches`\n"
          "graphs; by the clock of a GPU, else of the host.")
      .def("close", &StageSendProbeHandle::close, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace

void bind_collectives(nb::module_& m) {
  bind_stage_send(m);
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
            group.kernels = collective_kernels_from_name(kernels);
            group.nccl = nccl;
            std::vector<std::shared_ptr<Device>> ranks = shared(devices);
            nb::gil_scoped_release release;
            new (self) CollectiveProbeHandle(
                std::make_shared<CollectiveProbe>(std::move(ranks), group, options),
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
