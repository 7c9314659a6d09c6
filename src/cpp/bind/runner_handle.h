// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "bind/handle.h"
#include "runner/model_runner.h"

namespace mrv1 {

struct RunnerHandle : Handle<ModelRunner> {
  using Handle::Handle;
};

}  // namespace mrv1
