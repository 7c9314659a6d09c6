# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The version of the package: the one place that holds it."""

__version__ = "0.1.0.dev0"
