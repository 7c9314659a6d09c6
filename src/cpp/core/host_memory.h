// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>

#include "core/device.h"

namespace mrv1 {

// Memory of the host that this process may use: what the kernel calls available, or less where a
// control group (version 2 or 1) of the process or a parent of it limits memory. File pages that
// the kernel would drop first count as free. Files are read below `root`: "/", or a copy in tests.
MemoryInfo read_host_memory(const std::filesystem::path& root);

}  // namespace mrv1
