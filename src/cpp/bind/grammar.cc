// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "bind/grammar.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>

namespace mrv1 {

namespace nb = nanobind;

namespace {

const nb::object& matcher_of(const MaskRequest& request) {
  return static_cast<const PythonGrammar&>(*request.grammar).matcher(request.sample);
}

const nb::object& executor_of(const MaskRequest& request) {
  return static_cast<const PythonGrammar&>(*request.grammar).executor();
}

bool is(const nb::object& matcher, const char* property) {
  return nb::cast<bool>(matcher.attr(property)());
}

void note_error(MaskRequest& request) {
  const nb::object& matcher = matcher_of(request);
  if (!is(matcher, "is_error")) return;
  const auto text = nb::cast<std::string>(matcher.attr("get_error")());
  request.error = "structured_outputs: " + text.substr(0, text.find('\n'));
}

// Tells the grammars the new tokens, the n-th of all at a time. One that has stopped takes no more:
// what is drawn then are ends of sequence, as long as min_tokens lets them end nothing.
void consume(std::span<MaskRequest> requests) {
  for (size_t place = 0;; ++place) {
    nb::list pairs;
    for (const MaskRequest& request : requests) {
      if (place >= request.tokens.size() || is(matcher_of(request), "is_stopped")) continue;
      pairs.append(nb::make_tuple(matcher_of(request), request.tokens[place]));
    }
    if (nb::len(pairs) == 0) return;
    executor_of(requests.front()).attr("consume_token_par")(pairs);
  }
}

}  // namespace

void PythonMaskSource::fill(std::span<MaskRequest> requests, uint32_t* masks, int32_t num_rows,
                            int32_t words) {
  nb::gil_scoped_acquire gil;
  try {
    consume(requests);
    nb::list pairs;
    for (MaskRequest& request : requests) {
      note_error(request);
      if (request.error.empty()) {
        pairs.append(nb::make_tuple(matcher_of(request), request.row));
      }
    }
    if (nb::len(pairs) == 0) return;
    executor_of(requests.front())
        .attr("unsafe_compute_mask_ptr")(pairs, reinterpret_cast<uintptr_t>(masks),
                                         words * sizeof(uint32_t), num_rows);
    for (MaskRequest& request : requests) {
      if (request.error.empty()) note_error(request);
    }
  } catch (const nb::python_error& error) {
    for (MaskRequest& request : requests) request.error = error.what();
  }
}

void bind_grammar(nb::module_& m) {
  nb::class_<PythonGrammar>(m, "Grammar", "What the outputs of a request must follow.")
      .def(nb::init<nb::object, std::vector<nb::object>>(), nb::arg("executor"),
           nb::arg("matchers"),
           nb::sig("def __init__(self, executor: object, matchers: Sequence[object]) -> None"),
           "Args:\n"
           "    executor: With consume_token_par and unsafe_compute_mask_ptr, as llguidance's\n"
           "        LLExecutor.\n"
           "    matchers: One for each sample of the request, as llguidance's LLMatcher; nobody\n"
           "        else may use them.");
}

}  // namespace mrv1
