// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "dist/stage_send_probe.h"

#include "core/error.h"
#include "dist/probe_support.h"
#include "dist/stage_link.h"
#include "ops/kernels.h"

namespace mrv1 {
namespace {

constexpr std::string_view kWhere = "stage_send_probe";
constexpr int64_t kMostElements = int64_t{1} << 30;

StageSendProbe::Options checked(const StageSendProbe::Options& options) {
  const auto positive = [](int64_t value, const char* name) {
    check(value > 0, kWhere, name, " is ", value, "; must be positive");
  };
  positive(options.rows, "rows");
  positive(options.cols, "cols");
  positive(options.calls, "calls");
  check(options.cols <= kMostElements / options.rows / options.calls, kWhere, options.calls,
        " messages of ", options.rows, " rows of ", options.cols, " are too many values");
  return options;
}

}  // namespace

StageSendProbe::StageSendProbe(std::vector<std::shared_ptr<Device>> devices, GroupOptions group,
                               const Options& options)
    : options_(checked(options)) {
  check(devices.size() >= 2, kWhere, "there are ", devices.size(), " devices; must be 2 or more");
  group.num_stages = static_cast<int>(devices.size());
  std::vector<std::unique_ptr<Communicator>> communicators = make_group(devices, group);
  ranks_.resize(devices.size());
  const auto bytes = static_cast<size_t>(call_bytes());
  for (size_t i = 0; i < ranks_.size(); ++i) {
    Rank& rank = ranks_[i];
    rank.device = std::move(devices[i]);
    rank.communicator = std::move(communicators[i]);
    if (i == 0) {
      rank.values = rank.device->allocate(bytes * static_cast<size_t>(options_.calls), "values");
    } else {
      rank.received = rank.device->allocate(bytes, "received values");
    }
    rank.outputs = rank.device->allocate(2 * sizeof(uint64_t), "outputs");  // of no step
    rank.step = rank.device->allocate(sizeof(uint64_t), "step counter");
    rank.ctx.device = rank.device.get();
    rank.ctx.stream = rank.device->stream();
    rank.ctx.pool = rank.device->pool();
    rank.ctx.communicator = rank.communicator.get();
    rank.ctx.sizes.num_tokens = options_.rows;
    rank.ctx.rings.step = static_cast<uint64_t*>(rank.step.data());
  }
  link_ranks();
}

int64_t StageSendProbe::call_bytes() const {
  return options_.rows * options_.cols * static_cast<int64_t>(dtype_size(options_.dtype));
}

void StageSendProbe::link_ranks() {
  std::vector<Communicator*> group;
  std::vector<StageBuffers> buffers;
  const StageValue value{"x", options_.cols, options_.dtype};
  for (Rank& rank : ranks_) {
    group.push_back(rank.communicator.get());
    StageBuffers& own = buffers.emplace_back();
    if (rank.communicator->stage() > 0) {
      own.receives = {value};
      own.received = {rank.received.data()};
    }
    if (!rank.communicator->is_last_stage()) {
      own.sends = {value};
      own.outputs = rank.outputs.data();
    }
    own.outputs_bytes = sizeof(uint64_t);
    own.num_slots = 2;
  }
  link_stages(group, buffers);
}

void StageSendProbe::set_values(std::span<const float> values) {
  check(static_cast<int64_t>(values.size()) == options_.calls * options_.rows * options_.cols,
        kWhere, values.size(), " values; must be ", options_.calls * options_.rows * options_.cols);
  const std::vector<char> bytes = stored_values(values, options_.dtype);
  ranks_[0].device->copy_in(ranks_[0].values.data(), bytes.data(), bytes.size());
}

void StageSendProbe::launch_calls(Rank& rank) {
  const Kernels& kernels = rank.device->kernels();
  const Communicator& group = *rank.communicator;
  const bool is_first = group.stage() == 0;
  for (int32_t call = 0; call < options_.calls; ++call) {
    const char* values = is_first
                             ? static_cast<const char*>(rank.values.data()) + call * call_bytes()
                             : static_cast<const char*>(rank.received.data());
    if (options_.copies) {
      if (group.is_last_stage()) return;
      rank.device->copy_within(group.stage_link()->next_values[0], values,
                               static_cast<size_t>(call_bytes()));
      continue;
    }
    if (!is_first) kernels.stage_receive(rank.ctx);
    if (!group.is_last_stage()) {
      kernels.stage_send(
          {.values = {values}, .row_bytes = {call_bytes() / options_.rows}, .num_values = 1},
          rank.ctx);
    }
    if (!is_first) kernels.stage_release(rank.ctx);
  }
}

void StageSendProbe::run(int32_t launches) {
  check(launches > 0, kWhere, "launches is ", launches, "; must be positive");
  ranks_[0].communicator->check_alive();
  if (ranks_[0].graph == nullptr) {
    capture_graphs(ranks_, [this](Rank& rank) { launch_calls(rank); });
  }
  run_ranks(size(), -1, [&](int i) {
    Rank& rank = ranks_[static_cast<size_t>(i)];
    run_on_stream(*rank.device, [&] {
      for (int32_t launch = 0; launch < launches; ++launch) rank.device->launch(*rank.graph);
    });
  });
  ranks_[0].communicator->check_alive();
}

std::vector<float> StageSendProbe::received(int rank) {
  check(rank > 0 && rank < size(), kWhere, "rank ", rank, " takes no values");
  Rank& of = ranks_[static_cast<size_t>(rank)];
  std::vector<char> bytes(static_cast<size_t>(call_bytes()));
  of.device->copy_out(bytes.data(), of.received.data(), bytes.size());
  return loaded_values(bytes, options_.dtype);
}

std::vector<double> StageSendProbe::time(int32_t repeats, int32_t launches) {
  run(launches);  // warms up
  std::vector<double> seconds = time_graphs(ranks_, repeats, launches);
  for (double& spent : seconds) spent /= options_.calls;
  ranks_[0].communicator->check_alive();
  return seconds;
}

}  // namespace mrv1
