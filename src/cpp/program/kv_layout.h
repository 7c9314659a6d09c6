// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace mrv1 {

// Layers whose attention sees the same positions. A group has a block table of its own, so that
// blocks that its window has left behind can be given back.
struct KvGroup {
  int32_t window = 0;  // 0: all positions
};

// Where a layer's keys and values lie: in the blocks of a group, at one of its places.
struct KvPlace {
  int32_t group = 0, slot = 0;
};

// How layers share KV memory. A block id names room for the keys and values of `num_slots` layers,
// whichever group it is taken for, so that all groups draw on one pool of blocks.
struct KvLayout {
  std::vector<KvGroup> groups;
  std::vector<KvPlace> layers;  // by kv layer
  int32_t num_slots = 0;

  // For each slot, the first layer that lies there.
  std::vector<size_t> slot_layers() const;
  // The groups with a window: the first and how many follow it, itself included.
  std::pair<int32_t, int32_t> groups_of(int32_t window) const;
};

// Layers with one window make one or several groups of as many layers as the rarest window has:
// groups of unlike sizes would leave slots of their blocks unused. Groups with one window follow
// each other. Windows by kv layer.
KvLayout kv_layout(std::span<const int32_t> windows);

// The layout for some layers of a model, by kv layer: its groups, so that all parts of the model
// have the same block tables, and slots for these layers alone, as many as any group has here. A
// group may have none.
KvLayout part_of(const KvLayout& whole, std::span<const int32_t> layers);

}  // namespace mrv1
