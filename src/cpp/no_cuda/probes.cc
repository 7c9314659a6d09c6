// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "core/probes.h"

#include "core/error.h"

namespace mrv1::cuda {
namespace {

[[noreturn]] void refuse() { fail(ErrorKind::kDevice, "probes", describe()); }

}  // namespace

double time_launches(Device&, const std::function<void()>&) { refuse(); }

void delay(Device&, uint64_t) { refuse(); }

void fill_words(Device&, uint64_t*, int64_t) { refuse(); }

void read_words(Device&, const uint64_t*, int64_t, uint64_t*) { refuse(); }

}  // namespace mrv1::cuda
