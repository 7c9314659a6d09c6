# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Single ops on CuPy arrays, in a stream of CuPy's: a norm and a gated product.

    python examples/ops_cupy.py

Needs CuPy and a GPU.
"""

from __future__ import annotations

import cupy

from mrv1 import ops

ROWS, HIDDEN, SIZE = 4, 256, 512


def main() -> None:
    """Runs a norm and a gated product, and compares with CuPy."""
    rng = cupy.random.default_rng(0)
    x = rng.standard_normal((ROWS, HIDDEN), dtype=cupy.float32)
    gain = cupy.ones(HIDDEN, cupy.float32)
    gate_up = rng.standard_normal((2 * SIZE, HIDDEN), dtype=cupy.float32) / HIDDEN**0.5
    weight = ops.pack_linear(gate_up)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        normed = ops.rms_norm(x, gain, eps=1e-6, stream=stream)
        hidden = ops.silu_mul(ops.linear(normed, weight, stream=stream), stream=stream)
        stream.synchronize()

    expected = x / cupy.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    gate, up = cupy.split(expected @ gate_up.T, 2, axis=1)
    expected = gate / (1 + cupy.exp(-gate)) * up
    print("differs from CuPy by at most", float(cupy.abs(hidden - expected).max()))


if __name__ == "__main__":
    main()
