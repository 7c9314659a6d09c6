// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// Found before CUTLASS's header of this name, which declares the GEMM main loops of every
// architecture. FlashInfer includes it for the layout selectors and copies of Hopper alone.
#pragma once

#include <cutlass/arch/memory.h>
#include <cutlass/arch/mma.h>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/builders/sm90_common.inl>
