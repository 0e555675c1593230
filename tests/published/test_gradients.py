"""Every shipped model begins to train: with inner steps too long, gradients explode as sequences grow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import archspec
from archspec import loading
from archspec.search.baselines import resized

LENGTH, VOCABULARY, PARAMETERS = 128, 64, 40_000
LARGEST = 500.0  # of the norm of all gradients together; models that learn have 1 to 50, those that do not 1e4 and more


@pytest.mark.parametrize("name", sorted(path.stem for path in loading.MODELS.glob("*.yaml")))
def test_first_gradient_is_moderate(name: str) -> None:
    path = loading.find(name, Path())
    document, _ = resized(loading.resolve(loading.read(path), path.parent), PARAMETERS, VOCABULARY)
    model = archspec.compile(loading.validate(document), vocab_size=VOCABULARY, seed=0)
    tokens = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    output = model(tokens[:, :-1])
    loss = cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    assert norm < LARGEST, f"the gradients' norm is {norm:.3g} at a loss of {float(loss.detach()):.3g}"
