// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/bind.h"
#include "runner/stage_probe.h"

namespace mrv1 {
namespace {

using Entry = std::tuple<int32_t, int32_t, int32_t, int32_t>;
using NewRowTuple = std::tuple<int32_t, int32_t, std::vector<int32_t>, int32_t, int32_t>;
using StepTuple = std::tuple<uint64_t, std::vector<std::pair<int32_t, int32_t>>,
                             std::vector<NewRowTuple>, std::vector<Entry>>;

struct StageProbeHandle : Handle<StageProbe> {
  using Handle::Handle;
};

StageProbe::ProbeStep step_of(const StepTuple& tuple) {
  const auto& [adopt_through, freed, added, entries] = tuple;
  StageProbe::ProbeStep step;
  step.adopt_through = adopt_through;
  for (const auto& [row, generation] : freed) step.freed.push_back({row, generation});
  for (const auto& [row, generation, tokens, max_total_len, num_drafts] : added) {
    step.added.push_back({row, generation, tokens, max_total_len, num_drafts});
  }
  for (const auto& [row, generation, num_tokens, samples] : entries) {
    step.entries.push_back({row, generation, num_tokens, samples});
  }
  return step;
}

StepTuple tuple_of(const StageProbe::ProbeStep& step) {
  StepTuple tuple;
  auto& [adopt_through, freed, added, entries] = tuple;
  adopt_through = step.adopt_through;
  for (const FreeRow& row : step.freed) freed.emplace_back(row.row, row.generation);
  for (const StageProbe::NewProbeRow& row : step.added) {
    added.emplace_back(row.row, row.generation, row.tokens, row.max_total_len, row.num_drafts);
  }
  for (const BatchEntry& entry : step.entries) {
    entries.emplace_back(entry.row, entry.generation, entry.num_tokens, entry.samples);
  }
  return tuple;
}

nb::dict entry_dict(const OutputEntry& entry, nb::list tokens) {
  nb::dict out;
  out["row"] = entry.row;
  out["generation"] = entry.generation;
  out["num_computed"] = entry.num_computed;
  out["total_len"] = entry.total_len;
  out["num_drafts"] = static_cast<int>(entry.num_drafts);
  out["num_accepted"] = static_cast<int>(entry.num_accepted);
  out["masked"] = entry.masked != 0;
  out["finish_reason"] = static_cast<int>(entry.finish_reason);
  out["tokens"] = tokens;
  return out;
}

nb::list outputs(const StageProbeHandle& self, int rank) {
  const std::shared_ptr<StageProbe> probe = self.share();
  nb::list steps;
  for (const StageProbe::Output& output : probe->outputs(rank)) {
    nb::list entries;
    const int32_t* tokens = output.tokens.data();
    for (const OutputEntry& entry : output.entries) {
      nb::list news;
      for (int32_t i = 0; i < entry.num_tokens; ++i) news.append(tokens[i]);
      entries.append(entry_dict(entry, news));
      tokens += 1 + probe->options().num_drafts;
    }
    nb::dict step;
    step["step"] = output.step;
    step["waited_ns"] = output.waited_ns;
    step["entries"] = entries;
    steps.append(step);
  }
  return steps;
}

nb::dict row(const StageProbeHandle& self, int rank, int32_t row) {
  const std::shared_ptr<StageProbe> probe = self.share();
  StageProbe::RowView view;
  {
    nb::gil_scoped_release release;
    view = probe->row(rank, row);
  }
  nb::dict out;
  out["generation"] = view.row.generation;
  out["phase"] = static_cast<int>(view.row.phase);
  out["num_computed"] = view.row.num_computed;
  out["last_token"] = view.row.last_token;
  out["finish_reason"] = static_cast<int>(view.row.finish_reason);
  out["tokens"] = view.tokens;
  return out;
}

std::chrono::microseconds micros(double seconds) {
  return std::chrono::microseconds(static_cast<int64_t>(1e6 * seconds));
}

}  // namespace

void bind_stage_probe(nb::module_& m) {
  nb::class_<StageProbeHandle>(
      m, "StageProbe",
      "Stages of a pipeline around the least model that tells values apart: x_v = table_v[token],\n"
      "each layer adds its shift_v, and the logits are the sum of all values that are float32 and\n"
      "have vocab_size columns. Layers are shared out evenly among the stages; tokens are drawn\n"
      "greedily. What the ops between stages are tested by.\n\n"
      "A step is a tuple: the newest step that the stages before the last must have adopted; "
      "freed\n"
      "rows (row, generation); new rows (row, generation, prompt, max_total_len, num_drafts); and\n"
      "the batch's entries (row, generation, num_tokens, samples).\n\n"
      "Args:\n"
      "    devices: One a rank, in the order of stages; GPUs are distinct.\n"
      "    num_stages: Of as many ranks each, which do the same.\n"
      "    num_layers: Of the model, at least one a stage.\n"
      "    values: Columns and dtype (\"float32\" or \"bfloat16\") of each value that crosses.\n"
      "    num_rows: As many may be in a batch.\n"
      "    max_tokens: Of a batch.\n"
      "    max_model_len: Of a row, drafts included.\n"
      "    num_drafts: Of a row at most.\n"
      "    num_slots: Steps that are on their way at most.\n"
      "    graphs: Whether steps with a batch are replays of one graph.\n"
      "    delay: Seconds that a rank waits at each place where others wait for it, at random.\n"
      "    slow_rank: The rank that does; None is all.\n"
      "    timeout: Seconds that a rank waits for others before all end.\n"
      "    seed: Of the model's numbers.\n\n"
      "Raises:\n"
      "    InvalidArgumentError: something is not what it must be.")
      .def(
          "__init__",
          [](StageProbeHandle* self, const std::vector<const DeviceHandle*>& devices,
             int32_t num_stages, int32_t num_layers, int32_t vocab_size,
             const std::vector<std::pair<int64_t, std::string>>& values, int32_t num_rows,
             int32_t max_tokens, int32_t max_model_len, int32_t num_drafts, int32_t num_slots,
             bool graphs, double delay, std::optional<int> slow_rank, double timeout,
             uint64_t seed) {
            StageProbe::Options options;
            options.num_stages = num_stages;
            options.num_layers = num_layers;
            options.vocab_size = vocab_size;
            options.num_rows = num_rows;
            options.max_tokens = max_tokens;
            options.max_model_len = max_model_len;
            options.num_drafts = num_drafts;
            options.num_slots = num_slots;
            options.graphs = graphs;
            options.delay = micros(delay);
            options.slow_rank = slow_rank.value_or(-1);
            for (const auto& [cols, dtype] : values) {
              options.values.push_back({cols, dtype_from_name(dtype)});
            }
            GroupOptions group;
            group.timeout = std::chrono::duration_cast<std::chrono::milliseconds>(micros(timeout));
            std::vector<std::shared_ptr<Device>> shared;
            for (const DeviceHandle* device : devices) shared.push_back(device->share());
            nb::gil_scoped_release release;
            new (self) StageProbeHandle(
                std::make_shared<StageProbe>(std::move(shared), group, options, seed),
                "stage probe");
          },
          nb::arg("devices"), nb::kw_only(), nb::arg("num_stages"), nb::arg("num_layers"),
          nb::arg("vocab_size"), nb::arg("values"), nb::arg("num_rows"), nb::arg("max_tokens"),
          nb::arg("max_model_len"), nb::arg("num_drafts") = 0, nb::arg("num_slots") = 4,
          nb::arg("graphs") = false, nb::arg("delay") = 0.0, nb::arg("slow_rank") = nb::none(),
          nb::arg("timeout") = 8.0, nb::arg("seed") = 0)
      .def_prop_ro(
          "next_step", [](const StageProbeHandle& self) { return self->next_step(); },
          "The step that run() begins with.")
      .def(
          "table",
          [](const StageProbeHandle& self, int32_t value) {
            const std::vector<float> values = self->table(value);
            const auto rows = static_cast<size_t>(self->options().vocab_size);
            return to_numpy(values, {rows, values.size() / rows});
          },
          nb::arg("value"), "Of a value: [vocab_size, cols], as it is in its dtype.")
      .def(
          "shift",
          [](const StageProbeHandle& self, int32_t layer, int32_t value) {
            const std::vector<float> values = self->shift(layer, value);
            return to_numpy(values, {values.size()});
          },
          nb::arg("layer"), nb::arg("value"), "What a layer adds to a value: [cols].")
      .def(
          "random_steps",
          [](const StageProbeHandle& self, int32_t count, uint64_t seed) {
            std::vector<StepTuple> steps;
            for (const StageProbe::ProbeStep& step : self->random_steps(count, seed)) {
              steps.push_back(tuple_of(step));
            }
            return steps;
          },
          nb::arg("count"), nb::arg("seed"), "Random lives of rows, for the next run().")
      .def(
          "run",
          [](const StageProbeHandle& self, const std::vector<StepTuple>& steps,
             std::optional<int> absent, uint64_t absent_from) {
            std::vector<StageProbe::ProbeStep> parsed;
            for (const StepTuple& step : steps) parsed.push_back(step_of(step));
            const std::shared_ptr<StageProbe> probe = self.share();
            nb::gil_scoped_release release;
            probe->run(parsed, absent.value_or(-1), absent_from);
          },
          nb::arg("steps"), nb::arg("absent") = nb::none(), nb::arg("absent_from") = 0,
          "Runs steps; rank `absent` leaves out those from number `absent_from` on.\n\n"
          "Raises:\n"
          "    DeviceError: the group has ended; the message says why.")
      .def("outputs", &outputs, nb::arg("rank"),
           nb::sig("def outputs(self, rank: int) -> list[dict[str, typing.Any]]"),
           "What a rank has put out in each step of the last run.")
      .def("row", &row, nb::arg("rank"), nb::arg("row"),
           nb::sig("def row(self, rank: int, row: int) -> dict[str, typing.Any]"),
           "A row as a rank has it.")
      .def(
          "received",
          [](const StageProbeHandle& self, int rank, int32_t value) {
            const std::vector<float> values = self->received(rank, value);
            const auto tokens = static_cast<size_t>(self->options().max_tokens);
            return to_numpy(values, {tokens, values.size() / tokens});
          },
          nb::arg("rank"), nb::arg("value"),
          "A value as it has last crossed to a rank: [max_tokens, cols].")
      .def(
          "abort",
          [](const StageProbeHandle& self, const std::string& reason) { self->abort(reason); },
          nb::arg("reason"), nb::call_guard<nb::gil_scoped_release>(),
          "Ends the group, as a rank that fails does.")
      .def("close", &StageProbeHandle::close, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace mrv1
