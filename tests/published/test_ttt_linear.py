"""TTT-Linear (Sun et al. 2024), section 2: mini-batches of 16, the step of each token divided by its index there."""

from __future__ import annotations

import pytest

from .plain import hold
from .ttt import ttt


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_ttt_linear(backend: str) -> None:
    hold("ttt_linear", lambda x, p: ttt(x, p, 1 / 64), backend)
