"""Run every test marked ``interpreter`` in a process that had TRITON_INTERPRET=1 before Python started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_under_the_interpreter() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "interpreter",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).parent),
    ]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
