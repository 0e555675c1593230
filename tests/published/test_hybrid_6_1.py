"""Six Gated DeltaNet layers to one of softmax attention."""

from __future__ import annotations

import pytest

import archspec

from .plain import SMALL_HEADS, hold
from .test_gated_deltanet import gated_delta_net
from .test_transformer import attention


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_layers_of_both_kinds(backend: str) -> None:
    hold("hybrid_6_1", gated_delta_net, backend, layer=5, narrow=SMALL_HEADS)
    hold("hybrid_6_1", attention, backend, layer=6, narrow=SMALL_HEADS)


def test_every_seventh_layer_attends() -> None:
    assert list(archspec.load("hybrid_6_1").layout.names()) == 2 * [*6 * ["main"], "attention"]
