// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/model_runner.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "bind/bind.h"
#include "bind/logprobs.h"
#include "bind/runner_arrays.h"
#include "bind/runner_handle.h"
#include "io/mapped_file.h"
#include "runner/data_ranks.h"
#include "runner/rank_followers.h"
#include "state/infer_param_view.h"

namespace mrv1 {
namespace {

nb::dict plan_dict(const MemoryPlan& plan) {
  nb::dict dict;
  dict["weights"] = plan.weights;
  dict["experts"] = plan.experts;
  dict["activations"] = plan.activations;
  dict["two_batch"] = plan.two_batch;
  dict["state"] = plan.state;
  dict["per_block"] = plan.per_block;
  return dict;
}

std::vector<std::pair<int32_t, int32_t>> size_pairs(const std::vector<CaptureSize>& sizes) {
  std::vector<std::pair<int32_t, int32_t>> pairs;
  for (const CaptureSize& size : sizes) pairs.emplace_back(size.requests, size.tokens_per_request);
  return pairs;
}

nb::dict ints_dict(const std::vector<std::pair<std::string, std::vector<int32_t>>>& all) {
  nb::dict dict;
  for (const auto& [name, values] : all) {
    dict[name.c_str()] = to_numpy(values, {values.size()});
  }
  return dict;
}

// The FastDeploy view of lengths given by hand, computed by the device's kernel.
nb::dict infer_param_view(const DeviceHandle& handle, IntArray encoder, IntArray decoder,
                          IntArray this_time, IntArray block_tables, int32_t block_size,
                          int32_t query_per_decode, int32_t max_tokens) {
  const std::shared_ptr<Device> shared = handle.share();
  Device& device = *shared;
  const char* where = "infer_param_view";
  const int64_t rows = static_cast<int64_t>(encoder.size());
  check(rows > 0 && decoder.size() == encoder.size() && this_time.size() == encoder.size(), where,
        "encoder, decoder and this_time need one length a row");
  check(block_tables.ndim() == 2 && static_cast<int64_t>(block_tables.shape(0)) == rows, where,
        "block_tables must be [rows, blocks]");
  check(block_size > 0 && query_per_decode > 0 && max_tokens > 0, where, "sizes must be positive");
  const int64_t blocks = static_cast<int64_t>(block_tables.shape(1));
  int64_t new_tokens = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t fresh = encoder.data()[row], cached = decoder.data()[row];
    const int64_t query = this_time.data()[row];
    check(fresh >= 0 && cached >= 0 && query >= 0, where, "row ", row, " has a negative length");
    check(query <= query_per_decode || fresh > 0, where, "row ", row, " decodes ", query,
          " tokens, at most ", query_per_decode, " are allowed");
    check(cached + std::max(fresh, query) <= blocks * block_size, where, "row ", row,
          " is longer than its block table");
    new_tokens += fresh;
  }
  check(new_tokens <= max_tokens, where, new_tokens, " prefill tokens exceed max_tokens ",
        max_tokens);

  std::vector<Buffer> buffers;
  const auto ints = [&](int64_t count) {
    buffers.push_back(device.allocate(static_cast<size_t>(count) * 4, where));
    return static_cast<int32_t*>(buffers.back().data());
  };
  const auto copied = [&](const IntArray& array) {
    int32_t* data = ints(static_cast<int64_t>(array.size()));
    device.copy_in(data, array.data(), array.size() * 4);
    return data;
  };
  const InferParamInputs in{copied(encoder),
                            copied(decoder),
                            copied(this_time),
                            copied(block_tables),
                            static_cast<int32_t>(rows),
                            static_cast<int32_t>(blocks),
                            block_size,
                            query_per_decode};
  InferParamView view{};
  view.max_tokens = max_tokens;
  struct Field {
    const char* name;
    int32_t** data;
    int64_t count;
  };
  const Field fields[] = {
      {"encoder_batch_map", &view.encoder_batch_map, rows},
      {"decoder_batch_map", &view.decoder_batch_map, rows},
      {"encoder_batch_idx", &view.encoder_batch_idx, rows},
      {"decoder_batch_idx", &view.decoder_batch_idx, rows},
      {"encoder_seq_lod", &view.encoder_seq_lod, rows + 1},
      {"decoder_seq_lod", &view.decoder_seq_lod, rows + 1},
      {"encoder_kv_lod", &view.encoder_kv_lod, rows + 1},
      {"prefix_len", &view.prefix_len, rows},
      {"decoder_context_len", &view.decoder_context_len, rows},
      {"decoder_context_len_cache", &view.decoder_context_len_cache, rows},
      {"prefix_block_tables", &view.prefix_block_tables, rows * blocks},
      {"slot_mapping_enc", &view.slot_mapping_enc, max_tokens},
      {"slot_mapping_dec", &view.slot_mapping_dec, rows * query_per_decode},
      {"len_info", &view.len_info, 7},
  };
  for (const Field& field : fields) *field.data = ints(field.count);
  run_on_stream(device, [&] {
    StepContext ctx;
    ctx.device = &device;
    ctx.pool = device.pool();
    ctx.stream = device.stream();
    device.kernels().infer_param_view(in, view, ctx);
  });
  nb::dict dict;
  for (const Field& field : fields) {
    std::vector<int32_t> values(static_cast<size_t>(field.count));
    device.copy_out(values.data(), *field.data, values.size() * 4);
    dict[field.name] = to_numpy(values, {values.size()});
  }
  return dict;
}

using MaskArray = nb::ndarray<const uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void set_masks(const RunnerHandle& self, const MaskArray& masks) {
  const std::shared_ptr<ModelRunner> runner = self.share();
  const size_t count = runner->masked_items().size();
  const auto words = static_cast<size_t>(runner->masks().words());
  check(runner->cut_step() != 0, "set_masks", "no step waits for masks");
  check(masks.shape(0) == count && masks.shape(1) == words, "set_masks", "masks is [",
        masks.shape(0), ", ", masks.shape(1), "], not [", count, ", ", words, "]");
  runner->wait_masks();
  for (size_t i = 0; i < count; ++i) {
    std::copy_n(masks.data() + i * words, words,
                runner->masks().mask(runner->masked_row(i)).data());
  }
  runner->finish_step();
}

}  // namespace

void bind_runner(nb::module_& m) {
  nb::class_<MappedFile>(m, "MappedFile", "A file mapped read-only.")
      .def(nb::init<const std::string&>(), nb::arg("path"))
      .def_prop_ro("size", &MappedFile::size);

  nb::enum_<TwoBatchMode>(
      m, "TwoBatchMode",
      "Whether steps run as two halves, each of which computes while the other meets other ranks.")
      .value("OFF", TwoBatchMode::kOff)
      .value("AUTO", TwoBatchMode::kAuto)
      .value("ON", TwoBatchMode::kOn);
  nb::enum_<StepMode>(m, "StepMode", "How a step reaches the device.")
      .value("EAGER", StepMode::kEager)
      .value("PIECEWISE", StepMode::kPiecewise)
      .value("FULL", StepMode::kFull);
  m.def(
      "capture_sizes",
      [](const std::vector<int32_t>& requests, int32_t num_speculative_tokens, int32_t max_tokens) {
        return size_pairs(GraphLadder::full_sizes(requests, num_speculative_tokens, max_tokens));
      },
      nb::arg("requests"), nb::arg("num_speculative_tokens") = 0, nb::arg("max_tokens") = INT32_MAX,
      "Sizes of whole steps, (requests, tokens per request), for these numbers of decoding "
      "requests:\n"
      "of one token each, and of 1 + num_speculative_tokens where that makes a difference and\n"
      "max_tokens allows it.");
  m.def("default_capture_requests", &GraphLadder::default_requests, nb::arg("max_requests"),
        "Numbers of requests that leave little of a step unused.");
  m.def("default_piecewise_sizes", &GraphLadder::default_piecewise, nb::arg("max_tokens"),
        "Numbers of tokens of steps in pieces, by the same rule.");

  nb::class_<RunnerConfig>(m, "RunnerConfig")
      .def(nb::init<>())
      .def(nb::init<const RunnerConfig&>(), nb::arg("other"), "A copy.")
      .def_rw("num_ranks", &RunnerConfig::num_ranks,
              "Devices that compute the model together, each a part of it: ranks of the first\n"
              "stage, then those of the next.")
      .def_rw("num_stages", &RunnerConfig::num_stages,
              "Stages of a pipeline that the ranks form, of as many ranks each.")
      .def_rw("data_parallel", &RunnerConfig::data_parallel,
              "Whether each rank has requests of its own, and a runner that is called by itself.")
      .def_prop_rw(
          "rank_timeout_ms",
          [](const RunnerConfig& self) { return static_cast<int64_t>(self.rank_timeout.count()); },
          [](RunnerConfig& self, int64_t milliseconds) {
            self.rank_timeout = std::chrono::milliseconds(milliseconds);
          },
          "How long a rank waits for the others before they all end.")
      .def_prop_rw(
          "collectives",
          [](const RunnerConfig& self) {
            return std::string(collective_kernels_name(self.collectives));
          },
          [](RunnerConfig& self, const std::string& name) {
            self.collectives = collective_kernels_from_name(name);
          },
          "What carries collectives of GPUs: \"auto\", \"one_shot\", \"two_shot\" or \"nccl\".")
      .def_rw("nccl", &RunnerConfig::nccl,
              "Names to open NCCL by, in order, if GPUs do not reach each other's memory.")
      .def_rw("max_num_seqs", &RunnerConfig::max_num_seqs)
      .def_rw("max_num_batched_tokens", &RunnerConfig::max_num_batched_tokens)
      .def_rw("max_model_len", &RunnerConfig::max_model_len)
      .def_rw("block_size", &RunnerConfig::block_size)
      .def_rw("num_blocks", &RunnerConfig::num_blocks)
      .def_prop_rw(
          "kv_cache_dtype",
          [](const RunnerConfig& self) {
            return std::string(kv_cache_dtype_name(self.kv_cache.dtype));
          },
          [](RunnerConfig& self, const std::string& name) {
            self.kv_cache.dtype = kv_cache_dtype_from_name(name, "runner");
          },
          "\"auto\" (the dtype of activations), \"fp8_e4m3\" or \"fp8_e5m2\".")
      .def_prop_rw(
          "kv_scales",
          [](const RunnerConfig& self) {
            std::vector<std::pair<std::vector<float>, std::vector<float>>> scales;
            for (const KvLayerScales& layer : self.kv_cache.static_scales) {
              scales.emplace_back(layer.key, layer.value);
            }
            return scales;
          },
          [](RunnerConfig& self,
             const std::vector<std::pair<std::vector<float>, std::vector<float>>>& scales) {
            self.kv_cache.static_scales.clear();
            for (const auto& [key, value] : scales) {
              self.kv_cache.static_scales.push_back({key, value});
            }
          },
          "Static scales of an FP8 cache: of each layer those of keys and of values, one or one a\n"
          "head. Empty: each token and head has its own, computed when it is written.")
      .def_rw("max_logprobs", &RunnerConfig::max_logprobs,
              "Candidates that a row may report beside each token; -1: rows have no logprobs.")
      .def_rw("sampling_words", &RunnerConfig::sampling_words,
              "Words of 4 bytes that the lists of rows get at first, and by which they grow.")
      .def_rw("pad_requests", &RunnerConfig::pad_requests)
      .def_rw("pad_tokens", &RunnerConfig::pad_tokens)
      .def_rw("infer_param_view", &RunnerConfig::infer_param_view)
      .def_rw("graph_mode", &RunnerConfig::graph_mode)
      .def_prop_rw(
          "capture_sizes", [](const RunnerConfig& self) { return size_pairs(self.capture_sizes); },
          [](RunnerConfig& self, const std::vector<std::pair<int32_t, int32_t>>& sizes) {
            self.capture_sizes.clear();
            for (const auto& [requests, tokens] : sizes) {
              self.capture_sizes.push_back({requests, tokens});
            }
          },
          "Pairs (requests, tokens per request) that whole steps are captured at.")
      .def_rw("piecewise_sizes", &RunnerConfig::piecewise_sizes)
      .def_rw("attention_backend", &RunnerConfig::attention_backend)
      .def_rw("num_speculative_tokens", &RunnerConfig::num_speculative_tokens,
              "Drafts that a decoding row may have in a step; 0 is off.")
      .def_prop_rw(
          "ngram",
          [](const RunnerConfig& self) { return std::make_pair(self.ngram.min, self.ngram.max); },
          [](RunnerConfig& self, std::pair<int32_t, int32_t> range) {
            self.ngram = {range.first, range.second};
          },
          "Fewest and most tokens of the n-grams that drafts are looked up by.")
      .def_rw("force_tokens", &RunnerConfig::force_tokens,
              "For testing: rows may carry tokens that take the place of those drawn.")
      .def_rw("keep_hidden_states", &RunnerConfig::keep_hidden_states)
      .def_rw("batch_invariant", &RunnerConfig::batch_invariant)
      .def_rw("sync_launches", &RunnerConfig::sync_launches)
      .def_prop_rw(
          "two_batch",
          [](const RunnerConfig& self) {
            const TwoBatchConfig& halves = self.two_batch;
            return std::make_tuple(halves.mode, halves.min_prefill_tokens, halves.min_decode_tokens,
                                   halves.collective_blocks);
          },
          [](RunnerConfig& self,
             const std::tuple<TwoBatchMode, int32_t, int32_t, int32_t>& halves) {
            const auto& [mode, prefill, decode, blocks] = halves;
            self.two_batch = {mode, prefill, decode, blocks};
          },
          "Whether steps run as two halves, and from how many tokens on if that is AUTO: of steps "
          "with\n"
          "prompts, and of those without or that run as one graph; and the thread blocks of a GPU "
          "that\n"
          "collectives of halves take at most, 0 for as many as they like.");

  nb::class_<RowSpec>(m, "RowSpec")
      .def(nb::init<>())
      .def_rw("token_ids", &RowSpec::token_ids)
      .def_rw("prompt_len", &RowSpec::prompt_len)
      .def_rw("num_computed", &RowSpec::num_computed)
      .def_rw("temperature", &RowSpec::temperature)
      .def_rw("top_p", &RowSpec::top_p)
      .def_rw("min_p", &RowSpec::min_p)
      .def_rw("top_k", &RowSpec::top_k)
      .def_rw("seed", &RowSpec::seed)
      .def_rw("max_tokens", &RowSpec::max_tokens)
      .def_rw("min_tokens", &RowSpec::min_tokens)
      .def_rw("num_speculative_tokens", &RowSpec::num_speculative_tokens,
              "Drafts of a step at most; -1: as many as the runner allows.")
      .def_rw("forced_token_ids", &RowSpec::forced_token_ids,
              "Outputs, counted from prompt_len, whatever is drawn. Needs force_tokens.")
      .def_rw("stop_ids", &RowSpec::stop_ids)
      .def_rw("stop_sequences", &RowSpec::stop_sequences,
              "Token sequences that end the row once its outputs end with one of them.")
      .def_rw("presence_penalty", &RowSpec::presence_penalty)
      .def_rw("frequency_penalty", &RowSpec::frequency_penalty)
      .def_rw("repetition_penalty", &RowSpec::repetition_penalty)
      .def_rw("logit_bias", &RowSpec::logit_bias, "Pairs of a token id and what its logit gains.")
      .def_rw("allowed_token_ids", &RowSpec::allowed_token_ids, "Empty: all.")
      .def_rw("bad_words", &RowSpec::bad_words, "Token sequences that never come out whole.")
      .def_rw("num_logprobs", &RowSpec::num_logprobs,
              "Candidates to report beside each token; -1: no logprobs.")
      .def_rw("grammar", &RowSpec::grammar,
              "A mask of the tokens that may come is set before each draw; there are no drafts.")
      .def_rw("num_prompt_logprobs", &RowSpec::num_prompt_logprobs,
              "Candidates to report beside each token of the prompt but the first; -1: no logprobs "
              "of it.")
      .def_rw("num_scored", &RowSpec::num_scored,
              "Leading tokens after which the prompt's next one has been reported before.")
      .def_rw("block_ids", &RowSpec::block_ids);

  nb::enum_<FinishReason>(m, "FinishReason")
      .value("NONE", FinishReason::kNone)
      .value("STOP", FinishReason::kStop)
      .value("LENGTH", FinishReason::kLength)
      .value("ERROR", FinishReason::kError);
  nb::enum_<RowPhase>(m, "RowPhase")
      .value("FREE", RowPhase::kFree)
      .value("PREFILL", RowPhase::kPrefill)
      .value("EXTEND", RowPhase::kExtend)
      .value("DECODE", RowPhase::kDecode)
      .value("FINISHED", RowPhase::kFinished);

  nb::class_<OutputEntry>(m, "OutputEntry", "What a step says about one item of its batch.")
      .def_ro("row", &OutputEntry::row)
      .def_ro("generation", &OutputEntry::generation)
      .def_ro("num_tokens", &OutputEntry::num_tokens, "New tokens.")
      .def_ro("finish_reason", &OutputEntry::finish_reason)
      .def_ro("num_computed", &OutputEntry::num_computed)
      .def_ro("total_len", &OutputEntry::total_len)
      .def_ro("num_drafts", &OutputEntry::num_drafts, "Tokens that were proposed.")
      .def_ro("num_accepted", &OutputEntry::num_accepted, "Proposed tokens among the new ones.")
      .def_prop_ro("masked", [](const OutputEntry& self) { return self.masked != 0; })
      .def_ro("stop_sequence", &OutputEntry::stop_sequence,
              "Which of the row's stop_sequences stopped it, else -1.");

  nb::class_<Row>(m, "RowState", "A row as the device holds it.")
      .def_ro("generation", &Row::generation)
      .def_ro("phase", &Row::phase)
      .def_ro("prompt_len", &Row::prompt_len)
      .def_ro("prefill_target", &Row::prefill_target)
      .def_ro("num_computed", &Row::num_computed)
      .def_ro("total_len", &Row::total_len)
      .def_ro("last_token", &Row::last_token)
      .def_ro("num_drafts", &Row::num_drafts)
      .def_ro("finish_reason", &Row::finish_reason);

  nb::class_<StepTime>(m, "StepTime", "What a rank's device did with one step, by its own clock.")
      .def(nb::init<>())
      .def_rw("step", &StepTime::step)
      .def_rw("begin_ns", &StepTime::begin_ns)
      .def_rw("end_ns", &StepTime::end_ns)
      .def_rw("waited_ns", &StepTime::waited_ns,
              "For other stages of a pipeline, since the step before had ended.")
      .def_rw("requests", &StepTime::requests)
      .def_rw("tokens", &StepTime::tokens)
      .def_rw("mode", &StepTime::mode)
      .def_rw("cut_token", &StepTime::cut_token,
              "The first token of the second half, where the step ran as two; else 0.");

  nb::class_<StepOutput>(m, "StepOutput", "A retired step: entries in the batch's order.")
      .def_ro("step", &StepOutput::step)
      .def_ro("error", &StepOutput::error)
      .def_ro("mode", &StepOutput::mode)
      .def_ro("cut_token", &StepOutput::cut_token,
              "The first token of the second half, where the step ran as two; else 0.")
      .def_ro("begin_ns", &StepOutput::begin_ns, "Device clock when the step began.")
      .def_ro("end_ns", &StepOutput::end_ns, "Device clock when it ended.")
      .def_ro("entries", &StepOutput::entries)
      .def(
          "tokens",
          [](const StepOutput& self, size_t entry) {
            check(entry < self.entries.size(), "tokens", "entry ", entry, " is outside [0, ",
                  self.entries.size(), ")");
            const std::span<const int32_t> tokens = self.tokens(entry);
            return std::vector<int32_t>(tokens.begin(), tokens.end());
          },
          nb::arg("entry"), "The new tokens of an entry.")
      .def(
          "logprobs",
          [](const StepOutput& self, size_t entry) -> nb::object {
            check(entry < self.entries.size(), "logprobs", "entry ", entry, " is outside [0, ",
                  self.entries.size(), ")");
            const std::span<const TokenLogprob> logprobs = self.token_logprobs(entry);
            if (logprobs.empty()) return nb::none();
            return logprob_lists(logprobs);
          },
          nb::arg("entry"),
          nb::sig("def logprobs(self, entry: int) -> tuple[list[int], list[float], list[int]] | "
                  "None"),
          "Token ids, logprobs and ranks of an entry: for each new token a group of\n"
          "1 + num_logprobs, the token itself first. None without logprobs.")
      .def(
          "prompt_logprobs",
          [](const StepOutput& self, size_t entry) -> nb::object {
            const PromptScores* scores = self.scores_of(entry);
            if (scores == nullptr) return nb::none();
            return nb::make_tuple(scores->position,
                                  prompt_logprob_arrays(scores->logprobs, scores->num_logprobs));
          },
          nb::arg("entry"),
          nb::sig("def prompt_logprobs(self, entry: int) -> tuple[int, "
                  "tuple[NDArray[numpy.int32], NDArray[numpy.float32], NDArray[numpy.int32]]] | "
                  "None"),
          "Of the tokens of an entry's prompt that the step scored: the position of the first, "
          "and\n"
          "token ids, logprobs and ranks, [tokens, 1 + num_prompt_logprobs], each token's own\n"
          "first. NaN where the logits hold a NaN. None if it scored none.");

  nb::class_<RunnerHandle>(m, "ModelRunner", "See mrv1.runner.ModelRunner.")
      .def(
          "__init__",
          [](RunnerHandle* self, const DeviceHandle& device, const Program& program,
             const RunnerConfig& config) {
            new (self) RunnerHandle(make_runner({device.share()}, {program}, {config}), "runner");
          },
          nb::arg("device"), nb::arg("program"), nb::arg("config"))
      .def(
          "__init__",
          [](RunnerHandle* self, const std::vector<const DeviceHandle*>& devices,
             const std::vector<const Program*>& programs,
             const std::vector<RunnerConfig>& configs) {
            std::vector<std::shared_ptr<Device>> shared;
            for (const DeviceHandle* device : devices) shared.push_back(device->share());
            std::vector<Program> copies;
            for (const Program* program : programs) copies.push_back(*program);
            nb::gil_scoped_release release;
            new (self) RunnerHandle(make_runner(shared, std::move(copies), configs), "runner");
          },
          nb::arg("devices"), nb::arg("programs"), nb::arg("configs"),
          "Ranks that compute one model together: a device, a program and a configuration of each.")
      .def(
          "rank",
          [](const RunnerHandle& self, int rank) {
            const std::shared_ptr<ModelRunner> runner = self.share();
            check(runner->data_ranks() != nullptr, "runner",
                  "its ranks have no requests of their own");
            return new RunnerHandle({runner, &runner->rank_runner(rank)}, "runner");
          },
          nb::arg("rank"), nb::rv_policy::take_ownership,
          "The runner of a rank, where each has requests of its own. All ranks must run as many\n"
          "steps: `execute([])` on those without anything to compute.")
      .def(
          "execute_ranks",
          [](const RunnerHandle& self,
             const std::vector<std::vector<std::tuple<int32_t, int32_t, int32_t>>>& batches) {
            const std::shared_ptr<ModelRunner> runner = self.share();
            check(runner->data_ranks() != nullptr, "execute",
                  "the ranks have no requests of their own");
            std::vector<std::vector<BatchItem>> items(batches.size());
            for (size_t rank = 0; rank < batches.size(); ++rank) {
              for (const auto& [row, tokens, generation] : batches[rank]) {
                items[rank].push_back({row, tokens, generation});
              }
            }
            return runner->data_ranks()->execute(items);
          },
          nb::arg("batches"), nb::call_guard<nb::gil_scoped_release>(),
          "Launches a step on all ranks with requests of their own, of a batch each, at the same\n"
          "time; returns its number on each.")
      .def_static(
          "plan_memory",
          [](const Program& program, const RunnerConfig& config, const DeviceHandle& device) {
            return plan_dict(ModelRunner::plan_memory(program, config, *device.share()));
          },
          nb::arg("program"), nb::arg("config"), nb::arg("device"),
          nb::sig("def plan_memory(program: Program, config: RunnerConfig, device: Device) -> "
                  "dict[str, int]"),
          "Bytes of weights, activations, state and of one KV block, before anything is allocated.")
      .def_prop_ro(
          "memory_plan", [](const RunnerHandle& self) { return plan_dict(self->memory_plan()); },
          nb::sig("def memory_plan(self) -> dict[str, int]"))
      .def_prop_ro(
          "memory_plans",
          [](const RunnerHandle& self) {
            nb::list plans;
            for (int rank = 0; rank < self->config().num_ranks; ++rank) {
              plans.append(plan_dict(self->rank_runner(rank).memory_plan()));
            }
            return plans;
          },
          nb::sig("def memory_plans(self) -> list[dict[str, int]]"), "Of each rank.")
      .def_prop_ro(
          "ranks_note",
          [](const RunnerHandle& self) {
            const Communicator* rank = self->communicator();
            return rank == nullptr ? std::string() : rank->note();
          },
          "What the log should say of how ranks reach each other; mostly nothing.")
      .def("load_tensors", &load_tensors, nb::arg("file"), nb::arg("tensors"), nb::arg("progress"),
           "Loads tensors of a file: a list for each rank, of (weight, segment, offset in bytes,\n"
           "kind). The kind is the dtype of a plain weight, and of NVFP4 which of a segment's\n"
           "tensors it is: \"nvfp4_codes\", \"nvfp4_block_scales\", \"nvfp4_global_scale\" or\n"
           "\"nvfp4_input_scale\". Ranks load what they need of theirs at the same time, each in a "
           "thread of its\n"
           "own. `progress` is called with the bytes that were done since its last call; what it\n"
           "raises ends the loading.\n\n"
           "Raises:\n"
           "    InvalidArgumentError: there is not a list for each rank, or no such weight, "
           "segment or dtype.\n"
           "    WeightError: the file has no such bytes, or a weight cannot have that dtype.\n"
           "    DeviceError: the copy failed.")
      .def(
          "fill_random",
          [](const RunnerHandle& self, int32_t weight, uint64_t seed, float range, int rank) {
            self->rank_runner(rank).weights().fill_random(weight, seed, range);
          },
          nb::arg("weight"), nb::arg("seed"), nb::arg("range"), nb::arg("rank") = 0,
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "fill_kv_random",
          [](const RunnerHandle& self, uint64_t seed) { self->fill_kv_random(seed); },
          nb::arg("seed"), nb::call_guard<nb::gil_scoped_release>(),
          "Fills the KV cache with random values: timing without a prefill.")
      .def(
          "log_steps", [](const RunnerHandle& self, bool on) { self->log_steps(on); },
          nb::arg("on"), nb::call_guard<nb::gil_scoped_release>(),
          "Whether all ranks note down what each of their steps takes, from the next one on. Call\n"
          "it, and `take_step_log`, while no step is in flight.")
      .def(
          "take_step_log",
          [](const RunnerHandle& self, int rank) { return self->take_step_log(rank); },
          nb::arg("rank"), nb::call_guard<nb::gil_scoped_release>(),
          "The steps of a rank since then, or since the last call: those without a batch, too.")
      .def("check_weights",
           [](const RunnerHandle& self) {
             const std::shared_ptr<ModelRunner> runner = self.share();
             for (int rank = 0; rank < runner->config().num_ranks; ++rank) {
               runner->rank_runner(rank).weights().check_complete();
             }
           })
      .def(
          "add_row",
          [](const RunnerHandle& self, const RowSpec& spec) {
            const RowHandle handle = self->add_row(spec);
            return std::make_pair(handle.row, handle.generation);
          },
          nb::arg("spec"), nb::call_guard<nb::gil_scoped_release>())
      .def(
          "append_blocks",
          [](const RunnerHandle& self, int32_t row, int32_t group,
             const std::vector<int32_t>& block_ids,
             int32_t generation) { self->append_blocks({row, generation}, group, block_ids); },
          nb::arg("row"), nb::arg("group"), nb::arg("block_ids"),
          nb::arg("generation") = kAnyGeneration, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "drop_blocks",
          [](const RunnerHandle& self, int32_t row, int32_t group, int32_t first, int32_t count,
             int32_t generation) { self->drop_blocks({row, generation}, group, first, count); },
          nb::arg("row"), nb::arg("group"), nb::arg("first"), nb::arg("count"),
          nb::arg("generation") = kAnyGeneration, nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro(
          "kv_windows",
          [](const RunnerHandle& self) {
            std::vector<int32_t> windows;
            for (const KvGroup& group : self->kv_layout().groups) windows.push_back(group.window);
            return windows;
          },
          "Window of each KV group, 0 for none.")
      .def(
          "free_row",
          [](const RunnerHandle& self, int32_t row, int32_t generation) {
            self->free_row({row, generation});
          },
          nb::arg("row"), nb::arg("generation") = kAnyGeneration,
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "copy_blocks",
          [](const RunnerHandle& self, const std::vector<std::pair<int32_t, int32_t>>& copies) {
            std::vector<BlockCopy> pairs;
            for (const auto& [source, target] : copies) pairs.push_back({source, target});
            self->copy_blocks(pairs);
          },
          nb::arg("copies"), nb::call_guard<nb::gil_scoped_release>(),
          "Makes KV blocks equal to others, pairs (source, target), in stream order.")
      .def(
          "last_step", [](const RunnerHandle& self, int32_t row) { return self->last_step({row}); },
          nb::arg("row"))
      .def(
          "execute",
          [](const RunnerHandle& self, const std::vector<std::pair<int32_t, int32_t>>& batch) {
            std::vector<BatchItem> items;
            for (const auto& [row, tokens] : batch) items.push_back({row, tokens});
            return self->execute(items);
          },
          nb::arg("batch"), nb::call_guard<nb::gil_scoped_release>())
      .def(
          "execute",
          [](const RunnerHandle& self,
             const std::vector<std::tuple<int32_t, int32_t, int32_t>>& batch) {
            std::vector<BatchItem> items;
            for (const auto& [row, tokens, generation] : batch) {
              items.push_back({row, tokens, generation});
            }
            return self->execute(items);
          },
          nb::arg("batch"), nb::call_guard<nb::gil_scoped_release>())
      .def(
          "result", [](const RunnerHandle& self, uint64_t step) { return self->result(step); },
          nb::arg("step"), nb::call_guard<nb::gil_scoped_release>())
      .def(
          "discard", [](const RunnerHandle& self, uint64_t step) { self->discard(step); },
          nb::arg("step"))
      .def(
          "ready", [](const RunnerHandle& self, uint64_t step) { return self->ready(step); },
          nb::arg("step"))
      .def_prop_ro("retired_step", [](const RunnerHandle& self) { return self->retired_step(); })
      .def_prop_ro("free_rows", [](const RunnerHandle& self) { return self->free_rows(); })
      .def(
          "logits",
          [](const RunnerHandle& self, int32_t item) {
            const std::vector<float> values = self->logits(item);
            return to_numpy(values, {values.size()});
          },
          nb::arg("item"))
      .def("device_logits", &device_logits, nb::arg("item"),
           "As logits, float32 [vocab] in memory of the device: a copy that later steps leave "
           "alone.")
      .def("hidden_states", &hidden_states, nb::arg("item"),
           "What the head reads, for each token of an item of the newest step: float32 [tokens, "
           "hidden].")
      .def("device_hidden_states", &device_hidden_states, nb::arg("item"),
           "The same in memory of the device and in the model's dtype: a copy that later steps "
           "leave "
           "alone.")
      .def(
          "infer_params", [](const RunnerHandle& self) { return ints_dict(self->infer_params()); },
          nb::sig("def infer_params(self) -> dict[str, NDArray[numpy.int32]]"))
      .def(
          "row_state", [](const RunnerHandle& self, int32_t row) { return self->row_state(row); },
          nb::arg("row"))
      .def(
          "stats",
          [](const RunnerHandle& self) {
            const RunnerStats stats = self->stats();
            nb::dict dict;
            dict["steps"] = stats.steps;
            dict["batches"] = stats.batches;
            dict["host_ns"] = stats.host_ns;
            dict["control_bytes"] = stats.control_bytes;
            dict["output_bytes"] = stats.output_bytes;
            dict["mask_bytes"] = stats.mask_bytes;
            for (int mode = 0; mode < kNumStepModes; ++mode) {
              const std::string name = step_mode_name(static_cast<StepMode>(mode));
              dict[("steps_" + name).c_str()] = stats.steps_by_mode[mode];
            }
            dict["steps_in_halves"] = stats.steps_in_halves;
            dict["kernel_launches"] = stats.device.kernel_launches;
            dict["graph_launches"] = stats.device.graph_launches;
            dict["waits"] = stats.device.waits;
            dict["allocations"] = stats.device.allocations;
            dict["copies"] = stats.device.copies;
            return dict;
          },
          nb::sig("def stats(self) -> dict[str, int]"))
      .def(
          "capture_graphs",
          [](const RunnerHandle& self) {
            CaptureReport report;
            {
              nb::gil_scoped_release release;
              report = self->capture_graphs();
            }
            return nb::make_tuple(report.full_graphs, report.piecewise_graphs, report.bytes);
          },
          nb::sig("def capture_graphs(self) -> tuple[int, int, int]"),
          "Records the graphs of all sizes; returns how many sizes were recorded as whole steps "
          "and\n"
          "in pieces, and the bytes of device memory they took.")
      .def(
          "take_miss",
          [](const RunnerHandle& self) {
            const GraphLadder::Miss miss = self->take_miss();
            return std::make_pair(miss.text, miss.decode_only);
          },
          "Why a step did not run in the mode that was asked for, each reason once, else empty;\n"
          "and whether it was one of decoding requests only.")
      .def_prop_ro(
          "masked_items",
          [](const RunnerHandle& self) {
            const std::span<const int32_t> items = self->masked_items();
            return std::vector<int32_t>(items.begin(), items.end());
          },
          "Items of the newest step's batch that draw under a mask.")
      .def_prop_ro(
          "cut_step", [](const RunnerHandle& self) { return self->cut_step(); },
          "Step that waits for masks; 0 if there is none.")
      .def("set_masks", &set_masks, nb::arg("masks"), nb::call_guard<nb::gil_scoped_release>(),
           "Sets the masks of `masked_items`, uint32 [items, ceil(vocab / 32)], and launches the\n"
           "rest of `cut_step`. Waits for the step before.")
      .def(
          "fail_next_step",
          [](const RunnerHandle& self, const std::string& message, int rank) {
            self->fail_next_step(message, rank);
          },
          nb::arg("message"), nb::arg("rank") = ModelRunner::kAllRanks,
          "For testing: the next batch fails after its program, on all ranks (-1) or on one.")
      .def_prop_ro(
          "num_ranks", [](const RunnerHandle& self) { return self->config().num_ranks; },
          "Devices that compute the model together.")
      .def_prop_ro("program", [](const RunnerHandle& self) { return self->program(); })
      .def("close", &RunnerHandle::close);

  m.def("infer_param_view", &infer_param_view, nb::arg("device"), nb::arg("encoder"),
        nb::arg("decoder"), nb::arg("this_time"), nb::arg("block_tables"), nb::arg("block_size"),
        nb::arg("query_per_decode") = 1, nb::arg("max_tokens") = 8192,
        nb::sig("def infer_param_view(device: Device, encoder: NDArray[numpy.int32], "
                "decoder: NDArray[numpy.int32], this_time: NDArray[numpy.int32], "
                "block_tables: NDArray[numpy.int32], block_size: int, query_per_decode: int = 1, "
                "max_tokens: int = 8192) -> dict[str, NDArray[numpy.int32]]"),
        "Prefill and decode maps, cumulative lengths and slots by table row: the outputs of\n"
        "FastDeploy's get_infer_param, as int32 arrays by name.");
}

}  // namespace mrv1
