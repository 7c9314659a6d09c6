// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "program/session.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "bind/bind.h"
#include "bind/device_array.h"

namespace mrv1 {
namespace {

struct SessionHandle : Handle<ProgramSession> {
  using Handle::Handle;
};

template <typename T, typename Array>
std::vector<T> to_vector(const Array& array) {
  return std::vector<T>(array.data(), array.data() + array.size());
}

const WeightSpec& weight_spec(ProgramSession& session, int32_t weight, size_t count) {
  const auto& specs = session.program().weights();
  check(weight >= 0 && weight < static_cast<int32_t>(specs.size()), "session", "no weight ",
        weight);
  const WeightSpec& spec = specs[weight];
  check(static_cast<int64_t>(count) == spec.rows * spec.cols, "session", "'", spec.name, "' needs ",
        spec.rows * spec.cols, " values, got ", count);
  return spec;
}

void load_weight(ProgramSession& session, int32_t weight, const void* values, size_t count,
                 DType dtype) {
  const WeightSpec& spec = weight_spec(session, weight, count);
  for (size_t i = 0; i < spec.segments.size(); ++i) {
    const int64_t first = spec.segments[i].row_start * spec.cols;
    session.weights().load_segment(
        weight, static_cast<int32_t>(i),
        static_cast<const char*>(values) + first * static_cast<int64_t>(dtype_size(dtype)), dtype);
  }
}

// Codes, block scales and scales of NVFP4 of all segments, as a checkpoint has them.
void load_nvfp4(ProgramSession& session, int32_t weight, const ByteArray& codes,
                const ByteArray& block_scales, const std::vector<float>& global_scales,
                const std::vector<float>& input_scales) {
  const auto& specs = session.program().weights();
  check(weight >= 0 && weight < static_cast<int32_t>(specs.size()), "session", "no weight ",
        weight);
  const WeightSpec& spec = specs[weight];
  const size_t count = static_cast<size_t>(spec.rows * spec.cols);
  check(codes.size() == count / 2 && block_scales.size() == count / kFp4Block, "session", "'",
        spec.name, "' needs ", count / 2, " bytes of codes and ", count / kFp4Block,
        " of block scales, got ", codes.size(), " and ", block_scales.size());
  check(global_scales.size() == spec.segments.size() && input_scales.size() == spec.segments.size(),
        "session", "'", spec.name, "' has ", spec.segments.size(), " segments, got ",
        global_scales.size(), " global scales and ", input_scales.size(), " of activations");
  for (size_t i = 0; i < spec.segments.size(); ++i) {
    const auto segment = static_cast<int32_t>(i);
    const int64_t first = spec.segments[i].row_start * spec.cols;
    const auto load = [&](const void* data, DType dtype, TensorPart part) {
      session.weights().load_segment(weight, segment, data, dtype, part);
    };
    load(codes.data() + first / 2, DType::kE2M1, TensorPart::kElements);
    load(block_scales.data() + first / kFp4Block, DType::kE4M3, TensorPart::kBlockScales);
    load(&global_scales[i], DType::kF32, TensorPart::kGlobalScale);
    load(&input_scales[i], DType::kF32, TensorPart::kInputScale);
  }
}

// The dtype of a float array of another library.
DType float_dtype(const nb::ndarray<nb::ro>& array, const char* where) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    if (array.dtype() == element_type(dtype).dlpack()) return dtype;
  }
  fail(ErrorKind::kInvalidArgument, where, "the array must be float32, bfloat16 or float16");
}

// Weights are converted and packed on the host, once.
void load_device_weight(const SessionHandle& self, int32_t weight, nb::object values) {
  const std::shared_ptr<ProgramSession> session = self.share();
  Device& device = *session->device();
  const nb::ndarray<nb::ro> array = import_array(values, device, "load_weight");
  const DType dtype = float_dtype(array, "load_weight");
  weight_spec(*session, weight, array.size());
  std::vector<char> copy(array.nbytes());
  device.copy_out(copy.data(), array.data(), copy.size());
  load_weight(*session, weight, copy.data(), array.size(), dtype);
}

// Stays on the device, and so in the value's own dtype.
void set_device_value(const SessionHandle& self, int32_t value, nb::object data) {
  const std::shared_ptr<ProgramSession> session = self.share();
  Device& device = *session->device();
  const ProgramSession::DeviceValue target = session->device_value(value);
  const nb::ndarray<nb::ro> array = import_array(data, device, "set_value");
  check(array.dtype() == element_type(target.dtype).dlpack(), "set_value", "an array in memory of ",
        device.name(), " must have the dtype of the value, ", dtype_name(target.dtype));
  check(static_cast<int64_t>(array.size()) <= target.max_rows * target.cols, "set_value",
        array.size(), " values do not fit the ", target.max_rows * target.cols, " of the buffer");
  run_on_stream(device, [&] { device.copy_within(target.data, array.data(), array.nbytes()); });
}

std::unique_ptr<DeviceArray> device_value(const SessionHandle& self, int32_t value, int64_t rows) {
  const std::shared_ptr<ProgramSession> session = self.share();
  const ProgramSession::DeviceValue source = session->device_value(value);
  check(rows >= 0 && rows <= source.max_rows, "session", rows, " rows are outside [0, ",
        source.max_rows, "]");
  return copy_to_array(session->device(), source.data,
                       {static_cast<size_t>(rows), static_cast<size_t>(source.cols)}, source.dtype);
}

KvScaleKind scale_kind_from_name(const std::string& name) {
  if (name == "token") return KvScaleKind::kToken;
  if (name == "head") return KvScaleKind::kHead;
  check(name == "tensor", "session", "kv_scales is '", name, "', must be token, head or tensor");
  return KvScaleKind::kTensor;
}

}  // namespace

void bind_session(nb::module_& m) {
  nb::enum_<AttentionBackend>(m, "AttentionBackend", "Kernels of decode attention.")
      .value("NATIVE", AttentionBackend::kNative)
      .value("FLASHINFER", AttentionBackend::kFlashInfer);
  nb::class_<SessionHandle>(m, "ProgramSession",
                            "Runs a program over inputs, infer_params and a KV cache set by hand: "
                            "for testing single ops\n"
                            "and fused forms on either backend. Floats cross as float32.")
      .def(
          "__init__",
          [](SessionHandle* self, const DeviceHandle& device, const Program& program,
             int32_t max_requests, int32_t max_tokens, int32_t max_logits, int32_t num_blocks,
             int32_t block_size, int32_t max_blocks, int64_t max_position,
             const std::string& kv_cache_dtype, const std::string& kv_scales) {
            const ProgramSession::Limits limits{max_requests,
                                                max_tokens,
                                                max_logits,
                                                num_blocks,
                                                block_size,
                                                max_blocks,
                                                max_position,
                                                kv_cache_dtype_from_name(kv_cache_dtype, "session"),
                                                scale_kind_from_name(kv_scales)};
            new (self) SessionHandle(
                std::make_shared<ProgramSession>(device.share(), program, limits), "session");
          },
          nb::arg("device"), nb::arg("program"), nb::kw_only(), nb::arg("max_requests") = 1,
          nb::arg("max_tokens") = 1, nb::arg("max_logits") = 1, nb::arg("num_blocks") = 1,
          nb::arg("block_size") = 16, nb::arg("max_blocks") = 1, nb::arg("max_position") = 1,
          nb::arg("kv_cache_dtype") = "auto", nb::arg("kv_scales") = "token",
          "Args of the KV cache:\n"
          "    kv_cache_dtype: \"auto\" (the program's dtype), \"fp8_e4m3\" or \"fp8_e5m2\".\n"
          "    kv_scales: of an FP8 cache, \"token\" (one for each token and head, which the "
          "cache\n"
          "        write computes), \"head\" or \"tensor\" (set_cache_scales sets them; 1 at "
          "first).")
      .def(
          "load_weight",
          [](const SessionHandle& self, int32_t weight, FloatArray values) {
            load_weight(*self.share(), weight, values.data(), values.size(), DType::kF32);
          },
          nb::arg("weight"), nb::arg("values"),
          "Sets a weight: float32 [rows, cols], its segments one after the other.")
      .def("load_weight", &load_device_weight, nb::arg("weight"), nb::arg("values"),
           "From an array with __dlpack__ in memory that the device addresses: float32, bfloat16 "
           "or\n"
           "float16 [rows, cols].\n\n"
           "Raises:\n"
           "    InvalidArgumentError: no such weight, or an array of another dtype, size or "
           "device.")
      .def(
          "load_nvfp4",
          [](const SessionHandle& self, int32_t weight, ByteArray codes, ByteArray block_scales,
             const std::vector<float>& global_scales, const std::vector<float>& input_scales) {
            load_nvfp4(*self.share(), weight, codes, block_scales, global_scales, input_scales);
          },
          nb::arg("weight"), nb::arg("codes"), nb::arg("block_scales"), nb::arg("global_scales"),
          nb::arg("input_scales"),
          "Sets an NVFP4 weight: uint8 [rows, cols / 2] of two codes each, the even column low,\n"
          "uint8 [rows, cols / 16] of E4M3, and for each segment a global scale and one of\n"
          "activations.")
      .def(
          "set_value",
          [](const SessionHandle& self, int32_t value, FloatArray data) {
            self->set_value(value, to_vector<float>(data));
          },
          nb::arg("value"), nb::arg("data"),
          "Sets the first rows of a value: float32 [rows, cols], converted to its dtype.")
      .def(
          "set_value", &set_device_value, nb::arg("value"), nb::arg("data"),
          "From an array with __dlpack__ in memory that the device addresses: [rows, cols] of the\n"
          "value's dtype.\n\n"
          "Raises:\n"
          "    InvalidArgumentError: no such value, or an array of another dtype or device, or "
          "one\n"
          "        that does not fit.")
      .def(
          "value",
          [](const SessionHandle& self, int32_t value, int64_t rows) {
            const std::vector<float> data = [&] {
              const nb::gil_scoped_release release;  // it waits for the device
              return self->value(value, rows);
            }();
            const size_t cols = rows > 0 ? data.size() / rows : 0;
            return to_numpy(data, {static_cast<size_t>(rows), cols});
          },
          nb::arg("value"), nb::arg("rows"),
          "The first rows of a value: float32 [rows, cols], a copy.")
      .def("device_value", &device_value, nb::arg("value"), nb::arg("rows"),
           "As value, in memory of the device and in the value's dtype: [rows, cols], a copy that\n"
           "later runs leave alone.")
      .def(
          "set_ints",
          [](const SessionHandle& self, const std::string& name, IntArray data) {
            self->set_ints(name, to_vector<int32_t>(data));
          },
          nb::arg("name"), nb::arg("data"))
      .def(
          "set_cache",
          [](const SessionHandle& self, int32_t layer, bool values, FloatArray data) {
            self->set_cache(layer, values, to_vector<float>(data));
          },
          nb::arg("layer"), nb::arg("values"), nb::arg("data"),
          "Keys (or values) of a layer: float32 [blocks, heads, block_size, head_dim], converted "
          "to\n"
          "the dtype of the cache; of an FP8 cache what its codes stand for, without scales.")
      .def(
          "cache",
          [](const SessionHandle& self, int32_t layer, bool values) {
            const std::vector<float> data = self->cache(layer, values);
            return to_numpy(data, {data.size()});
          },
          nb::arg("layer"), nb::arg("values"),
          "Keys (or values) of a layer, as set_cache takes them.")
      .def(
          "set_cache_scales",
          [](const SessionHandle& self, int32_t layer, bool values, FloatArray data) {
            self->set_cache_scales(layer, values, to_vector<float>(data));
          },
          nb::arg("layer"), nb::arg("values"), nb::arg("data"),
          "Scales of an FP8 layer's keys (or values): float32 [1], [heads], or [blocks, heads,\n"
          "block_size].")
      .def(
          "cache_scales",
          [](const SessionHandle& self, int32_t layer, bool values) {
            const std::vector<float> data = self->cache_scales(layer, values);
            return to_numpy(data, {data.size()});
          },
          nb::arg("layer"), nb::arg("values"), "As set_cache_scales takes them.")
      .def(
          "run",
          [](const SessionHandle& self, int32_t num_requests, int32_t num_tokens,
             int32_t num_logits) { self->run(num_requests, num_tokens, num_logits); },
          nb::arg("num_requests"), nb::arg("num_tokens"), nb::arg("num_logits") = 0,
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "set_options",
          [](const SessionHandle& self, bool batch_invariant, bool eager_attention,
             AttentionBackend attention_backend) {
            self->set_options(batch_invariant, eager_attention, attention_backend);
          },
          nb::kw_only(), nb::arg("batch_invariant") = false, nb::arg("eager_attention") = false,
          nb::arg("attention_backend") = AttentionBackend::kNative,
          "Which kernels later runs may use.\n\n"
          "Args:\n"
          "    batch_invariant: only those whose results for a row do not depend on the batch.\n"
          "    eager_attention: those of attention whose launch sizes follow the batch, too.\n"
          "    attention_backend: of decode attention, on a GPU.")
      .def(
          "time_runs",
          [](const SessionHandle& self, int32_t num_requests, int32_t num_tokens,
             int32_t num_logits, int32_t repeats) {
            return self->time_runs(num_requests, num_tokens, num_logits, repeats);
          },
          nb::arg("num_requests"), nb::arg("num_tokens"), nb::arg("num_logits") = 0,
          nb::arg("repeats") = 1, nb::call_guard<nb::gil_scoped_release>(),
          "Seconds of each of `repeats` runs, after one that warms up; on a GPU by its own clock,\n"
          "each run launched as one graph.")
      .def(
          "fill_weight",
          [](const SessionHandle& self, int32_t weight, uint64_t seed, float range) {
            self->weights().fill_random(weight, seed, range);
          },
          nb::arg("weight"), nb::arg("seed"), nb::arg("range"),
          nb::call_guard<nb::gil_scoped_release>(),
          "Fills a matrix with random values in (-range, range), a vector with such around 1.")
      .def(
          "fill_cache", [](const SessionHandle& self, uint64_t seed) { self->fill_cache(seed); },
          nb::arg("seed"), nb::call_guard<nb::gil_scoped_release>(),
          "Fills the KV caches of all layers with random values in [-1, 1), an FP8 cache with "
          "random\n"
          "codes and scales.")
      .def("close", &SessionHandle::close);
}

}  // namespace mrv1
