// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "ops/kernels.h"
#include "sampling/processors.h"

namespace mrv1 {
namespace {

using FloatVector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntVector = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using SeedVector = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using LogitsMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <typename T>
Buffer copy_to_device(Device& device, const T* data, size_t count) {
  Buffer buffer = device.allocate(std::max<size_t>(count, 1) * sizeof(T), "sample");
  if (count > 0) {
    device.copy_in(buffer.data(), data, count * sizeof(T));
  }
  return buffer;
}

nb::ndarray<nb::numpy, int32_t> sample(const DeviceHandle& handle, const LogitsMatrix& logits,
                                       const IntVector& logits_batch, const IntVector& logits_place,
                                       const IntVector& batch_row, const FloatVector& temperature,
                                       const IntVector& top_k, const FloatVector& top_p,
                                       const FloatVector& min_p, const SeedVector& seed,
                                       const IntVector& total_len, const IntVector& min_total_len,
                                       const std::vector<std::vector<int32_t>>& stop_ids) {
  const size_t num_logits = logits.shape(0);
  const size_t vocab_size = logits.shape(1);
  const size_t num_rows = temperature.shape(0);
  const size_t num_requests = batch_row.shape(0);
  check(vocab_size > 0 && vocab_size <= static_cast<size_t>(kMaxSampledVocab), "sample",
        "logits have ", vocab_size, " columns, expected 1 to ", kMaxSampledVocab);
  check(logits_batch.shape(0) == num_logits, "sample", "logits_batch has ", logits_batch.shape(0),
        " entries, expected ", num_logits);
  check(logits_place.shape(0) == num_logits, "sample", "logits_place has ", logits_place.shape(0),
        " entries, expected ", num_logits);
  for (size_t size : {top_k.shape(0), top_p.shape(0), min_p.shape(0), seed.shape(0),
                      total_len.shape(0), min_total_len.shape(0), stop_ids.size()}) {
    check(size == num_rows, "sample", "a row parameter has ", size, " entries, expected ", num_rows,
          " as temperature has");
  }
  for (size_t i = 0; i < num_logits; ++i) {
    check(
        logits_batch.data()[i] >= -1 && logits_batch.data()[i] < static_cast<int32_t>(num_requests),
        "sample", "logits_batch[", i, "] is ", logits_batch.data()[i], ", expected -1 to ",
        static_cast<int64_t>(num_requests) - 1);
  }
  for (size_t i = 0; i < num_requests; ++i) {
    check(batch_row.data()[i] >= -1 && batch_row.data()[i] < static_cast<int32_t>(num_rows),
          "sample", "batch_row[", i, "] is ", batch_row.data()[i], ", expected -1 to ",
          static_cast<int64_t>(num_rows) - 1);
  }

  std::vector<Row> rows(num_rows);
  std::vector<SamplingRow> sampling(num_rows);
  std::vector<int32_t> stops;
  for (size_t i = 0; i < num_rows; ++i) {
    rows[i].phase = RowPhase::kDecode;
    rows[i].total_len = total_len.data()[i];
    rows[i].min_total_len = min_total_len.data()[i];
    sampling[i].temperature = temperature.data()[i];
    sampling[i].top_k = TopK::effective(top_k.data()[i], static_cast<int64_t>(vocab_size));
    sampling[i].top_p = top_p.data()[i];
    sampling[i].min_p = min_p.data()[i];
    sampling[i].seed = seed.data()[i];
    sampling[i].stop_ids = {static_cast<int32_t>(stops.size()),
                            static_cast<int32_t>(stop_ids[i].size())};
    stops.insert(stops.end(), stop_ids[i].begin(), stop_ids[i].end());
  }

  std::vector<int32_t> sampled(num_logits);
  {
    nb::gil_scoped_release release;
    const std::shared_ptr<Device> shared = handle.share();
    Device& device = *shared;
    const Buffer device_rows = copy_to_device(device, rows.data(), num_rows);
    const Buffer device_stops = copy_to_device(device, stops.data(), stops.size());
    for (SamplingRow& row : sampling) row.words = static_cast<int32_t*>(device_stops.data());
    const Buffer device_sampling = copy_to_device(device, sampling.data(), num_rows);
    const Buffer device_logits = copy_to_device(device, logits.data(), num_logits * vocab_size);
    const Buffer device_logits_batch = copy_to_device(device, logits_batch.data(), num_logits);
    const Buffer device_logits_place = copy_to_device(device, logits_place.data(), num_logits);
    const Buffer device_batch_row = copy_to_device(device, batch_row.data(), num_requests);
    // Anything but a value that sample() writes, so that an entry it forgets is seen.
    std::fill(sampled.begin(), sampled.end(), INT32_MIN);
    const Buffer device_sampled = copy_to_device(device, sampled.data(), num_logits);
    WorkspaceLimits limits = {};
    limits.vocab_size = static_cast<int64_t>(vocab_size);
    limits.max_logits = static_cast<int64_t>(num_logits);
    limits.num_threads = device.pool() != nullptr ? device.pool()->num_threads() : 1;
    const int64_t workspace_bytes = std::max<int64_t>(device.kernels().workspace_bytes(limits), 1);
    const Buffer workspace = device.allocate(static_cast<size_t>(workspace_bytes), "workspace");

    const SampleParams params{static_cast<float*>(device_logits.data()),
                              static_cast<int64_t>(vocab_size)};
    StepContext ctx;
    ctx.device = &device;
    ctx.pool = device.pool();
    ctx.stream = device.stream();
    ctx.sizes.num_requests = static_cast<int32_t>(num_requests);
    ctx.sizes.num_tokens = static_cast<int32_t>(num_requests);
    ctx.sizes.num_logits = static_cast<int32_t>(num_logits);
    ctx.rows.num_rows = static_cast<int32_t>(num_rows);
    ctx.rows.vocab_size = static_cast<int32_t>(vocab_size);
    ctx.rows.rows = static_cast<Row*>(device_rows.data());
    ctx.rows.sampling = static_cast<SamplingRow*>(device_sampling.data());
    ctx.rows.max_logprobs = -1;
    ctx.infer.row = static_cast<int32_t*>(device_batch_row.data());
    ctx.infer.logits_batch = static_cast<int32_t*>(device_logits_batch.data());
    ctx.infer.logits_place = static_cast<int32_t*>(device_logits_place.data());
    ctx.infer.sampled = static_cast<int32_t*>(device_sampled.data());
    ctx.infer.max_requests = static_cast<int32_t>(num_requests);
    ctx.infer.max_tokens = static_cast<int32_t>(num_requests);
    ctx.infer.max_logits = static_cast<int32_t>(num_logits);
    ctx.workspace = workspace.data();
    ctx.workspace_bytes = workspace.bytes();
    run_on_stream(device, [&] { device.kernels().sample(params, ctx); });
    if (num_logits > 0) {
      device.copy_out(sampled.data(), device_sampled.data(), num_logits * sizeof(int32_t));
    }
  }
  return to_numpy(sampled, {num_logits});
}

nb::ndarray<nb::numpy, uint64_t> fixed_point_weights(const FloatVector& logits, float temperature) {
  const size_t count = logits.shape(0);
  std::vector<uint64_t> weights(count);
  if (count > 0) {
    SamplingRow sampling = {};
    sampling.temperature = temperature;
    const float* data = logits.data();
    const float largest = *std::max_element(data, data + count);
    const WeightRule rule = {largest, Temperature::scale(sampling), 1};
    for (size_t i = 0; i < count; ++i) {
      weights[i] = token_weight(data[i], rule);
    }
  }
  return to_numpy(weights, {count});
}

}  // namespace

void bind_sampling(nb::module_& m) {
  m.attr("NO_TOKEN") = kNoToken;
  m.attr("ERROR_TOKEN") = kErrorToken;
  m.def("sample", &sample, nb::arg("device"), nb::arg("logits"), nb::kw_only(),
        nb::arg("logits_batch"), nb::arg("logits_place"), nb::arg("batch_row"),
        nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"),
        nb::arg("seed"), nb::arg("total_len"), nb::arg("min_total_len"), nb::arg("stop_ids"),
        "Runs the device's sampler once over a batch that is described by hand.\n\n"
        "L logits rows, B batch positions, R rows of the row table.\n\n"
        "Args:\n"
        "    device: where to run.\n"
        "    logits: float32 [L, vocab]; left as it is.\n"
        "    logits_batch: int32 [L], batch position of a logits row, -1 for padding.\n"
        "    logits_place: int32 [L], tokens by which the row is longer than total_len.\n"
        "    batch_row: int32 [B], row of a batch position, -1 for padding and masked rows.\n"
        "    temperature, top_p, min_p: float32 [R].\n"
        "    top_k, total_len, min_total_len: int32 [R].\n"
        "    seed: uint64 [R].\n"
        "    stop_ids: R lists of token ids.\n\n"
        "Returns:\n"
        "    int32 [L]: token ids, NO_TOKEN or ERROR_TOKEN.");
  m.def("fixed_point_weights", &fixed_point_weights, nb::arg("logits"),
        nb::arg("temperature") = 1.0f,
        "exp((logits - max) / temperature) as integers of 2^-43 units, as the sampler takes it.\n\n"
        "Args:\n"
        "    logits: float32 [n], without NaN.\n"
        "    temperature: above 0.\n\n"
        "Returns:\n"
        "    uint64 [n].");
  m.def("random_word", &random_word, nb::arg("seed"), nb::arg("position"),
        "The 64 random bits of the token at `position` of a request with this seed.");
  m.def(
      "sampling_processors",
      [] {
        std::vector<std::string> names;
        Processors::for_each([&](auto processor) { names.emplace_back(processor.kName); });
        return names;
      },
      "Names of the sampler's processors, in the order they run.");
}

}  // namespace mrv1
