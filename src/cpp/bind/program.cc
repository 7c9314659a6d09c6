// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bind/bind.h"
#include "program/plan.h"
#include "program/stage.h"

namespace mrv1 {
namespace {

// Rows of a tensor and the first of a segment's, the same of columns.
using SliceTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;

std::vector<std::tuple<std::string, int64_t, std::string>> crossing_tuples(
    const CrossingValues& values) {
  std::vector<std::tuple<std::string, int64_t, std::string>> tuples;
  for (const StageValue& value : values.schema) {
    tuples.emplace_back(value.name, value.cols, dtype_name(value.dtype));
  }
  return tuples;
}

}  // namespace

void bind_program(nb::module_& m) {
  nb::class_<Program>(
      m, "Program",
      "A model's forward pass: a flat list of native ops over values and weights.\n\n"
      "Values and weights are named by the index their maker returns. Building\n"
      "methods raise InvalidArgumentError naming the op when shapes or dtypes do\n"
      "not fit. mrv1.builder wraps this class for wiring models.")
      .def(
          "__init__",
          [](Program* self, const std::string& dtype) {
            new (self) Program(dtype_from_name(dtype));
          },
          nb::arg("dtype"))
      .def(
          "weight",
          [](Program& self, const std::string& name, bool is_vector, int64_t cols,
             const std::vector<std::pair<std::string, int64_t>>& segments, float offset,
             const std::vector<SliceTuple>& slices, int64_t whole_rows, int64_t matrices,
             bool nvfp4) {
            WeightSpec spec;
            if (nvfp4) spec.format = WeightFormat::kNvfp4;
            spec.name = name;
            spec.matrices = matrices;
            spec.offset = offset;
            spec.whole_rows = whole_rows;
            spec.kind = is_vector ? WeightKind::kVector : WeightKind::kMatrix;
            spec.cols = cols;
            for (const auto& [tensor, rows] : segments) {
              check(rows > 0 && rows <= kMaxExtent, "weight", "'", name, "': '", tensor,
                    "' must have 1 to 2^31 rows, not ", rows);
              spec.segments.push_back({tensor, spec.rows, rows});
              spec.rows += rows;
            }
            check(slices.empty() || slices.size() == segments.size(), "weight", "'", name, "' has ",
                  slices.size(), " slices, must have none or one for each of ", segments.size(),
                  " segments");
            for (size_t i = 0; i < slices.size(); ++i) {
              const auto& [tensor_rows, first_row, tensor_cols, first_col] = slices[i];
              check(tensor_rows > 0 && tensor_cols > 0, "weight", "a slice of '", name,
                    "' is of an empty tensor");
              spec.segments[i].slice = {tensor_rows, tensor_cols, first_row, first_col};
            }
            return self.weight(std::move(spec));
          },
          nb::arg("name"), nb::arg("is_vector"), nb::arg("cols"), nb::arg("segments"),
          nb::arg("offset") = 0.0f, nb::arg("slices") = std::vector<SliceTuple>(),
          nb::arg("whole_rows") = 0, nb::arg("matrices") = 1, nb::arg("nvfp4") = false,
          nb::sig("def weight(self, name: str, is_vector: bool, cols: int, "
                  "segments: Sequence[tuple[str, int]], offset: float = 0.0, "
                  "slices: Sequence[tuple[int, int, int, int]] = (), whole_rows: int = 0, "
                  "matrices: int = 1, nvfp4: bool = False) -> int"),
          "Declares a weight [sum of segment rows, cols]; segments are (tensor name, rows).\n"
          "`offset` is added to the values of a vector when they are loaded. `slices` say for "
          "each\n"
          "segment which part of its tensor it is: (rows of the tensor, first row, columns of the\n"
          "tensor, first column); without them segments are whole tensors. `whole_rows`: of all\n"
          "ranks together, where they share it out by rows. `matrices`: the rows are those of as\n"
          "many equal matrices. `nvfp4`: a matrix whose segments are each stored as codes, block\n"
          "scales, a global scale and a scale of activations.")
      .def(
          "input",
          [](Program& self, const std::string& name, int64_t cols, bool logits_rows,
             const std::optional<std::string>& dtype) {
            return self.input(name, cols, logits_rows ? RowSpace::kLogits : RowSpace::kTokens,
                              dtype ? dtype_from_name(*dtype) : self.dtype());
          },
          nb::arg("name"), nb::arg("cols"), nb::arg("logits_rows") = false,
          nb::arg("dtype") = nb::none())
      .def("output", &Program::output, nb::arg("value"))
      .def("embedding", &Program::embedding, nb::arg("table"), nb::arg("scale") = 1.0f,
           nb::arg("first_row") = 0,
           "`first_row` is the token id of the table's first row; ids without a row give zeros.")
      .def("rms_norm", &Program::rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"))
      .def("add", &Program::add, nb::arg("a"), nb::arg("b"))
      .def("linear", &Program::linear, nb::arg("x"), nb::arg("weight"), nb::arg("bias") = -1,
           nb::arg("residual") = -1, nb::arg("row_parallel") = false, nb::arg("wide") = false,
           "With `wide` the result stays in float32.")
      .def("all_reduce", &Program::all_reduce, nb::arg("x"), nb::arg("bias") = -1,
           "The sum over the ranks (+ bias), in the program's dtype.")
      .def(
          "silu_mul", [](Program& self, int32_t x) { return self.gated_mul(x, Activation::kSilu); },
          nb::arg("x"))
      .def(
          "gelu_mul",
          [](Program& self, int32_t x) { return self.gated_mul(x, Activation::kGeluTanh); },
          nb::arg("x"))
      .def(
          "moe_route",
          [](Program& self, int32_t logits, int32_t top_k, int32_t bias, const std::string& scores,
             bool renormalize, float min_sum, float scale) {
            return self.moe_route(
                logits, bias,
                {top_k, router_scores_from_name(scores, "moe_route"), renormalize, min_sum, scale});
          },
          nb::arg("logits"), nb::kw_only(), nb::arg("top_k"), nb::arg("bias") = -1,
          nb::arg("scores") = "softmax", nb::arg("renormalize") = true, nb::arg("min_sum") = 0.0f,
          nb::arg("scale") = 1.0f,
          "The experts of each token, int32, and their weights, float32: [tokens, top_k].")
      .def(
          "moe_experts",
          [](Program& self, int32_t x, int32_t experts, int32_t weights, int32_t gate_up,
             int32_t down, const std::string& activation, int32_t first_expert, int32_t num_experts,
             bool row_parallel, bool wide) {
            return self.moe_experts(x, experts, weights, gate_up, down,
                                    {activation_from_name(activation, "moe_experts"), first_expert,
                                     num_experts, row_parallel, wide});
          },
          nb::arg("x"), nb::arg("experts"), nb::arg("weights"), nb::arg("gate_up"), nb::arg("down"),
          nb::kw_only(), nb::arg("activation") = "silu", nb::arg("first_expert") = 0,
          nb::arg("num_experts") = 0, nb::arg("row_parallel") = false, nb::arg("wide") = false,
          "The weighted sum of what the tokens' experts make of x, [tokens, cols]. `num_experts`:\n"
          "of all ranks, 0 for those of gate_up and the ones before them.")
      .def(
          "moe_exchange",
          [](Program& self, int32_t x, int32_t experts, int32_t weights, int32_t gate_up,
             int32_t down, const std::string& activation, int32_t first_expert, bool wide,
             int32_t num_experts, int32_t ranks) {
            return self.moe_exchange(x, experts, weights, gate_up, down,
                                     {activation_from_name(activation, "moe_exchange"),
                                      first_expert, num_experts, false, wide},
                                     {num_experts, ranks});
          },
          nb::arg("x"), nb::arg("experts"), nb::arg("weights"), nb::arg("gate_up"), nb::arg("down"),
          nb::kw_only(), nb::arg("activation") = "silu", nb::arg("first_expert") = 0,
          nb::arg("wide") = false, nb::arg("num_experts"), nb::arg("ranks"),
          "As moe_experts, over ranks with tokens of their own: moe_dispatch sends each token to "
          "the\n"
          "ranks that have its experts, moe_combine brings the sums back and adds them, in "
          "float32\n"
          "with `wide`.")
      .def(
          "rope_table",
          [](Program& self, std::vector<float> inv_freq, float factor, bool interleaved) {
            return self.rope_table({std::move(inv_freq), factor, interleaved});
          },
          nb::arg("inv_freq"), nb::arg("factor") = 1.0f, nb::arg("interleaved") = false)
      .def(
          "attention",
          [](Program& self, int32_t qkv, int32_t num_heads, int32_t num_kv_heads, int32_t head_dim,
             int32_t kv_layer, float scale, int32_t window, int32_t rope, int32_t q_norm,
             int32_t k_norm, float eps, float softcap) {
            Program::AttentionSpec spec;
            spec.heads = {num_heads, num_kv_heads, head_dim};
            spec.scale = scale;
            spec.window = window;
            spec.kv_layer = kv_layer;
            spec.rope = rope;
            spec.q_norm = q_norm;
            spec.k_norm = k_norm;
            spec.eps = eps;
            spec.softcap = softcap;
            return self.attention(qkv, spec);
          },
          nb::arg("qkv"), nb::kw_only(), nb::arg("num_heads"), nb::arg("num_kv_heads"),
          nb::arg("head_dim"), nb::arg("kv_layer"), nb::arg("scale"), nb::arg("window") = 0,
          nb::arg("rope") = -1, nb::arg("q_norm") = -1, nb::arg("k_norm") = -1,
          nb::arg("eps") = 0.0f, nb::arg("softcap") = 0.0f)
      .def("gather_rows", &Program::gather_rows, nb::arg("x"))
      .def("logits", &Program::logits, nb::arg("x"), nb::arg("weight"), nb::arg("softcap") = 0.0f,
           nb::arg("ranks") = 1, "With `ranks` the weight is a rank's part of the head.")
      .def("begin_layer", &Program::begin_layer, nb::arg("layer"))
      .def("end_layer", &Program::end_layer)
      .def("fuse", &Program::fuse,
           "Runs each fusion pattern once over the list; returns (pattern, how many it replaced).")
      .def("stage", &Program::stage, nb::arg("first"), nb::arg("last"),
           "The program of layers [first, last), a stage of a pipeline. Comes before fuse().")
      .def("dump", &Program::dump, nb::arg("format") = "text",
           "The op list as text, or as a Graphviz picture with format=\"dot\".")
      .def_prop_ro("dtype",
                   [](const Program& self) { return std::string(dtype_name(self.dtype())); })
      .def_prop_ro("op_names",
                   [](const Program& self) {
                     std::vector<std::string> names;
                     for (const Op& op : self.ops()) names.emplace_back(op_name(op));
                     return names;
                   })
      .def_prop_ro(
          "weights",
          [](const Program& self) {
            std::vector<std::tuple<std::string, bool, int64_t,
                                   std::vector<std::pair<std::string, int64_t>>>>
                all;
            for (const WeightSpec& spec : self.weights()) {
              std::vector<std::pair<std::string, int64_t>> segments;
              for (const WeightSegment& segment : spec.segments) {
                segments.emplace_back(segment.tensor, segment.rows);
              }
              all.emplace_back(spec.name, spec.kind == WeightKind::kVector, spec.cols,
                               std::move(segments));
            }
            return all;
          },
          "(name, is_vector, cols, [(tensor, rows)]) of each weight.")
      .def_prop_ro(
          "weight_matrices",
          [](const Program& self) {
            std::vector<int64_t> counts;
            for (const WeightSpec& spec : self.weights()) counts.push_back(spec.matrices);
            return counts;
          },
          "How many equal matrices the rows of each weight are.")
      .def("is_route_bias", &Program::is_route_bias, nb::arg("weight"),
           "Whether the weight corrects the choice of experts: random models have zeros there.")
      .def("is_expert_weight", &Program::is_expert_weight, nb::arg("weight"),
           "Whether experts multiply by the weight, however many there are.")
      .def_prop_ro(
          "weight_is_nvfp4",
          [](const Program& self) {
            std::vector<bool> all;
            for (const WeightSpec& spec : self.weights()) {
              all.push_back(spec.format == WeightFormat::kNvfp4);
            }
            return all;
          },
          "Whether each weight is stored in NVFP4.")
      .def_prop_ro(
          "weight_bytes",
          [](const Program& self) {
            std::vector<int64_t> all;
            for (const WeightSpec& spec : self.weights()) {
              all.push_back(weight_bytes(spec, self.dtype()));
            }
            return all;
          },
          "Bytes of each weight, scales included.")
      .def_prop_ro(
          "weight_slices",
          [](const Program& self) {
            std::vector<std::vector<SliceTuple>> all;
            for (const WeightSpec& spec : self.weights()) {
              std::vector<SliceTuple>& slices = all.emplace_back();
              for (const WeightSegment& segment : spec.segments) {
                const TensorSlice& slice = segment.slice;
                slices.emplace_back(slice.rows, slice.first_row, slice.cols, slice.first_col);
              }
            }
            return all;
          },
          "(rows of the tensor, first row, columns of the tensor, first column) of each segment "
          "of\n"
          "each weight.")
      .def_prop_ro(
          "kv_layout",
          [](const Program& self) {
            const KvLayout layout = self.kv_layout();
            std::vector<int32_t> windows;
            for (const KvGroup& group : layout.groups) windows.push_back(group.window);
            std::vector<std::pair<int32_t, int32_t>> layers;
            for (const KvPlace& place : layout.layers) layers.emplace_back(place.group, place.slot);
            return nb::make_tuple(windows, layers);
          },
          nb::sig("def kv_layout(self) -> tuple[list[int], list[tuple[int, int]]]"),
          "Window of each KV group (0: none), and (group, slot) of each kv layer.")
      .def_prop_ro("num_layers", &Program::num_layers)
      .def_prop_ro(
          "layer_costs", [](const Program& self) { return layer_costs(self); },
          "Bytes of weights that a step reads in each layer, in the last one with the output head.")
      .def_prop_ro(
          "received", [](const Program& self) { return crossing_tuples(self.received()); },
          "(key, columns, dtype) of the values that a stage takes from the one before.")
      .def_prop_ro(
          "sent", [](const Program& self) { return crossing_tuples(self.sent()); },
          "(key, columns, dtype) of the values that a stage gives to the next.")
      .def_prop_ro(
          "cuts",
          [](const Program& self) {
            std::vector<std::pair<std::string, int32_t>> cuts;
            for (const Cut& cut : self.cuts()) {
              cuts.emplace_back(cut.kind == CutKind::kAttention ? "attention"
                                : cut.kind == CutKind::kStage   ? "stage"
                                                                : "collective",
                                cut.op);
            }
            return cuts;
          },
          "(kind, op index) of each place where the list can be cut.")
      .def(
          "plan",
          [](const Program& self, int64_t max_tokens, int64_t max_logits) {
            const Plan plan = plan_buffers(self, {max_tokens, max_logits});
            return nb::make_tuple(plan.arena_bytes, plan.offsets);
          },
          nb::arg("max_tokens"), nb::arg("max_logits"),
          nb::sig("def plan(self, max_tokens: int, max_logits: int) -> tuple[int, list[int]]"),
          "Bytes of the activation arena at these limits, and each value's offset in it.")
      .def(
          "live_ranges",
          [](const Program& self, int64_t max_tokens, int64_t max_logits) {
            std::vector<std::tuple<int32_t, int32_t, int64_t>> ranges(self.values().size(),
                                                                      {-1, -1, 0});
            for (size_t id = 0; id < self.values().size(); ++id) {
              std::get<2>(ranges[id]) = value_bytes(self.values()[id], {max_tokens, max_logits});
            }
            for (int32_t i = 0; i < static_cast<int32_t>(self.ops().size()); ++i) {
              for (int32_t id : self.ops()[i].inputs) std::get<1>(ranges[id]) = i;
              for (int32_t id : self.ops()[i].outputs) std::get<0>(ranges[id]) = i;
            }
            return ranges;
          },
          nb::arg("max_tokens"), nb::arg("max_logits"),
          "(op that writes it, last op that reads it, bytes) of each value; -1 for none.");

  m.def(
      "balance_layers",
      [](const std::vector<int64_t>& costs, int32_t num_stages) {
        return balance_layers(costs, num_stages);
      },
      nb::arg("costs"), nb::arg("num_stages"),
      "How many of the layers that cost so much each stage of a pipeline takes, so that the stage\n"
      "that costs most costs as little as can be.");
}

}  // namespace mrv1
