// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/kernels.h"

namespace mrv1 {

const Kernels& cuda_kernels();

}  // namespace mrv1
