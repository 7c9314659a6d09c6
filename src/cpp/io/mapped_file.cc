// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

#include "core/error.h"

namespace mrv1 {

MappedFile::MappedFile(const std::string& path) : path_(path) {
  fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd_ < 0) fail(ErrorKind::kWeights, "weights", path, ": ", std::strerror(errno));
  struct stat info{};
  if (fstat(fd_, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(fd_);
    fail(ErrorKind::kWeights, "weights", path, ": not a regular file");
  }
  size_ = static_cast<size_t>(info.st_size);
  if (size_ > 0) {
    data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd_, 0);
    if (data_ == MAP_FAILED) {
      const int error = errno;
      close(fd_);
      fail(ErrorKind::kWeights, "weights", path, ": cannot map ", size_,
           " bytes: ", std::strerror(error));
    }
    madvise(data_, size_, MADV_SEQUENTIAL);
  }
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(data_, size_);
  close(fd_);
}

void MappedFile::check_range(size_t offset, size_t bytes) const {
  if (offset > size_ || bytes > size_ - offset) {
    fail(ErrorKind::kWeights, "weights", path_, ": bytes [", offset, ", ", offset + bytes,
         ") are past the end of the file (", size_, " bytes)");
  }
}

const void* MappedFile::read(size_t offset, size_t bytes) const {
  check_range(offset, bytes);
  return static_cast<const char*>(data_) + offset;
}

void MappedFile::read_into(void* target, size_t offset, size_t bytes) const {
  check_range(offset, bytes);
  char* next = static_cast<char*>(target);
  while (bytes > 0) {
    const ssize_t count = pread(fd_, next, bytes, static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      fail(ErrorKind::kWeights, "weights", path_, ": cannot read at byte ", offset, ": ",
           count == 0 ? "the file has become shorter" : std::strerror(errno));
    }
    next += count;
    offset += static_cast<size_t>(count);
    bytes -= static_cast<size_t>(count);
  }
}

void MappedFile::drop(size_t offset, size_t bytes) const {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t first = offset / page * page;
  if (data_ != nullptr && offset + bytes <= size_) {
    madvise(static_cast<char*>(data_) + first, offset + bytes - first, MADV_DONTNEED);
  }
}

}  // namespace mrv1
