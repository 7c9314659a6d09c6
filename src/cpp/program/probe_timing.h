// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <vector>

#include "core/device.h"

namespace mrv1 {

// Seconds of each of `repeats` runs of work(), after one that warms up, on a GPU after 0.1 s of
// them. There a run is one graph of what work() launches, timed by the GPU's clock.
std::vector<double> time_probe(Device& device, const std::function<void()>& work, int32_t repeats);

}  // namespace mrv1
