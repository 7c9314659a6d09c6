// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "dist/expert_probe.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bind/bind.h"

namespace mrv1 {
namespace {

struct ExpertProbeHandle : Handle<ExpertProbe> {
  using Handle::Handle;
};

ExpertProbe::Part part_named(const std::string& name) {
  if (name == "both") return ExpertProbe::Part::kBoth;
  if (name == "dispatch") return ExpertProbe::Part::kDispatch;
  check(name == "combine", "expert_probe", "part = '", name,
        "': must be both, dispatch or combine");
  return ExpertProbe::Part::kCombine;
}

nb::ndarray<nb::numpy, float> result(const ExpertProbeHandle& self, int rank) {
  const std::shared_ptr<ExpertProbe> probe = self.share();
  std::vector<float> values;
  {
    nb::gil_scoped_release release;
    values = probe->result(rank);
  }
  const ExpertProbe::Options& options = probe->options();
  return to_numpy(values,
                  {static_cast<size_t>(options.calls), static_cast<size_t>(options.tokens[rank]),
                   static_cast<size_t>(options.hidden)});
}

nb::tuple received(const ExpertProbeHandle& self, int rank) {
  const std::shared_ptr<ExpertProbe> probe = self.share();
  ExpertProbe::Received all;
  {
    nb::gil_scoped_release release;
    all = probe->received(rank);
  }
  const ExpertProbe::Options& options = probe->options();
  const auto ranks = static_cast<size_t>(probe->size());
  const auto rows = static_cast<size_t>(options.region_rows);
  const auto top_k = static_cast<size_t>(options.top_k);
  return nb::make_tuple(to_numpy(all.x, {ranks, rows, static_cast<size_t>(options.hidden)}),
                        to_numpy(all.experts, {ranks, rows, top_k}),
                        to_numpy(all.weights, {ranks, rows, top_k}), to_numpy(all.counts, {ranks}),
                        to_numpy(all.places, {static_cast<size_t>(options.tokens[rank]), ranks}));
}

}  // namespace

void bind_expert_probe(nb::module_& m) {
  nb::class_<ExpertProbeHandle>(
      m, "ExpertProbe",
      "moe_dispatch and moe_combine of a group of devices by themselves: a graph of several of\n"
      "both on every rank, each with tokens of its own. What comes back of a token is, in place "
      "of\n"
      "what experts would make of it, itself from every rank that it was sent to, or what\n"
      "`set_partial` was given.\n\n"
      "Args:\n"
      "    devices: One a rank, all of one kind; GPUs are distinct.\n"
      "    tokens: Of each rank.\n"
      "    hidden: Columns of a token.\n"
      "    top_k: Experts of a token.\n"
      "    num_experts: Of all ranks together.\n"
      "    region_rows: Tokens that there is room for of each rank.\n"
      "    calls: Of a graph.\n"
      "    dtype: Of tokens, \"float32\" or \"bfloat16\".\n"
      "    sum_dtype: Of what comes back; None is that of tokens.\n"
      "    part: \"both\", or for timing \"dispatch\" or \"combine\" alone.\n"
      "    delay: Seconds that a rank waits before a call at most, at random.\n"
      "    blocks: Thread blocks of a GPU that each takes.\n"
      "    kernels: Of GPUs: \"auto\", or \"nccl\", by which regions travel whole.\n"
      "    nccl: Names to open NCCL by, in order, for kernels=\"nccl\".\n"
      "    timeout: Seconds that a rank waits for others before the group ends.\n\n"
      "Raises:\n"
      "    InvalidArgumentError: something is not what it must be.\n"
      "    DeviceError: GPUs do not reach each other's memory, or NCCL was asked for and not "
      "found.")
      .def(
          "__init__",
          [](ExpertProbeHandle* self, const std::vector<const DeviceHandle*>& devices,
             const std::vector<int32_t>& tokens, int64_t hidden, int32_t top_k, int32_t num_experts,
             int64_t region_rows, int32_t calls, const std::string& dtype,
             const std::optional<std::string>& sum_dtype, const std::string& part, double delay,
             int32_t blocks, const std::string& kernels, const std::vector<std::string>& nccl,
             double timeout) {
            check(delay >= 0 && delay <= 1 && timeout > 0 && timeout <= 3600, "expert_probe",
                  "delay and timeout must be in [0, 1] and (0, 3600] s");
            ExpertProbe::Options options;
            options.part = part_named(part);
            options.dtype = dtype_from_name(dtype);
            options.sum_dtype = sum_dtype ? dtype_from_name(*sum_dtype) : options.dtype;
            options.tokens = tokens;
            options.region_rows = region_rows;
            options.hidden = hidden;
            options.top_k = top_k;
            options.num_experts = num_experts;
            options.calls = calls;
            options.delay = std::chrono::microseconds(static_cast<int64_t>(1e6 * delay));
            GroupOptions group;
            group.expert_blocks = blocks;
            group.kernels = collective_kernels_from_name(kernels);
            group.nccl = nccl;
            group.timeout = std::chrono::milliseconds(static_cast<int64_t>(1e3 * timeout));
            std::vector<std::shared_ptr<Device>> ranks;
            for (const DeviceHandle* device : devices) ranks.push_back(device->share());
            nb::gil_scoped_release release;
            new (self) ExpertProbeHandle(
                std::make_shared<ExpertProbe>(std::move(ranks), group, options), "expert probe");
          },
          nb::arg("devices"), nb::kw_only(), nb::arg("tokens"), nb::arg("hidden"), nb::arg("top_k"),
          nb::arg("num_experts"), nb::arg("region_rows"), nb::arg("calls") = 1,
          nb::arg("dtype") = "bfloat16", nb::arg("sum_dtype") = nb::none(),
          nb::arg("part") = "both", nb::arg("delay") = 0.0,
          nb::arg("blocks") = GroupOptions{}.expert_blocks, nb::arg("kernels") = "auto",
          nb::arg("nccl") = std::vector<std::string>(), nb::arg("timeout") = 8.0)
      .def(
          "set_tokens",
          [](const ExpertProbeHandle& self, int rank, const FloatArray& values,
             const IntArray& experts, const FloatArray& weights) {
            self->set_tokens(rank, {values.data(), values.size()}, {experts.data(), experts.size()},
                             {weights.data(), weights.size()});
          },
          nb::arg("rank"), nb::arg("values"), nb::arg("experts"), nb::arg("weights"),
          "Sets a rank's tokens, [calls, tokens, hidden], rounded to the dtype, and their experts\n"
          "and weights, [calls, tokens, top_k]; an expert may be -1.")
      .def(
          "set_partial",
          [](const ExpertProbeHandle& self, int rank, const FloatArray& values) {
            self->set_partial(rank, {values.data(), values.size()});
          },
          nb::arg("rank"), nb::arg("values"),
          "Sets what a rank has computed of the tokens of all, [ranks, region_rows, hidden],\n"
          "rounded to sum_dtype; before the first run.")
      .def(
          "run",
          [](const ExpertProbeHandle& self, int32_t launches, std::optional<int> absent) {
            self->run(launches, absent.value_or(-1));
          },
          nb::arg("launches") = 1, nb::arg("absent") = nb::none(),
          nb::call_guard<nb::gil_scoped_release>(),
          "Runs the graph of every rank, `launches` times; rank `absent` does not come.\n\n"
          "Raises:\n"
          "    DeviceError: the group has ended; the message says why.")
      .def("result", &result, nb::arg("rank"), "Of a rank: [calls, tokens, hidden].")
      .def("received", &received, nb::arg("rank"),
           nb::sig("def received(self, rank: int) -> tuple[NDArray[numpy.float32], "
                   "NDArray[numpy.int32], NDArray[numpy.float32], NDArray[numpy.int32], "
                   "NDArray[numpy.int32]]"),
           "Of a rank's last call: tokens [ranks, region_rows, hidden], experts and weights\n"
           "[ranks, region_rows, top_k] and counts [ranks] that have come to it, and the places\n"
           "[tokens, ranks] of its own tokens at others, -1 where they did not go.")
      .def(
          "time",
          [](const ExpertProbeHandle& self, int32_t repeats, int32_t launches) {
            return self->time(repeats, launches);
          },
          nb::arg("repeats"), nb::arg("launches"), nb::call_guard<nb::gil_scoped_release>(),
          "Seconds of a call on the slowest rank, in each of `repeats` runs of `launches` graphs;\n"
          "by the clock of a GPU, else of the host.")
      .def(
          "abort",
          [](const ExpertProbeHandle& self, const std::string& reason) { self->abort(reason); },
          nb::arg("reason"), nb::call_guard<nb::gil_scoped_release>(),
          "Ends the group, as a rank that fails does.")
      .def("close", &ExpertProbeHandle::close, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace mrv1
