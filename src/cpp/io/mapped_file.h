// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>

namespace mrv1 {

// A file mapped read-only. A file that shrinks while it is mapped is the operator's fault; size and
// offsets are checked when the mapping is made and at each read.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  // [offset, offset + bytes) of the file; kWeights if it is not there.
  const void* read(size_t offset, size_t bytes) const;
  // The same into memory of the caller, past the mapping: no page of the file becomes resident in
  // the process. By any number of threads.
  void read_into(void* target, size_t offset, size_t bytes) const;
  // Gives the pages of the range back to the page cache: they no longer count as resident.
  void drop(size_t offset, size_t bytes) const;
  size_t size() const { return size_; }

 private:
  void check_range(size_t offset, size_t bytes) const;

  std::string path_;
  int fd_ = -1;
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace mrv1
