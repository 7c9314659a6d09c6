// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind/bind.h"
#include "bind/grammar.h"
#include "bind/logprobs.h"
#include "bind/runner_handle.h"
#include "engine/engine_group.h"

namespace mrv1 {
namespace {

struct EngineHandle : Handle<EngineGroup> {
  using Handle::Handle;

  // What Python lets go of without closing it ends as one that is closed. The thread may want the
  // GIL for masks, so that waiting for it with the GIL would last for ever.
  ~EngineHandle() {
    nb::gil_scoped_release release;
    close();
  }

  // Ends the thread first, so that whoever waits for outputs comes back.
  void close() {
    try {
      const std::shared_ptr<EngineGroup> engine = share();
      if (engine->is_own_thread()) {
        // A finalizer that runs while masks are made: the thread cannot wait for itself.
        std::thread([engine] { engine->stop(); }).detach();
      } else {
        engine->stop();
      }
    } catch (const Error&) {
      // Closed already, or another process's.
    }
    Handle::close();
  }
};

nb::dict stats_dict(const EngineThreadStats& stats) {
  nb::dict dict;
  dict["steps"] = stats.steps;
  dict["prefill_tokens"] = stats.prefill_tokens;
  dict["decode_tokens"] = stats.decode_tokens;
  dict["running"] = stats.running;
  dict["waiting"] = stats.waiting;
  dict["free_blocks"] = stats.free_blocks;
  dict["cached_blocks"] = stats.cached_blocks;
  dict["preemptions"] = stats.preemptions;
  dict["prefix_hit_tokens"] = stats.prefix_hit_tokens;
  dict["draft_tokens"] = stats.draft_tokens;
  dict["accepted_tokens"] = stats.accepted_tokens;
  dict["masked_results"] = stats.masked_results;
  dict["dropped_results"] = stats.dropped_results;
  dict["thread_cpu_ns"] = stats.thread_cpu_ns;
  return dict;
}

}  // namespace

void bind_engine(nb::module_& m) {
  nb::enum_<RequestEnd>(m, "RequestEnd")
      .value("NONE", RequestEnd::kNone)
      .value("STOP", RequestEnd::kStop)
      .value("LENGTH", RequestEnd::kLength)
      .value("ABORT", RequestEnd::kAbort)
      .value("ERROR", RequestEnd::kError);
  nb::class_<RequestOutput>(m, "RequestOutput",
                            "News of one sample of a request. Its last one has an end.")
      .def_ro("id", &RequestOutput::id)
      .def_ro("index", &RequestOutput::index, "Of the sample, below n.")
      .def_ro("token_ids", &RequestOutput::token_ids, "New tokens, often one.")
      .def_prop_ro(
          "logprobs",
          [](const RequestOutput& self) -> nb::object {
            if (self.logprobs.empty()) return nb::none();
            return logprob_lists(self.logprobs);
          },
          nb::sig("def logprobs(self) -> tuple[list[int], list[float], list[int]] | None"),
          "Token ids, logprobs and ranks: for each token a group of 1 + num_logprobs, the token\n"
          "itself first. None for requests without logprobs.")
      .def_ro("stop_sequence", &RequestOutput::stop_sequence,
              "Index of the sequence of RowSpec.stop_sequences that stopped it, else -1.")
      .def_ro("end", &RequestOutput::end)
      .def_ro("error", &RequestOutput::error)
      .def_ro("num_cached_tokens", &RequestOutput::num_cached_tokens,
              "Tokens of the prompt that were not computed for this sample.")
      .def_ro("num_draft_tokens", &RequestOutput::num_draft_tokens, "Of the request so far.")
      .def_ro("num_accepted_tokens", &RequestOutput::num_accepted_tokens, "Of the request so far.")
      .def_prop_ro(
          "prompt_logprobs",
          [](const RequestOutput& self) -> nb::object {
            const PromptLogprobs& prompt = self.prompt_logprobs;
            if (prompt.num_logprobs < 0) return nb::none();
            return prompt_logprob_arrays(prompt.tokens, prompt.num_logprobs);
          },
          nb::sig("def prompt_logprobs(self) -> tuple[NDArray[numpy.int32], "
                  "NDArray[numpy.float32], NDArray[numpy.int32]] | None"),
          "Token ids, logprobs and ranks of the prompt's tokens but the first, [tokens, 1 +\n"
          "num_prompt_logprobs], each token's own first: once, with the first token of one of the\n"
          "samples. None otherwise.");
  nb::class_<EngineOptions>(m, "EngineOptions")
      .def(
          "__init__",
          [](EngineOptions* self, bool enable_prefix_caching, bool background) {
            new (self) EngineOptions{enable_prefix_caching, background};
          },
          nb::arg("enable_prefix_caching") = true, nb::arg("background") = true,
          "Args:\n"
          "    enable_prefix_caching: Whether equal beginnings of prompts share computed blocks.\n"
          "    background: Whether a native thread takes the steps, or whoever calls step().")
      .def_rw("enable_prefix_caching", &EngineOptions::enable_prefix_caching)
      .def_rw("background", &EngineOptions::background);
  nb::class_<EngineHandle>(m, "Engine",
                           "Requests over a runner: scheduling, prefix cache, outputs. Any thread "
                           "may call any method.\n"
                           "See src/cpp/engine/README.md.")
      .def(
          "__init__",
          [](EngineHandle* self, const RunnerHandle& runner, const EngineOptions& options) {
            new (self)
                EngineHandle(std::make_shared<EngineGroup>(runner.share(), options,
                                                           std::make_shared<PythonMaskSource>()),
                             "engine");
          },
          nb::arg("runner"), nb::arg("options") = EngineOptions{},
          nb::sig("def __init__(self, runner: ModelRunner, options: EngineOptions = ...) -> None"))
      .def(
          "add_request",
          [](const EngineHandle& self, std::string id, const RowSpec& row, int32_t priority,
             int32_t n, uint64_t cache_salt, bool skip_prefix_cache,
             std::shared_ptr<PythonGrammar> grammar, std::optional<int> rank) {
            check(grammar == nullptr || static_cast<int32_t>(grammar->num_samples()) == n,
                  "add_request", "the grammar is not for n = ", n, " samples");
            NamedRequest request;
            request.id = std::move(id);
            request.samples = n;
            request.spec.row = row;
            request.spec.priority = priority;
            request.spec.scope.salt = cache_salt;
            request.spec.use_prefix_cache = !skip_prefix_cache;
            request.spec.row.grammar = grammar != nullptr;
            request.spec.grammar = std::move(grammar);
            self->add_request(std::move(request), rank.value_or(-1));
          },
          nb::arg("id"), nb::arg("row"), nb::kw_only(), nb::arg("priority") = 0, nb::arg("n") = 1,
          nb::arg("cache_salt") = 0, nb::arg("skip_prefix_cache") = false,
          nb::arg("grammar").none() = nb::none(), nb::arg("rank") = nb::none(),
          nb::call_guard<nb::gil_scoped_release>(),
          "Queues a request.\n\n"
          "Args:\n"
          "    id: Unique among the requests whose last output was not returned yet.\n"
          "    row: Prompt and parameters; block_ids, num_computed and prompt_len are not read.\n"
          "    priority: Lower is more urgent; equal ones in order of arrival.\n"
          "    n: Samples; they share the blocks of the prompt. Sample i draws with seed + i.\n"
          "    cache_salt: Requests share cached blocks only where it is equal.\n"
          "    skip_prefix_cache: Neither take blocks from the prefix cache nor leave any "
          "there.\n"
          "    grammar: What the outputs must follow; None: anything.\n"
          "    rank: Of ranks with requests of their own, the one that takes it; None: the one "
          "with\n"
          "        the fewest unfinished samples.\n\n"
          "Raises:\n"
          "    RequestError: the id is in use, or the request could never run.\n"
          "    InvalidArgumentError: a field of row is out of range.")
      .def(
          "abort",
          [](const EngineHandle& self, const std::string& id, int32_t index, bool report) {
            return self->abort(id, index, report);
          },
          nb::arg("id"), nb::kw_only(), nb::arg("index") = -1, nb::arg("report") = true,
          nb::call_guard<nb::gil_scoped_release>(),
          "Ends one sample, or all with -1. Without `report` no output of it is returned from now\n"
          "on, and the id is free. False if there was nothing left to end.")
      .def(
          "step", [](const EngineHandle& self) { return self->step(); },
          nb::call_guard<nb::gil_scoped_release>(),
          "Launches a step, takes in the one before it, and returns what is new. Only without\n"
          "`background`.")
      .def(
          "step_into",
          [](const EngineHandle& self, nb::object sink) {
            std::vector<RequestOutput> outputs;
            {
              nb::gil_scoped_release release;
              outputs = self->step();
            }
            sink.attr("extend")(nb::cast(std::move(outputs)));
          },
          nb::arg("sink"),
          nb::sig("def step_into(self, sink: collections.deque[RequestOutput]) -> None"),
          "The same into a deque: an interrupt that comes during the step finds what is new there.")
      .def(
          "wait_outputs",
          [](const EngineHandle& self, double timeout_s) { return self->wait_outputs(timeout_s); },
          nb::arg("timeout_s"), nb::call_guard<nb::gil_scoped_release>(),
          "Waits for outputs and returns them; empty if nothing is unfinished, after the timeout\n"
          "and after wake(). Only with `background`.")
      .def(
          "wake", [](const EngineHandle& self) { self->wake(); },
          "Makes one wait_outputs return, the next one if nobody waits.")
      .def(
          "has_unfinished", [](const EngineHandle& self) { return self->has_unfinished(); },
          "Whether outputs are still to come, or something is left to bring home.")
      .def(
          "stats", [](const EngineHandle& self) { return stats_dict(self->stats()); },
          nb::sig("def stats(self) -> dict[str, int]"),
          "Counts since the start, and what is there after the newest step. thread_cpu_ns is CPU\n"
          "time of scheduling, without waiting for the device.")
      .def(
          "rank_stats",
          [](const EngineHandle& self, int rank) { return stats_dict(self->rank_stats(rank)); },
          nb::arg("rank"), nb::sig("def rank_stats(self, rank: int) -> dict[str, int]"),
          "The same of one of several ranks with requests of their own; `stats` has their sums, "
          "but\n"
          "for steps, which are those of one.")
      .def(
          "check_idle", [](const EngineHandle& self) { self->check_idle(); },
          nb::call_guard<nb::gil_scoped_release>(),
          "Raises InternalError if something runs, or a row or block was left behind.")
      .def(
          "check_invariants", [](const EngineHandle& self) { self->check_invariants(); },
          nb::call_guard<nb::gil_scoped_release>(),
          "Raises InternalError unless lists, rows and blocks agree. Slow: for tests.")
      .def("close", &EngineHandle::close, nb::call_guard<nb::gil_scoped_release>(),
           "Ends all requests with an abort, waits for the steps in flight and joins the thread.");
}

}  // namespace mrv1
