// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "bind/bind.h"
#include "bind/grammar.h"

namespace mrv1 {
namespace {

const char* exception_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kInvalidArgument:
      return "InvalidArgumentError";
    case ErrorKind::kRequest:
      return "RequestError";
    case ErrorKind::kWeights:
      return "WeightError";
    case ErrorKind::kOutOfMemory:
      return "OutOfMemoryError";
    case ErrorKind::kDevice:
      return "DeviceError";
    case ErrorKind::kClosed:
      return "ClosedError";
    case ErrorKind::kFork:
      return "ForkError";
    case ErrorKind::kInternal:
      return "InternalError";
  }
  return "InternalError";
}

void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const Error& error) {
    nb::object type = nb::module_::import_("mrv1.errors").attr(exception_name(error.kind()));
    PyErr_SetString(type.ptr(), error.what());
  }
}

}  // namespace
}  // namespace mrv1

NB_MODULE(_core, m) {
  m.doc() = "Native core of mrv1: programs, state, the step and the engine.";
  // Objects that live until the interpreter ends are not leaks worth a line on stderr.
  nanobind::set_leak_warnings(false);
  nanobind::register_exception_translator(mrv1::translate);
  mrv1::bind_device(m);
  mrv1::bind_device_array(m);
  mrv1::bind_memory(m);
  mrv1::bind_program(m);
  mrv1::bind_session(m);
  mrv1::bind_sampling(m);
  mrv1::bind_runner(m);
  mrv1::bind_grammar(m);
  mrv1::bind_engine(m);
  mrv1::bind_bench(m);
  mrv1::bind_cache_write_probe(m);
  mrv1::bind_collectives(m);
  mrv1::bind_expert_probe(m);
  mrv1::bind_stage_probe(m);
  mrv1::bind_ops(m);
  mrv1::bind_fp4_weights(m);
}
