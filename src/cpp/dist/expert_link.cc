// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "dist/expert_link.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "core/error.h"
#include "dist/communicator.h"

namespace mrv1 {

void link_experts(std::span<Communicator* const> ranks, std::span<const ExpertBuffers> buffers,
                  int set) {
  constexpr std::string_view kWhere = "experts";
  check(!ranks.empty() && ranks.size() == buffers.size(), kWhere, "there are ", ranks.size(),
        " ranks and ", buffers.size(), " sets of buffers");
  check(static_cast<int>(ranks.size()) == ranks[0]->size(), kWhere, "there are ", ranks.size(),
        " ranks; a group of ", ranks[0]->size(), " needs all of them");
  check(set >= 0 && set < kMaxExpertSets, kWhere, "set is ", set, "; must be in [0, ",
        kMaxExpertSets, ")");
  ExpertLink link;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    const ExpertBuffers& own = buffers[rank];
    check(ranks[rank]->rank() == static_cast<int>(rank), kWhere, ranks[rank]->name(), " is number ",
          rank, ": ranks must be in the order of their group");
    const auto same = [&](int64_t value, int64_t first, const char* name) {
      check(value == first, kWhere, ranks[rank]->name(), " has ", name, " = ", value,
            ", and rank 0 has ", first);
    };
    same(own.region_rows, buffers[0].region_rows, "region_rows");
    same(own.hidden, buffers[0].hidden, "hidden");
    same(own.top_k, buffers[0].top_k, "top_k");
    check(own.dtype == buffers[0].dtype && own.sum_dtype == buffers[0].sum_dtype, kWhere,
          ranks[rank]->name(), " has other dtypes than rank 0");
    check(own.x != nullptr && own.experts != nullptr && own.weights != nullptr &&
              own.counts != nullptr && own.sums != nullptr,
          kWhere, ranks[rank]->name(), " lacks a buffer");
    link.ranks[rank] = own;
  }
  std::vector<ExpertLink> links(ranks.size(), link);
  ranks[0]->stage_experts(links);
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    ranks[rank]->expert_links_[set] = std::make_unique<ExpertLink>(links[rank]);
  }
}

}  // namespace mrv1
