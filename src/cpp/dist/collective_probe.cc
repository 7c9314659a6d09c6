// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "dist/collective_probe.h"

#include <chrono>
#include <random>

#include "core/device.h"
#include "core/error.h"
#include "dist/probe_support.h"
#include "ops/kernels.h"

namespace mrv1 {
namespace {

constexpr std::string_view kWhere = "collective_probe";
constexpr int64_t kMostElements = int64_t{1} << 30;

CollectiveProbe::Options checked(const CollectiveProbe::Options& options) {
  const auto positive = [](int64_t value, const char* name) {
    check(value > 0, kWhere, name, " is ", value, "; must be positive");
  };
  positive(options.rows, "rows");
  positive(options.cols, "cols");
  positive(options.calls, "calls");
  check(options.offset >= 0 && options.offset < 4096, kWhere, "offset is ", options.offset,
        "; must be in [0, 4096)");
  check(options.rows * options.cols <= kMostElements / options.calls, kWhere, options.calls,
        " calls of ", options.rows, " rows of ", options.cols, " are too many values");
  check(options.op == CollectiveProbe::Op::kAllReduce || (!options.in_place && !options.with_bias),
        kWhere, "all_gather has no bias and is not in place");
  check(dtype_size(options.out_dtype) <= dtype_size(options.dtype), kWhere, "sums of ",
        dtype_name(options.dtype), " do not become wider");
  check(options.op == CollectiveProbe::Op::kAllReduce || options.dtype == options.out_dtype, kWhere,
        "all_gather keeps the dtype");
  check(!options.in_place || options.dtype == options.out_dtype, kWhere,
        "sums in place have the dtype of the values");
  return options;
}

}  // namespace

CollectiveProbe::CollectiveProbe(std::vector<std::shared_ptr<Device>> devices,
                                 const GroupOptions& group, const Options& options)
    : options_(checked(options)) {
  check(!devices.empty(), kWhere, "there are no devices");
  std::vector<std::unique_ptr<Communicator>> communicators = make_group(devices, group);
  ranks_.resize(devices.size());
  const size_t in_size = dtype_size(options_.dtype), out_size = dtype_size(options_.out_dtype);
  const auto bytes_of = [&](int64_t elements, size_t size) {
    return static_cast<size_t>(elements * options_.calls + options_.offset) * size;
  };
  for (int i = 0; i < size(); ++i) {
    Rank& rank = ranks_[i];
    rank.device = std::move(devices[i]);
    rank.communicator = std::move(communicators[i]);
    rank.values = rank.device->allocate(bytes_of(call_elements(), in_size), "values");
    rank.results = rank.device->allocate(bytes_of(out_elements(), out_size), "results");
    if (options_.with_bias) {
      rank.bias = rank.device->allocate(static_cast<size_t>(options_.cols) * sizeof(float), "bias");
    }
    rank.ctx.device = rank.device.get();
    rank.ctx.stream = rank.device->stream();
    rank.ctx.pool = rank.device->pool();
    rank.ctx.communicator = rank.communicator.get();
    rank.ctx.sizes.num_tokens = options_.rows;
    rank.ctx.batch_invariant = options_.batch_invariant;
  }
}

int64_t CollectiveProbe::out_cols() const {
  return options_.op == Op::kAllGather ? options_.cols * size() : options_.cols;
}

void CollectiveProbe::set_values(int rank, std::span<const float> values) {
  check(rank >= 0 && rank < size(), kWhere, "there is no rank ", rank);
  check(static_cast<int64_t>(values.size()) == call_elements() * options_.calls, kWhere,
        values.size(), " values; must be ", call_elements() * options_.calls);
  const std::vector<char> bytes = stored_values(values, options_.dtype);
  char* to = static_cast<char*>(ranks_[rank].values.data()) +
             static_cast<size_t>(options_.offset) * dtype_size(options_.dtype);
  ranks_[rank].device->copy_in(to, bytes.data(), bytes.size());
}

void CollectiveProbe::set_bias(std::span<const float> bias) {
  check(options_.with_bias && static_cast<int64_t>(bias.size()) == options_.cols, kWhere,
        "a bias of ", bias.size(), " values; must be ", options_.with_bias ? options_.cols : 0);
  for (Rank& rank : ranks_) {
    rank.device->copy_in(rank.bias.data(), bias.data(), bias.size_bytes());
  }
}

template <typename Fn>
void CollectiveProbe::each_rank(int absent, const Fn& fn) {
  run_ranks(size(), absent, [&](int rank) { fn(ranks_[rank]); });
  ranks_[0].communicator->check_alive();
}

void CollectiveProbe::launch_calls(Rank& rank) {
  const Kernels& kernels = rank.device->kernels();
  const size_t in_size = dtype_size(options_.dtype), out_size = dtype_size(options_.out_dtype);
  char* x = static_cast<char*>(rank.values.data()) + options_.offset * in_size;
  char* out = static_cast<char*>(rank.results.data()) + options_.offset * out_size;
  const size_t x_step = static_cast<size_t>(call_elements()) * in_size;
  const size_t out_step = static_cast<size_t>(out_elements()) * out_size;
  if (options_.in_place) {
    rank.device->copy_within(out, x, x_step * options_.calls);
    x = out;
  }
  std::mt19937_64 random(rank.communicator->rank() + 1);
  for (int32_t call = 0; call < options_.calls; ++call) {
    if (options_.delay.count() > 0) {
      const std::chrono::nanoseconds most = options_.delay;
      hold_stream(*rank.device, std::chrono::nanoseconds(std::uniform_int_distribution<int64_t>(
                                    0, most.count())(random)));
    }
    if (options_.op == Op::kAllReduce) {
      kernels.all_reduce({.x = x,
                          .bias = static_cast<const float*>(rank.bias.data()),
                          .out = out,
                          .cols = options_.cols,
                          .dtype = options_.dtype,
                          .out_dtype = options_.out_dtype,
                          .logits_rows = false},
                         rank.ctx);
    } else {
      kernels.all_gather({.x = x,
                          .out = out,
                          .cols = options_.cols,
                          .dtype = options_.dtype,
                          .logits_rows = false},
                         rank.ctx);
    }
    x += x_step;
    out += out_step;
  }
}

void CollectiveProbe::capture() {
  if (ranks_[0].graph != nullptr) return;
  capture_graphs(ranks_, [this](Rank& rank) { launch_calls(rank); });
  ranks_[0].communicator->check_alive();
}

void CollectiveProbe::run(int32_t launches, int absent) {
  check(launches > 0, kWhere, "launches is ", launches, "; must be positive");
  ranks_[0].communicator->check_alive();
  capture();
  each_rank(absent, [launches](Rank& rank) {
    run_on_stream(*rank.device, [&] {
      for (int32_t i = 0; i < launches; ++i) rank.device->launch(*rank.graph);
    });
  });
}

std::vector<float> CollectiveProbe::result(int rank) {
  check(rank >= 0 && rank < size(), kWhere, "there is no rank ", rank);
  const auto count = static_cast<size_t>(out_elements() * options_.calls);
  const size_t size = dtype_size(options_.out_dtype);
  std::vector<char> bytes(count * size);
  ranks_[rank].device->copy_out(
      bytes.data(), static_cast<const char*>(ranks_[rank].results.data()) + options_.offset * size,
      bytes.size());
  return loaded_values(bytes, options_.out_dtype);
}

std::vector<double> CollectiveProbe::time(int32_t repeats, int32_t launches) {
  run(launches);  // warms up
  std::vector<double> seconds = time_graphs(ranks_, repeats, launches);
  for (double& spent : seconds) spent /= options_.calls;
  ranks_[0].communicator->check_alive();
  return seconds;
}

}  // namespace mrv1
