"""What the tests of every kernel family share: comparing two forms in outputs and in every gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

Op = Callable[..., Sequence[Tensor | None]]
Agree = Callable[..., None]
Errors = Callable[..., dict[str, float]]

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


@contextlib.contextmanager
def _nan_filled(on: bool) -> Iterator[None]:
    """While ``on``, new tensors hold NaN: torch's deterministic mode fills them."""
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def triton_errors() -> Errors:
    """Return a function that compares an op's Triton form with its chunkwise form in fp64."""

    def errors(op: Op, inputs: Mapping[str, Tensor], cu_seqlens: Sequence[int] | None = None) -> dict[str, float]:
        """RMS ratio of every output and gradient. Outputs start as NaN, so that one never written shows."""
        device, dtype = inputs["q"].device, inputs["q"].dtype
        offsets = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=device)
        results: list[dict[str, Tensor]] = []
        for backend in ("triton", "chunked"):
            fast = backend == "triton"
            leaves = {name: (x if fast else x.double()).clone().requires_grad_() for name, x in inputs.items()}
            with _nan_filled(fast):
                outputs = op(**leaves, output_final_state=True, cu_seqlens=offsets, backend=backend)
                o, last = (x for x in outputs if x is not None)
                generator = torch.Generator(device).manual_seed(1)
                weights = [torch.randn(x.shape, generator=generator, device=device).to(dtype) for x in (o, last)]
                loss = sum((x * w.to(x.dtype)).sum() for x, w in zip((o, last), weights, strict=True))
                assert isinstance(loss, Tensor)
                gradients = torch.autograd.grad(loss, list(leaves.values()))
            results.append({"o": o, "last": last} | {f"d{n}": x for n, x in zip(leaves, gradients, strict=True)})
        return {name: relative_error(x.double(), results[1][name]) for name, x in results[0].items()}

    return errors
