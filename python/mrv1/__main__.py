# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""`python -m mrv1`, the same as the command `mrv1`."""

from __future__ import annotations

import sys

from mrv1.cli import main

sys.exit(main())
