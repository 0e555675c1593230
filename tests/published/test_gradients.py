"""Every shipped model begins to train: its gradients do not explode, and 16 bits do not reach what memories keep."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import archspec
from archspec import loading
from archspec.search.baselines import resized

LENGTH, VOCABULARY, PARAMETERS = 128, 64, 40_000
LARGEST = 500.0  # of the norm of all gradients together; models that learn have 1 to 50, those that do not 1e4 and more


NAMES = sorted(path.stem for path in loading.MODELS.glob("*.yaml"))
# What a memory keeps between tokens, but for the tokens it may store.
MEMORY = re.compile(r"\.(dual|anchor|momentum|linear|steps|covariance|statistics)\.")


def small(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a shipped model of about as many parameters."""
    path = loading.find(name, Path())
    document, _ = resized(loading.resolve(loading.read(path), path.parent), PARAMETERS, VOCABULARY)
    model: nn.Module = archspec.compile(loading.validate(document), vocab_size=VOCABULARY, seed=0, dtype=dtype)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_first_gradient_is_moderate(name: str) -> None:
    model = small(name)
    tokens = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    output = model(tokens[:, :-1])
    loss = cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    assert norm < LARGEST, f"the gradients' norm is {norm:.3g} at a loss of {float(loss.detach()):.3g}"


@pytest.mark.parametrize("name", NAMES)
def test_in_16_bits_memories_stay_wide(name: str) -> None:
    """Under autocast a model trains as on a GPU, and made of bf16 it runs: what memories keep is not rounded to it."""
    tokens = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    model = small(name)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tokens)
    loss = cross_entropy(output.logits.float().flatten(0, 1), tokens.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        narrow = small(name, torch.bfloat16)(tokens)
    assert narrow.logits.isfinite().all()
    for state in (output.state, narrow.state):
        kept = {key: x.dtype for key, x in state.tensors.items() if MEMORY.search(key)}
        assert set(kept.values()) <= {torch.float32}, kept
