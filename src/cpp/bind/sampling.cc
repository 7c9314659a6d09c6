// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "ops/kernels.h"
#include "runner/row_lists.h"
#include "sampling/processors.h"

namespace mrv1 {
namespace {

using FloatVector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntVector = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using SeedVector = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MaskVector = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using LogitsMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using RecordList = nb::typed<nb::list, nb::object>;
using SampleResult = nb::typed<nb::tuple, nb::ndarray<nb::numpy, int32_t>, RecordList>;
using TokenLists = std::vector<std::vector<int32_t>>;

template <typename T>
Buffer copy_to_device(Device& device, const T* data, size_t count) {
  Buffer buffer = device.allocate(std::max<size_t>(count, 1) * sizeof(T), "sample");
  if (count > 0) {
    device.copy_in(buffer.data(), data, count * sizeof(T));
  }
  return buffer;
}

Buffer allocate_workspace(Device& device, int64_t vocab_size, int64_t num_logits) {
  WorkspaceLimits limits = {};
  limits.vocab_size = vocab_size;
  limits.max_logits = num_logits;
  limits.num_threads = device.pool() != nullptr ? device.pool()->num_threads() : 1;
  const int64_t bytes = std::max<int64_t>(device.kernels().workspace_bytes(limits), 1);
  return device.allocate(static_cast<size_t>(bytes), "workspace");
}

void check_vocab(const char* where, const LogitsMatrix& logits) {
  check(logits.shape(1) > 0 && logits.shape(1) <= static_cast<size_t>(kMaxSampledVocab), where,
        "logits have ", logits.shape(1), " columns, expected 1 to ", kMaxSampledVocab);
}

void check_length(const char* what, size_t length, size_t expected) {
  check(length == expected, "sample", what, " has ", length, " entries, expected ", expected);
}

void check_ids(const char* what, const std::vector<int32_t>& ids, size_t vocab_size) {
  for (const int32_t id : ids) {
    check(id >= 0 && id < static_cast<int32_t>(vocab_size), "sample", what, " holds ", id,
          ", which is outside [0, ", vocab_size, ")");
  }
}

// (token, logprob, rank, top token ids, top logprobs); None where nothing was written.
nb::object record_tuple(const LogprobRecord& record) {
  if (record.count == INT32_MIN) {
    return nb::none();
  }
  nb::list tokens, logprobs;
  const auto* top = reinterpret_cast<const TopLogprob*>(&record + 1);
  for (int32_t i = 0; i < record.count; ++i) {
    tokens.append(top[i].token);
    logprobs.append(top[i].logprob);
  }
  return nb::make_tuple(record.token, record.logprob, record.rank, record.count, tokens, logprobs);
}

// Records that nothing was written to yet.
std::vector<char> unwritten_records(int64_t first, int64_t count, int32_t max_logprobs) {
  std::vector<char> bytes(static_cast<size_t>(first + count * logprob_record_bytes(max_logprobs)));
  auto* records = reinterpret_cast<LogprobRecord*>(bytes.data() + first);
  for (int64_t i = 0; i < count && max_logprobs >= 0; ++i) {
    logprob_record(records, max_logprobs, i)->count = INT32_MIN;
  }
  return bytes;
}

// The table of rows that sample() takes, laid out on the host.
struct HostRows {
  std::vector<Row> rows;
  std::vector<SamplingRow> sampling;  // `words` and `grammar_mask` are set on the device's side
  std::vector<int32_t> words;
  std::vector<size_t> words_offset;
  std::vector<int32_t> tokens;  // [rows, max_model_len]
  std::vector<uint32_t> masks;
  std::vector<int64_t> mask_offset;  // -1: none
  int32_t max_model_len = 0, max_drafts = 0, max_logprobs = -1;

  void add(const RowSpec& spec, int32_t total_len, const std::vector<int32_t>& drafts,
           const std::optional<MaskVector>& mask, size_t vocab_size);
  void lay_out_tokens(const std::vector<const RowSpec*>& specs, const TokenLists& drafts);
};

void HostRows::add(const RowSpec& spec, int32_t total_len, const std::vector<int32_t>& drafts,
                   const std::optional<MaskVector>& mask, size_t vocab_size) {
  const auto vocab = static_cast<int32_t>(vocab_size);
  check_row_lists(spec, vocab, INT32_MAX);
  check_ids("token_ids", spec.token_ids, vocab_size);
  check_ids("drafts", drafts, vocab_size);
  const auto known = static_cast<int32_t>(spec.token_ids.size());
  check(known == 0 || known == total_len, "sample", "token_ids has ", known,
        " tokens, expected total_len = ", total_len, ", or none");
  Row row = {};
  row.phase = RowPhase::kDecode;
  row.prompt_len = spec.prompt_len;
  row.total_len = total_len;
  row.min_total_len = spec.prompt_len + spec.min_tokens;
  rows.push_back(row);
  const auto num_drafts = static_cast<int32_t>(drafts.size());
  SamplingRow plain = plain_sampling_row(spec, vocab, num_drafts);
  RowLists lists;
  lists.build(spec, vocab, std::max(known, 1), plain);
  check(known > 0 || (plain.penalties.count == 0 && spec.bad_words.empty()), "sample",
        "penalties and bad_words need token_ids");
  sampling.push_back(plain);
  words_offset.push_back(words.size());
  words.insert(words.end(), lists.words.begin(), lists.words.end());
  // What no list holds has to be written before it is read, but for the tables' zeros.
  words.resize(words_offset.back() + static_cast<size_t>((lists.num_words + 3) / 4 * 4), -1);
  std::fill_n(words.begin() + static_cast<int64_t>(words_offset.back()) + lists.zeros_offset,
              lists.num_zeros, 0);
  mask_offset.push_back(mask ? static_cast<int64_t>(masks.size()) : -1);
  if (mask) {
    check_length("a grammar mask", mask->shape(0), (vocab_size + 31) / 32);
    masks.insert(masks.end(), mask->data(), mask->data() + mask->shape(0));
  }
  max_model_len = std::max(max_model_len, known + num_drafts);
  max_drafts = std::max(max_drafts, num_drafts);
  max_logprobs = std::max(max_logprobs, spec.num_logprobs);
}

void HostRows::lay_out_tokens(const std::vector<const RowSpec*>& specs, const TokenLists& drafts) {
  tokens.assign(specs.size() * static_cast<size_t>(max_model_len), -1);
  for (size_t i = 0; i < specs.size(); ++i) {
    auto at = tokens.begin() + static_cast<int64_t>(i) * max_model_len;
    at = std::copy(specs[i]->token_ids.begin(), specs[i]->token_ids.end(), at);
    if (i < drafts.size() && !specs[i]->token_ids.empty()) {
      std::copy(drafts[i].begin(), drafts[i].end(), at);
    }
  }
}

SampleResult sample(const DeviceHandle& handle, const LogitsMatrix& logits,
                    const std::vector<const RowSpec*>& specs, const IntVector& logits_batch,
                    const IntVector& logits_place, const IntVector& batch_row,
                    const IntVector& total_len, const SeedVector& seed, const TokenLists& drafts,
                    const std::vector<std::optional<MaskVector>>& grammar_masks,
                    const std::optional<IntVector>& counted_len) {
  const size_t num_logits = logits.shape(0);
  const size_t vocab_size = logits.shape(1);
  const size_t num_rows = specs.size();
  const size_t num_requests = batch_row.shape(0);
  check_vocab("sample", logits);
  check_length("logits_batch", logits_batch.shape(0), num_logits);
  check_length("logits_place", logits_place.shape(0), num_logits);
  check_length("total_len", total_len.shape(0), num_rows);
  check_length("seed", seed.shape(0), num_rows);
  if (!drafts.empty()) check_length("drafts", drafts.size(), num_rows);
  if (!grammar_masks.empty()) check_length("grammar_masks", grammar_masks.size(), num_rows);
  if (counted_len) check_length("counted_len", counted_len->shape(0), num_rows);
  HostRows table;
  for (size_t i = 0; i < num_rows; ++i) {
    table.add(*specs[i], total_len.data()[i], drafts.empty() ? std::vector<int32_t>() : drafts[i],
              grammar_masks.empty() ? std::nullopt : grammar_masks[i], vocab_size);
    table.sampling.back().seed = seed.data()[i];
  }
  table.lay_out_tokens(specs, drafts);
  for (size_t i = 0; i < num_requests; ++i) {
    check(batch_row.data()[i] >= -1 && batch_row.data()[i] < static_cast<int32_t>(num_rows),
          "sample", "batch_row[", i, "] is ", batch_row.data()[i], ", expected -1 to ",
          static_cast<int64_t>(num_rows) - 1);
  }
  for (size_t i = 0; i < num_logits; ++i) {
    const int32_t batch = logits_batch.data()[i];
    const int32_t place = logits_place.data()[i];
    check(batch >= -1 && batch < static_cast<int32_t>(num_requests), "sample", "logits_batch[", i,
          "] is ", batch, ", expected -1 to ", static_cast<int64_t>(num_requests) - 1);
    const int32_t row = batch < 0 ? -1 : batch_row.data()[batch];
    const int32_t most = row < 0 ? 0 : table.sampling[row].num_speculative_tokens;
    check(row < 0 || (place >= 0 && place <= most), "sample", "logits_place[", i, "] is ", place,
          ", expected 0 to the row's ", most, " drafts");
  }

  const auto requests = static_cast<int32_t>(num_requests);
  const int64_t records_offset = output_tokens_end(requests, table.max_drafts);
  std::vector<char> output = unwritten_records(
      records_offset, int64_t{requests} * (1 + table.max_drafts), table.max_logprobs);
  // Anything but a value that sample() writes, so that an entry it forgets is seen.
  std::vector<int32_t> sampled(num_logits, INT32_MIN);
  {
    nb::gil_scoped_release release;
    const std::shared_ptr<Device> shared = handle.share();
    Device& device = *shared;
    const Buffer device_words = copy_to_device(device, table.words.data(), table.words.size());
    const Buffer device_masks = copy_to_device(device, table.masks.data(), table.masks.size());
    for (size_t i = 0; i < num_rows; ++i) {
      table.sampling[i].words = static_cast<int32_t*>(device_words.data()) + table.words_offset[i];
      if (table.mask_offset[i] >= 0) {
        table.sampling[i].grammar_mask =
            static_cast<const uint32_t*>(device_masks.data()) + table.mask_offset[i];
      }
    }
    const Buffer device_rows = copy_to_device(device, table.rows.data(), num_rows);
    const Buffer device_sampling = copy_to_device(device, table.sampling.data(), num_rows);
    const Buffer device_tokens = copy_to_device(device, table.tokens.data(), table.tokens.size());
    const Buffer device_logits = copy_to_device(device, logits.data(), num_logits * vocab_size);
    const Buffer device_logits_batch = copy_to_device(device, logits_batch.data(), num_logits);
    const Buffer device_logits_place = copy_to_device(device, logits_place.data(), num_logits);
    const Buffer device_batch_row = copy_to_device(device, batch_row.data(), num_requests);
    const Buffer device_sampled = copy_to_device(device, sampled.data(), num_logits);
    const Buffer device_output = copy_to_device(device, output.data(), output.size());
    uint64_t step = 0;
    const Buffer device_step = copy_to_device(device, &step, 1);
    const Buffer workspace = allocate_workspace(device, static_cast<int64_t>(vocab_size),
                                                static_cast<int64_t>(num_logits));

    const SampleParams params{static_cast<float*>(device_logits.data()),
                              static_cast<int64_t>(vocab_size)};
    StepContext ctx;
    ctx.device = &device;
    ctx.pool = device.pool();
    ctx.stream = device.stream();
    ctx.sizes.num_requests = requests;
    ctx.sizes.num_tokens = requests;
    ctx.sizes.num_logits = static_cast<int32_t>(num_logits);
    ctx.rings.output = static_cast<char*>(device_output.data());
    ctx.rings.output_bytes = static_cast<int64_t>(output.size());
    ctx.rings.num_slots = 1;
    ctx.rings.step = static_cast<uint64_t*>(device_step.data());
    ctx.rows.num_rows = static_cast<int32_t>(num_rows);
    ctx.rows.vocab_size = static_cast<int32_t>(vocab_size);
    ctx.rows.max_model_len = table.max_model_len;
    ctx.rows.rows = static_cast<Row*>(device_rows.data());
    ctx.rows.sampling = static_cast<SamplingRow*>(device_sampling.data());
    ctx.rows.tokens = static_cast<int32_t*>(device_tokens.data());
    ctx.rows.max_drafts = table.max_drafts;
    ctx.rows.max_logprobs = table.max_logprobs;
    ctx.infer.row = static_cast<int32_t*>(device_batch_row.data());
    ctx.infer.logits_batch = static_cast<int32_t*>(device_logits_batch.data());
    ctx.infer.logits_place = static_cast<int32_t*>(device_logits_place.data());
    ctx.infer.logits_entry = ctx.infer.logits_batch;  // entries are in the batch's order
    ctx.infer.sampled = static_cast<int32_t*>(device_sampled.data());
    ctx.infer.max_requests = requests;
    ctx.infer.max_tokens = requests;
    ctx.infer.max_logits = static_cast<int32_t>(num_logits);
    ctx.workspace = workspace.data();
    ctx.workspace_bytes = workspace.bytes();
    const auto run = [&](const auto& kernel) { run_on_stream(device, kernel); };
    if (counted_len) {
      std::vector<Row> shorter = table.rows;
      for (size_t i = 0; i < num_rows; ++i) {
        shorter[i].total_len = std::min(counted_len->data()[i], shorter[i].total_len);
      }
      const Buffer device_shorter = copy_to_device(device, shorter.data(), num_rows);
      StepContext before = ctx;
      before.rows.rows = static_cast<Row*>(device_shorter.data());
      run([&] { device.kernels().count_tokens(before); });
    }
    run([&] { device.kernels().count_tokens(ctx); });
    run([&] { device.kernels().sample(params, ctx); });
    if (num_logits > 0) {
      device.copy_out(sampled.data(), device_sampled.data(), num_logits * sizeof(int32_t));
    }
    device.copy_out(output.data(), device_output.data(), output.size());
  }
  RecordList records;
  auto* first = reinterpret_cast<LogprobRecord*>(output.data() + records_offset);
  for (size_t i = 0; i < num_logits; ++i) {
    const int32_t batch = logits_batch.data()[i];
    const int64_t index = int64_t{batch} * (1 + table.max_drafts) + logits_place.data()[i];
    records.append(batch < 0 || table.max_logprobs < 0
                       ? nb::none()
                       : record_tuple(*logprob_record(first, table.max_logprobs, index)));
  }
  return nb::borrow<SampleResult>(nb::make_tuple(to_numpy(sampled, {num_logits}), records));
}

RecordList score(const DeviceHandle& handle, const LogitsMatrix& logits, const IntVector& targets,
                 int32_t num_logprobs) {
  const size_t num_rows = logits.shape(0);
  const size_t vocab_size = logits.shape(1);
  check_vocab("score", logits);
  check(targets.shape(0) == num_rows, "score", "targets has ", targets.shape(0),
        " entries, expected ", num_rows);
  for (size_t i = 0; i < num_rows; ++i) {
    check(targets.data()[i] >= -1 && targets.data()[i] < static_cast<int32_t>(vocab_size), "score",
          "targets[", i, "] is ", targets.data()[i], ", expected -1 to ", vocab_size - 1);
  }
  check(num_logprobs >= 0, "score", "num_logprobs is ", num_logprobs, ", must not be negative");
  std::vector<char> output =
      unwritten_records(0, static_cast<int64_t>(std::max<size_t>(num_rows, 1)), num_logprobs);
  {
    nb::gil_scoped_release release;
    const std::shared_ptr<Device> shared = handle.share();
    Device& device = *shared;
    const Buffer device_logits = copy_to_device(device, logits.data(), num_rows * vocab_size);
    const Buffer device_targets = copy_to_device(device, targets.data(), num_rows);
    const Buffer device_output = copy_to_device(device, output.data(), output.size());
    const Buffer workspace = allocate_workspace(device, static_cast<int64_t>(vocab_size),
                                                static_cast<int64_t>(num_rows));
    ScoreParams params = {};
    params.logits = static_cast<const float*>(device_logits.data());
    params.num_rows = static_cast<int64_t>(num_rows);
    params.vocab_size = static_cast<int64_t>(vocab_size);
    params.targets = static_cast<const int32_t*>(device_targets.data());
    params.num_logprobs = num_logprobs;
    params.max_logprobs = num_logprobs;
    params.records = static_cast<LogprobRecord*>(device_output.data());
    StepContext ctx;
    ctx.device = &device;
    ctx.pool = device.pool();
    ctx.stream = device.stream();
    ctx.workspace = workspace.data();
    ctx.workspace_bytes = workspace.bytes();
    run_on_stream(device, [&] { device.kernels().score(params, ctx); });
    device.copy_out(output.data(), device_output.data(), output.size());
  }
  RecordList records;
  auto* first = reinterpret_cast<LogprobRecord*>(output.data());
  for (size_t i = 0; i < num_rows; ++i) {
    records.append(record_tuple(*logprob_record(first, num_logprobs, static_cast<int64_t>(i))));
  }
  return records;
}

nb::ndarray<nb::numpy, uint64_t> fixed_point_weights(const FloatVector& logits, float temperature) {
  const size_t count = logits.shape(0);
  std::vector<uint64_t> weights(count);
  if (count > 0) {
    const float* data = logits.data();
    const float largest = *std::max_element(data, data + count);
    const WeightRule rule = {largest, Temperature::scale(temperature), 1};
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
  m.def(
      "sample", &sample, nb::arg("device"), nb::arg("logits"), nb::arg("rows"), nb::kw_only(),
      nb::arg("logits_batch"), nb::arg("logits_place"), nb::arg("batch_row"), nb::arg("total_len"),
      nb::arg("seed"), nb::arg("drafts") = TokenLists(),
      nb::arg("grammar_masks") = std::vector<std::optional<MaskVector>>(),
      nb::arg("counted_len") = nb::none(),
      "Runs the device's sampler once over a batch that is described by hand.\n\n"
      "L logits rows, B batch positions, R rows of the row table. All but parameters of sampling\n"
      "and token_ids of a RowSpec is ignored.\n\n"
      "Args:\n"
      "    device: where to run.\n"
      "    logits: float32 [L, vocab]; left as it is.\n"
      "    rows: R specs. token_ids is the history, which rows with penalties or bad words need.\n"
      "    logits_batch: int32 [L], batch position of a logits row, -1 for padding.\n"
      "    logits_place: int32 [L], how many of its row's drafts come before the token.\n"
      "    batch_row: int32 [B], row of a batch position, -1 for padding and masked rows.\n"
      "    total_len: int32 [R], tokens of the history.\n"
      "    seed: uint64 [R], in place of the specs'.\n"
      "    drafts: R lists of token ids, or none: no row has drafts.\n"
      "    grammar_masks: of each row None, or uint32 [ceil(vocab / 32)], a bit for each id; or\n"
      "        none: no row has a mask.\n"
      "    counted_len: int32 [R], so many tokens of a history are counted on their own, before\n"
      "        all of them are, as in an earlier step.\n\n"
      "Returns:\n"
      "    (int32 [L]: token ids, NO_TOKEN or ERROR_TOKEN; for each logits row None, or (token,\n"
      "    logprob, rank, count, top token ids, top logprobs)).");
  m.def("score", &score, nb::arg("device"), nb::arg("logits"), nb::arg("targets"),
        nb::arg("num_logprobs"),
        "Logprobs of given tokens, by the device's kernel.\n\n"
        "Args:\n"
        "    device: where to run.\n"
        "    logits: float32 [L, vocab].\n"
        "    targets: int32 [L], -1 for rows that are left out.\n"
        "    num_logprobs: candidates of each token.\n\n"
        "Returns:\n"
        "    As the second of sample().");
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
