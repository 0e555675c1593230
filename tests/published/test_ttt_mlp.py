"""TTT-MLP (Sun et al. 2024), section 2: mini-batches of 16, the step of each token divided by its index there."""

from __future__ import annotations

import pytest

from .plain import hold
from .ttt import ttt


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_ttt_mlp(backend: str) -> None:
    hold("ttt_mlp", lambda x, p: ttt(x, p, 0.1 / 64), backend)
