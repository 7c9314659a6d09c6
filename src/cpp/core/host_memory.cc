// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "core/host_memory.h"

#include <algorithm>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>

#include "core/error.h"

namespace mrv1 {
namespace {

namespace fs = std::filesystem;

// The number after `key` in a file of "key number" lines.
std::optional<size_t> keyed_number(const fs::path& path, std::string_view key) {
  std::ifstream file(path);
  std::string name, rest;
  size_t value = 0;
  while (file >> name >> value) {
    if (name == key) return value;
    std::getline(file, rest);
  }
  return std::nullopt;
}

// The number that a file holds; nothing for "max" or no file.
std::optional<size_t> number(const fs::path& path) {
  std::ifstream file(path);
  size_t value = 0;
  if (file >> value) return value;
  return std::nullopt;
}

struct GroupFiles {
  const char* limit;
  const char* usage;
  const char* droppable;  // key of memory.stat
};
constexpr GroupFiles kVersion2 = {"memory.max", "memory.current", "inactive_file"};
constexpr GroupFiles kVersion1 = {"memory.limit_in_bytes", "memory.usage_in_bytes",
                                  "total_inactive_file"};

// Lowers `info` to what the groups from `group` up to the mount leave. Inside a container the
// process may be named by a path that only the host has; the mount is then its own group.
void apply_limits(const fs::path& mount, fs::path group, const GroupFiles& files,
                  MemoryInfo& info) {
  for (group = group.relative_path();; group = group.parent_path()) {
    const fs::path directory = mount / group;
    const std::optional<size_t> limit = number(directory / files.limit);
    const std::optional<size_t> usage = number(directory / files.usage);
    if (limit && usage) {
      const size_t droppable = keyed_number(directory / "memory.stat", files.droppable).value_or(0);
      const size_t held = *usage - std::min(droppable, *usage);
      info.total_bytes = std::min(info.total_bytes, *limit);
      info.free_bytes = std::min(info.free_bytes, *limit - std::min(held, *limit));
    }
    if (group.empty()) return;
  }
}

}  // namespace

MemoryInfo read_host_memory(const fs::path& root) {
  const fs::path meminfo = root / "proc/meminfo";
  MemoryInfo info{keyed_number(meminfo, "MemAvailable:").value_or(0) * 1024,
                  keyed_number(meminfo, "MemTotal:").value_or(0) * 1024};
  const fs::path mount = root / "sys/fs/cgroup";
  // Lines are "hierarchy:controllers:path"; version 2 has hierarchy 0 and no controllers.
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = concat(",", line.substr(first + 1, second - first - 1), ",");
    const std::string group = line.substr(second + 1);
    if (controllers == ",,") {
      apply_limits(mount, group, kVersion2, info);
    } else if (controllers.find(",memory,") != std::string::npos) {
      apply_limits(mount / "memory", group, kVersion1, info);
    }
  }
  return info;
}

}  // namespace mrv1
