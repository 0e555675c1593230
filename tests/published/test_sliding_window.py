"""Attention over the last tokens, the current one included (Longformer, section 3.1)."""

from __future__ import annotations

import pytest
from torch import Tensor

import archspec

from .plain import Parameters, hold
from .test_transformer import attention


def windowed(x: Tensor, p: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
    """Softmax attention whose sum starts at t - 23; only what the next token may see is kept."""
    return attention(x, p, window=24)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sliding_window(backend: str) -> None:
    hold("sliding_window", windowed, backend, length=70)


def test_the_shipped_window_is_128() -> None:
    mixer = archspec.load("sliding_window").blocks["main"].mixer
    assert mixer.dump()["memory"]["window"] == 128
