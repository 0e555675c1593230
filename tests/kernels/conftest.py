"""What the tests of every kernel family share: comparing two forms in outputs and in every gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

Op = Callable[..., Sequence[Tensor | None]]
Agree = Callable[..., None]

# fp64 carries 1.1e-16; sums over some hundred tokens, a triangular solve and the backward pass through both lose
# three to four digits (1e-12 is what is seen), and inputs of size one keep gradients away from cancellation.
RELATIVE_TOLERANCE = 1e-9


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted| / |wanted| in the Frobenius norm, or |found| where zero is wanted."""
    return float((found - wanted).detach().norm()) / (float(wanted.detach().norm()) or 1.0)


@pytest.fixture
def agree() -> Agree:
    """Return a check that two forms of one op agree in every output and in the gradient of every input."""

    def check(
        fast: Op,
        slow: Op,
        inputs: Mapping[str, Tensor],
        tolerance: float = RELATIVE_TOLERANCE,
    ) -> None:
        leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
        found = [x for x in fast(**leaves) if x is not None]
        wanted = [x for x in slow(**leaves) if x is not None]
        assert [x.shape for x in found] == [x.shape for x in wanted]
        for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
            assert torch.isfinite(y).all()
            assert relative_error(x, y) < tolerance, f"output {i}"
        moving = [i for i, y in enumerate(wanted) if y.requires_grad]
        weights = [torch.randn(wanted[i].shape, dtype=wanted[i].dtype) for i in moving]
        results = [
            torch.autograd.grad([outs[i] for i in moving], list(leaves.values()), grad_outputs=weights)
            for outs in (found, wanted)
        ]
        for name, x, y in zip(leaves, *results, strict=True):
            assert torch.isfinite(y).all()
            assert relative_error(x, y) < tolerance, f"gradient of {name}"

    return check
