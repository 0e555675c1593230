"""What tests of fast forms share: a model away from its start, and holding a form to the recurrence that defines it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import archspec
from archspec.blocks.model import Output, SequenceModel
from archspec.loading import load

Loss = Callable[[Output], Tensor]
VOCABULARY = 11


def moved(model: SequenceModel, by: float, seed: int = 1) -> SequenceModel:
    """Return the model with every parameter moved away from its start, by ``by`` times a normal number."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def compiled(mapping: dict[str, Any], backend: str, by: float = 0.1) -> SequenceModel:
    """Return the document's model in fp64, away from its start."""
    model = archspec.compile(load(mapping), vocab_size=VOCABULARY, backend=backend, dtype=torch.float64)
    return moved(model, by)


def read_out(output: Output) -> Tensor:
    """A loss that sees every logit."""
    return output.logits.sin().sum()


def hold_to_the_recurrence(
    mapping: dict[str, Any],
    close: Callable[[Tensor | None, Tensor | None], None],
    *,
    by: float = 0.1,
    length: int,
    cut: int,
    steps: int,
    loss: Loss = read_out,
) -> None:
    """Check a document's fast form: outputs, states and every gradient, whole, split at ``cut`` and stepped."""
    fast, slow = compiled(mapping, "auto", by), compiled(mapping, "reference", by)
    x = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))
    found, wanted = fast(x), slow(x)
    close(found.logits, wanted.logits)
    assert found.state.tensors.keys() == wanted.state.tensors.keys()
    for path, tensor in wanted.state.tensors.items():
        close(found.state.tensors[path], tensor)
    for result in (found, wanted):
        loss(result).backward()  # type: ignore[no-untyped-call]
    for p, q in zip(fast.parameters(), slow.parameters(), strict=True):
        close(p.grad, q.grad)
    with torch.no_grad():
        head = fast(x[:, :cut])
        close(torch.cat([head.logits, fast(x[:, cut:], head.state).logits], 1), wanted.logits)
        state = None
        for t in range(steps):
            step = fast.step(x[:, t], state)
            state = step.state
            close(step.logits, wanted.logits[:, t])
