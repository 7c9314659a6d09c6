// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "program/kv_layout.h"

#include <algorithm>
#include <map>

namespace mrv1 {

KvLayout kv_layout(std::span<const int32_t> windows) {
  KvLayout layout;
  std::map<int32_t, int32_t> count;
  for (int32_t window : windows) ++count[window];
  if (count.empty()) return layout;
  layout.num_slots = std::min_element(count.begin(), count.end(), [](const auto& a, const auto& b) {
                       return a.second < b.second;
                     })->second;
  std::map<int32_t, KvPlace> next;  // the place of a window's next layer
  for (int32_t window : windows) {
    const KvPlace first{static_cast<int32_t>(layout.groups.size()), 0};
    if (!next.try_emplace(window, first).second) continue;
    const int32_t groups = (count[window] + layout.num_slots - 1) / layout.num_slots;
    layout.groups.insert(layout.groups.end(), groups, {window});
  }
  for (int32_t window : windows) {
    KvPlace& place = next[window];
    layout.layers.push_back(place);
    if (++place.slot == layout.num_slots) place = {place.group + 1, 0};
  }
  return layout;
}

KvLayout part_of(const KvLayout& whole, std::span<const int32_t> layers) {
  KvLayout part;
  part.groups = whole.groups;
  std::vector<int32_t> next(whole.groups.size());  // slot of a group's next layer
  for (const int32_t layer : layers) {
    const int32_t group = whole.layers[layer].group;
    part.layers.push_back({group, next[group]++});
    part.num_slots = std::max(part.num_slots, next[group]);
  }
  return part;
}

std::vector<size_t> KvLayout::slot_layers() const {
  std::vector<size_t> found(static_cast<size_t>(num_slots));
  for (size_t i = layers.size(); i-- > 0;) found[static_cast<size_t>(layers[i].slot)] = i;
  return found;
}

std::pair<int32_t, int32_t> KvLayout::groups_of(int32_t window) const {
  const auto same = [&](const KvGroup& group) { return group.window == window; };
  const auto first = std::find_if(groups.begin(), groups.end(), same);
  return {static_cast<int32_t>(first - groups.begin()),
          static_cast<int32_t>(std::count_if(first, groups.end(), same))};
}

}  // namespace mrv1
