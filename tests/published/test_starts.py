"""Memories whose weights pass a link begin well: their first steps change what they start from, and do not erase it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import archspec
from archspec import loading
from archspec.search.baselines import resized

LENGTH, VOCABULARY, PARAMETERS = 128, 64, 40_000


@pytest.mark.parametrize("name", ["yaad", "moneta", "memora"])
def test_first_steps_change_weights_and_keep_their_start(name: str) -> None:
    path = loading.find(name, Path())
    document, _ = resized(loading.resolve(loading.read(path), path.parent), PARAMETERS, VOCABULARY)
    model = archspec.compile(loading.validate(document), vocab_size=VOCABULARY, seed=0)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        state = model(tokens).state.tensors
        for mixer in model.memory_mixers():
            for weight, start in mixer.memory.start().items():
                moved = (state[f"{mixer.path}.dual.{weight}"] - start).norm(dim=(-2, -1)) / start.norm(dim=(-2, -1))
                share = float(moved.mean())
                assert 0.01 < share < 1.0, f"{mixer.path}: {weight} moves by {share:.3g} of its start"
