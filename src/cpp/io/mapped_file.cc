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
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail(ErrorKind::kWeights, "weights", path, ": ", std::strerror(errno));
  struct stat info{};
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(fd);
    fail(ErrorKind::kWeights, "weights", path, ": not a regular file");
  }
  size_ = static_cast<size_t>(info.st_size);
  if (size_ > 0) {
    data_ = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data_ == MAP_FAILED) {
      const int error = errno;
      close(fd);
      fail(ErrorKind::kWeights, "weights", path, ": cannot map ", size_,
           " bytes: ", std::strerror(error));
    }
    madvise(data_, size_, MADV_SEQUENTIAL);
  }
  close(fd);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(data_, size_);
}

const void* MappedFile::read(size_t offset, size_t bytes) const {
  if (offset > size_ || bytes > size_ - offset) {
    fail(ErrorKind::kWeights, "weights", path_, ": bytes [", offset, ", ", offset + bytes,
         ") are past the end of the file (", size_, " bytes)");
  }
  return static_cast<const char*>(data_) + offset;
}

void MappedFile::drop(size_t offset, size_t bytes) const {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t first = offset / page * page;
  if (data_ != nullptr && offset + bytes <= size_) {
    madvise(static_cast<char*>(data_) + first, offset + bytes - first, MADV_DONTNEED);
  }
}

}  // namespace mrv1
