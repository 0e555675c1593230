"""One thread of arithmetic a process: pytest-xdist already runs one process a core, and small tensors gain nothing."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
