// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "dist/stage_link.h"

#include <algorithm>

#include "core/error.h"
#include "dist/communicator.h"

namespace mrv1 {
namespace {

constexpr std::string_view kWhere = "stages";

std::string form(const StageValue& value) {
  return concat(value.cols, " columns of ", dtype_name(value.dtype));
}

bool has(const std::vector<StageValue>& values, const std::string& name) {
  return std::any_of(values.begin(), values.end(),
                     [&](const StageValue& value) { return value.name == name; });
}

// What `from` sends must be what `to` takes.
void check_boundary(const Communicator& from, const std::vector<StageValue>& sends,
                    const Communicator& to, const std::vector<StageValue>& receives) {
  for (const StageValue& value : sends) {
    check(has(receives, value.name), kWhere, from.name(), " sends '", value.name, "', which ",
          to.name(), " does not take");
  }
  for (const StageValue& value : receives) {
    check(has(sends, value.name), kWhere, to.name(), " takes '", value.name, "', which ",
          from.name(), " does not send");
  }
  check(sends.size() == receives.size(), kWhere, from.name(), " sends ", sends.size(),
        " values and ", to.name(), " takes ", receives.size(), ": one of them is there twice");
  for (size_t i = 0; i < sends.size(); ++i) {
    check(sends[i].name == receives[i].name, kWhere, "value ", i, " is '", sends[i].name,
          "' where ", from.name(), " sends it and '", receives[i].name, "' where ", to.name(),
          " takes it: their order differs");
    check(sends[i] == receives[i], kWhere, "'", sends[i].name, "' has ", form(sends[i]), " where ",
          from.name(), " sends it and ", form(receives[i]), " where ", to.name(), " takes it");
  }
}

void check_buffers(const Communicator& rank, const StageBuffers& own, const StageBuffers& first) {
  check(own.sends.size() <= kMaxStageValues, kWhere, rank.name(), " sends ", own.sends.size(),
        " values; at most ", kMaxStageValues, " cross a boundary");
  check(rank.stage() > 0 || own.receives.empty(), kWhere, rank.name(),
        " takes values, but there is no stage before it");
  check(!rank.is_last_stage() || own.sends.empty(), kWhere, rank.name(),
        " sends values, but there is no stage after it");
  check(own.received.size() == own.receives.size() &&
            std::find(own.received.begin(), own.received.end(), nullptr) == own.received.end(),
        kWhere, rank.name(), " must have a buffer for each of the ", own.receives.size(),
        " values that it takes");
  if (rank.is_last_stage()) return;
  check(own.outputs != nullptr && own.outputs_bytes > 0, kWhere, rank.name(),
        " has no place for the outputs of the last stage");
  // A step needs to know those of steps before it, never its own.
  check(own.num_slots >= 2, kWhere, rank.name(), " has ", own.num_slots,
        " slots for outputs; at least 2 are needed");
  check(own.outputs_bytes == first.outputs_bytes && own.num_slots == first.num_slots, kWhere,
        rank.name(), " has ", own.num_slots, " slots of ", own.outputs_bytes,
        " bytes for outputs, and rank 0 ", first.num_slots, " of ", first.outputs_bytes);
}

}  // namespace

void link_stages(std::span<Communicator* const> ranks, std::span<const StageBuffers> buffers) {
  check(!ranks.empty() && ranks.size() == buffers.size(), kWhere, "there are ", ranks.size(),
        " ranks and ", buffers.size(), " sets of buffers");
  const int size = ranks[0]->size(), num_stages = ranks[0]->num_stages();
  check(ranks.size() == static_cast<size_t>(size * num_stages), kWhere, "there are ", ranks.size(),
        " ranks; ", num_stages, " stages of ", size, " are needed");
  for (size_t i = 0; i < ranks.size(); ++i) {
    check(ranks[i]->global_rank() == static_cast<int>(i), kWhere, ranks[i]->name(), " is number ",
          i, ": ranks must be in the order of their group");
  }
  if (num_stages == 1) return;
  for (size_t i = 0; i < ranks.size(); ++i) check_buffers(*ranks[i], buffers[i], buffers[0]);
  for (size_t i = 0; i + size < ranks.size(); ++i) {
    check_boundary(*ranks[i], buffers[i].sends, *ranks[i + size], buffers[i + size].receives);
  }

  for (size_t i = 0; i < ranks.size(); ++i) {
    Communicator& rank = *ranks[i];
    const auto port_of = [&](int stage) {
      return ranks[static_cast<size_t>(stage * size + rank.rank())]->stage_port();
    };
    StageLink link;
    link.stage = rank.stage();
    link.num_stages = num_stages;
    link.counters = rank.stage_counters();
    link.port = rank.stage_port();
    link.last = port_of(num_stages - 1);
    link.outputs = static_cast<char*>(buffers[i].outputs);
    link.outputs_bytes = buffers[0].outputs_bytes;
    link.num_slots = buffers[0].num_slots;
    if (rank.stage() > 0) link.previous = port_of(rank.stage() - 1);
    if (rank.is_last_stage()) {
      for (int stage = 0; stage + 1 < num_stages; ++stage) {
        link.stage_outputs[stage] =
            static_cast<char*>(buffers[static_cast<size_t>(stage * size + rank.rank())].outputs);
      }
    } else {
      const std::vector<void*>& received = buffers[i + size].received;
      link.next = port_of(rank.stage() + 1);
      link.num_values = static_cast<int32_t>(received.size());
      std::copy(received.begin(), received.end(), link.next_values);
    }
    rank.link_ = std::make_unique<StageLink>(link);
  }
}

}  // namespace mrv1
