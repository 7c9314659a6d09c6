// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "core/host_memory.h"

#include <doctest/doctest.h>
#include <stdlib.h>

#include <fstream>
#include <string>

namespace mrv1 {
namespace {

namespace fs = std::filesystem;

constexpr size_t kGiB = size_t{1} << 30;

// A root directory with the files that the kernel would show: 64 GiB of memory, 48 available.
class FakeRoot {
 public:
  FakeRoot() {
    std::string name = (fs::temp_directory_path() / "mrv1-root-XXXXXX").string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path_ = name;
    write("proc/meminfo",
          "MemTotal:       67108864 kB\nMemFree:         1048576 kB\n"
          "MemAvailable:   50331648 kB\nHugePages_Total:       0\nHugepagesize:       2048 kB\n");
  }
  ~FakeRoot() { fs::remove_all(path_); }

  void write(const std::string& name, const std::string& text) const {
    fs::create_directories((path_ / name).parent_path());
    std::ofstream(path_ / name) << text;
  }
  // A group of version 2 below `name`.
  void write_group(const std::string& name, const std::string& max, size_t current) const {
    write("sys/fs/cgroup/" + name + "/memory.max", max + "\n");
    write("sys/fs/cgroup/" + name + "/memory.current", std::to_string(current) + "\n");
  }
  void check(size_t free_bytes, size_t total_bytes) const {
    const MemoryInfo info = read_host_memory(path_);
    CHECK(info.free_bytes == free_bytes);
    CHECK(info.total_bytes == total_bytes);
  }

 private:
  fs::path path_;
};

TEST_CASE("memory of the host without control groups") {
  FakeRoot root;
  root.check(48 * kGiB, 64 * kGiB);
  root.write("proc/self/cgroup", "0::/user.slice\n");
  root.check(48 * kGiB, 64 * kGiB);  // the group has no memory controller
}

TEST_CASE("memory under a control group of version 2") {
  FakeRoot root;
  root.write("proc/self/cgroup", "0::/service/worker\n");
  root.write_group("service/worker", "max", 3 * kGiB);
  root.check(48 * kGiB, 64 * kGiB);
  root.write_group("service/worker", std::to_string(8 * kGiB), 3 * kGiB);
  root.check(5 * kGiB, 8 * kGiB);
  // A parent may leave less, or more.
  root.write_group("service", std::to_string(12 * kGiB), 11 * kGiB);
  root.check(1 * kGiB, 8 * kGiB);
  root.write_group("service", std::to_string(12 * kGiB), 1 * kGiB);
  root.check(5 * kGiB, 8 * kGiB);
  // Pages of files that were read are dropped before anything fails.
  root.write("sys/fs/cgroup/service/worker/memory.stat",
             "anon 5\nactive_file 7\ninactive_file 1073741824\n");
  root.check(6 * kGiB, 8 * kGiB);
  root.write_group("service/worker", std::to_string(8 * kGiB), 9 * kGiB);
  root.check(0, 8 * kGiB);
  // More than there is: the host's own numbers count.
  root.write_group("service", "max", 0);
  root.write_group("service/worker", std::to_string(100 * kGiB), 2 * kGiB);
  root.check(48 * kGiB, 64 * kGiB);
}

TEST_CASE("memory in a container whose group is the root of the mount") {
  for (const char* group : {"/", "/kubepods/pod1/only-the-host-knows"}) {
    FakeRoot root;
    root.write("proc/self/cgroup", std::string("0::") + group + "\n");
    root.write_group(".", std::to_string(4 * kGiB), 1 * kGiB);
    root.check(3 * kGiB, 4 * kGiB);
  }
}

TEST_CASE("memory under a control group of version 1") {
  FakeRoot root;
  root.write("proc/self/cgroup", "7:cpu,cpuacct:/a\n5:blkio,memory:/docker/abc\n0::/\n");
  const std::string group = "sys/fs/cgroup/memory/docker/abc/";
  root.write(group + "memory.limit_in_bytes", "9223372036854771712\n");  // none
  root.write(group + "memory.usage_in_bytes", std::to_string(2 * kGiB) + "\n");
  root.check(48 * kGiB, 64 * kGiB);
  root.write(group + "memory.limit_in_bytes", std::to_string(10 * kGiB) + "\n");
  root.check(8 * kGiB, 10 * kGiB);
  root.write(group + "memory.stat", "cache 1\ntotal_inactive_file 536870912\n");
  root.check(8 * kGiB + kGiB / 2, 10 * kGiB);
}

TEST_CASE("memory of this machine") {
  const MemoryInfo info = read_host_memory("/");
  CHECK(info.free_bytes > 0);
  CHECK(info.free_bytes <= info.total_bytes);
}

}  // namespace
}  // namespace mrv1
