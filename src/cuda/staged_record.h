// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "clock.cuh"
#include "state/control_record.h"

namespace mrv1::cuda {

// What apply() leaves in StepRings::staged for the phases after it: the record's header, whose
// entries_offset is kStagedEntries, the time the step began, and the batch entries.
struct StagedRecord {
  ControlHeader header;
  uint64_t begin_ns;
};
constexpr uint32_t kStagedEntries = 128;
static_assert(sizeof(StagedRecord) <= kStagedEntries && kStagedEntries % 16 == 0);
static_assert(sizeof(BatchEntry) == 16, "an entry moves with one load and one store");

__device__ __forceinline__ const BatchEntry* staged_entries(const StagedRecord* staged) {
  return record_array<BatchEntry>(&staged->header, kStagedEntries);
}

}  // namespace mrv1::cuda
