// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "dist/expert_probe.h"

#include <algorithm>
#include <random>
#include <utility>

#include "core/error.h"
#include "dist/probe_support.h"
#include "ops/kernels.h"

namespace mrv1 {
namespace {

constexpr std::string_view kWhere = "expert_probe";
constexpr int64_t kMostElements = int64_t{1} << 30;

ExpertProbe::Options checked(ExpertProbe::Options options, size_t ranks) {
  const auto positive = [](int64_t value, const char* name) {
    check(value > 0, kWhere, name, " is ", value, "; must be positive");
  };
  positive(options.region_rows, "region_rows");
  positive(options.hidden, "hidden");
  positive(options.top_k, "top_k");
  positive(options.num_experts, "num_experts");
  positive(options.calls, "calls");
  check(!options.tokens.empty() && options.tokens.size() == ranks, kWhere, "there are tokens of ",
        options.tokens.size(), " ranks; must be of ", ranks);
  for (const int32_t tokens : options.tokens) {
    check(tokens >= 0 && tokens <= options.region_rows, kWhere, "a rank has ", tokens,
          " tokens; allowed are 0 to region_rows = ", options.region_rows);
  }
  const int64_t rows = static_cast<int64_t>(ranks) * options.region_rows;
  check(rows <= kMostElements / options.hidden && rows <= kMostElements / options.top_k &&
            options.region_rows * options.calls <= kMostElements / options.hidden,
        kWhere, "the buffers are too large");
  check(dtype_size(options.dtype) <= dtype_size(options.sum_dtype), kWhere, "sums of ",
        dtype_name(options.sum_dtype), " do not become ", dtype_name(options.dtype));
  return options;
}

template <typename T>
std::vector<T> copied(Device& device, const void* data, int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  if (count > 0) device.copy_out(values.data(), data, values.size() * sizeof(T));
  return values;
}

std::vector<float> loaded(Device& device, const void* data, int64_t count, DType dtype) {
  const std::vector<char> bytes =
      copied<char>(device, data, count * static_cast<int64_t>(dtype_size(dtype)));
  return loaded_values(bytes, dtype);
}

}  // namespace

ExpertProbe::ExpertProbe(std::vector<std::shared_ptr<Device>> devices, const GroupOptions& group,
                         const Options& options)
    : options_(checked(options, devices.size())) {
  std::vector<std::unique_ptr<Communicator>> communicators = make_group(devices, group);
  ranks_.resize(devices.size());
  std::vector<Communicator*> linked;
  std::vector<ExpertBuffers> buffers;
  const int64_t rows = size() * options_.region_rows;
  for (int i = 0; i < size(); ++i) {
    Rank& rank = ranks_[i];
    rank.device = std::move(devices[i]);
    rank.communicator = std::move(communicators[i]);
    const auto allocate = [&](int64_t count, size_t width) {
      return rank.device->allocate(static_cast<size_t>(std::max<int64_t>(count, 1)) * width,
                                   "experts");
    };
    const int64_t tokens = int64_t{options_.tokens[i]} * options_.calls;
    const size_t width = dtype_size(options_.dtype), sum_width = dtype_size(options_.sum_dtype);
    rank.values = allocate(tokens * options_.hidden, width);
    rank.experts = allocate(tokens * options_.top_k, sizeof(int32_t));
    rank.weights = allocate(tokens * options_.top_k, sizeof(float));
    rank.places = allocate(int64_t{options_.tokens[i]} * size(), sizeof(int32_t));
    rank.results = allocate(tokens * options_.hidden, width);
    rank.received_x = allocate(rows * options_.hidden, width);
    rank.received_experts = allocate(rows * options_.top_k, sizeof(int32_t));
    rank.received_weights = allocate(rows * options_.top_k, sizeof(float));
    rank.counts = allocate(size(), sizeof(int32_t));
    rank.sums = allocate(rows * options_.hidden, sum_width);
    rank.received = {.region_rows = options_.region_rows,
                     .hidden = options_.hidden,
                     .top_k = options_.top_k,
                     .dtype = options_.dtype,
                     .sum_dtype = options_.sum_dtype,
                     .x = rank.received_x.data(),
                     .experts = static_cast<int32_t*>(rank.received_experts.data()),
                     .weights = static_cast<float*>(rank.received_weights.data()),
                     .counts = static_cast<int32_t*>(rank.counts.data()),
                     .sums = rank.sums.data()};
    rank.ctx.device = rank.device.get();
    rank.ctx.stream = rank.device->stream();
    rank.ctx.pool = rank.device->pool();
    rank.ctx.communicator = rank.communicator.get();
    rank.ctx.sizes.num_tokens = options_.tokens[i];
    linked.push_back(rank.communicator.get());
    buffers.push_back(rank.received);
  }
  link_experts(linked, buffers);
}

ExpertProbe::Rank& ExpertProbe::rank_at(int rank) {
  check(rank >= 0 && rank < size(), kWhere, "there is no rank ", rank);
  return ranks_[rank];
}

void ExpertProbe::set_tokens(int index, std::span<const float> values,
                             std::span<const int32_t> experts, std::span<const float> weights) {
  Rank& rank = rank_at(index);
  const int64_t tokens = int64_t{options_.tokens[index]} * options_.calls;
  const auto expect = [](size_t count, int64_t expected, const char* name) {
    check(static_cast<int64_t>(count) == expected, kWhere, count, " ", name, "; must be ",
          expected);
  };
  expect(values.size(), tokens * options_.hidden, "values");
  expect(experts.size(), tokens * options_.top_k, "experts");
  expect(weights.size(), tokens * options_.top_k, "weights");
  for (const int32_t expert : experts) {
    check(expert >= -1 && expert < options_.num_experts, kWhere, "there is no expert ", expert);
  }
  if (tokens == 0) return;
  const std::vector<char> bytes = stored_values(values, options_.dtype);
  rank.device->copy_in(rank.values.data(), bytes.data(), bytes.size());
  rank.device->copy_in(rank.experts.data(), experts.data(), experts.size_bytes());
  rank.device->copy_in(rank.weights.data(), weights.data(), weights.size_bytes());
}

void ExpertProbe::set_partial(int index, std::span<const float> values) {
  Rank& rank = rank_at(index);
  check(static_cast<int64_t>(values.size()) == region_elements(), kWhere, values.size(),
        " values; must be ", region_elements());
  const std::vector<char> bytes = stored_values(values, options_.sum_dtype);
  // Graphs keep its address.
  check(rank.graph == nullptr || rank.partial.data() != nullptr, kWhere,
        "partial sums must be set before the first run");
  if (rank.partial.data() == nullptr) {
    rank.partial = rank.device->allocate(bytes.size(), "experts");
  }
  rank.device->copy_in(rank.partial.data(), bytes.data(), bytes.size());
}

void ExpertProbe::launch_calls(Rank& rank) {
  const Kernels& kernels = rank.device->kernels();
  const int64_t tokens = rank.ctx.sizes.num_tokens;
  const ExpertShare share{options_.num_experts, size()};
  const size_t step = static_cast<size_t>(tokens * options_.hidden) * dtype_size(options_.dtype);
  auto* places = static_cast<int32_t*>(rank.places.data());
  std::mt19937_64 random(rank.communicator->rank() + 1);
  const auto wait = [&] {
    if (options_.delay.count() == 0) return;
    const std::chrono::nanoseconds most = options_.delay;
    hold_stream(*rank.device, std::chrono::nanoseconds(
                                  std::uniform_int_distribution<int64_t>(0, most.count())(random)));
  };
  for (int32_t call = 0; call < options_.calls; ++call) {
    const auto at = static_cast<size_t>(call);
    if (options_.part != Part::kCombine) {
      wait();
      kernels.moe_dispatch({.x = static_cast<const char*>(rank.values.data()) + at * step,
                            .experts = static_cast<const int32_t*>(rank.experts.data()) +
                                       call * tokens * options_.top_k,
                            .weights = static_cast<const float*>(rank.weights.data()) +
                                       call * tokens * options_.top_k,
                            .places = places,
                            .share = share,
                            .received = rank.received},
                           rank.ctx);
    }
    if (options_.part != Part::kDispatch) {
      wait();
      kernels.moe_combine(
          {.partial = rank.partial.data() != nullptr ? rank.partial.data() : rank.received.x,
           .places = places,
           .out = static_cast<char*>(rank.results.data()) + at * step,
           .received = rank.received},
          rank.ctx);
    }
  }
}

void ExpertProbe::capture() {
  if (ranks_[0].graph != nullptr) return;
  for (const Rank& rank : ranks_) {
    check(rank.partial.data() != nullptr || options_.dtype == options_.sum_dtype, kWhere,
          "partial sums of another dtype must be set before the first run");
  }
  if (options_.part == Part::kCombine) {
    // What it brings back must have come before.
    options_.part = Part::kBoth;
    run_ranks(size(), -1,
              [&](int i) { run_on_stream(*ranks_[i].device, [&] { launch_calls(ranks_[i]); }); });
    options_.part = Part::kCombine;
  }
  capture_graphs(ranks_, [this](Rank& rank) { launch_calls(rank); });
  ranks_[0].communicator->check_alive();
}

void ExpertProbe::run(int32_t launches, int absent) {
  check(launches > 0, kWhere, "launches is ", launches, "; must be positive");
  ranks_[0].communicator->check_alive();
  capture();
  run_ranks(size(), absent, [&](int i) {
    run_on_stream(*ranks_[i].device, [&] {
      for (int32_t launch = 0; launch < launches; ++launch) {
        ranks_[i].device->launch(*ranks_[i].graph);
      }
    });
  });
  ranks_[0].communicator->check_alive();
}

std::vector<float> ExpertProbe::result(int index) {
  Rank& rank = rank_at(index);
  return loaded(*rank.device, rank.results.data(),
                int64_t{options_.tokens[index]} * options_.calls * options_.hidden, options_.dtype);
}

ExpertProbe::Received ExpertProbe::received(int index) {
  Rank& rank = rank_at(index);
  Device& device = *rank.device;
  const int64_t rows = size() * options_.region_rows;
  return {loaded(device, rank.received.x, rows * options_.hidden, options_.dtype),
          copied<int32_t>(device, rank.received.experts, rows * options_.top_k),
          copied<float>(device, rank.received.weights, rows * options_.top_k),
          copied<int32_t>(device, rank.received.counts, size()),
          copied<int32_t>(device, rank.places.data(), int64_t{options_.tokens[index]} * size())};
}

std::vector<double> ExpertProbe::time(int32_t repeats, int32_t launches) {
  run(launches);  // warms up
  std::vector<double> seconds = time_graphs(ranks_, repeats, launches);
  for (double& spent : seconds) spent /= options_.calls;
  ranks_[0].communicator->check_alive();
  return seconds;
}

}  // namespace mrv1
