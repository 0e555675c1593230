"""Functions of tensors recorded as operations: the same numbers, fewer operations, and what cannot be recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from archspec.recording import CannotRecord, recorded


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(weight: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient step of a network, its gradient by a vector-Jacobian product."""

    def network(w: Tensor) -> Tensor:
        return torch.nn.functional.gelu(key @ w)

    pulled: Any = torch.func.vjp(network, weight)
    prediction, pull = pulled
    return weight * 1.0 + -pull(prediction)[0].transpose(1, 2).transpose(1, 2), prediction.reshape(prediction.shape)


def test_a_recorded_function_gives_the_same_numbers_for_other_arguments() -> None:
    run = recorded(step, [random(3, 4, 5), random(3, 1, 4)])
    weight, key = random(3, 4, 5, seed=1), random(3, 1, 4, seed=2)
    for found, wanted in zip(run(weight, key), step(weight, key), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)


def test_what_changes_nothing_is_left_out_and_what_is_said_twice_is_said_once() -> None:
    def function(x: Tensor) -> tuple[Tensor]:
        return (x.exp() + -(x.exp() * 1.0).view(x.shape).transpose(0, 1).transpose(0, 1),)

    run: Any = recorded(function, [random(3, 4)])
    calls = [node.target for node in run.__self__.graph.nodes if node.op == "call_function"]
    assert calls == [torch.exp, torch.sub]
    assert torch.equal(run(random(3, 4, seed=1))[0], torch.zeros(3, 4, dtype=torch.float64))


def test_parts_of_a_result_and_tensors_from_outside_are_recorded() -> None:
    outside = random(4, seed=3)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        largest, where = x.max(dim=0)
        return largest * outside, torch.ones_like(largest).mul_(2) * where

    run = recorded(function, [random(3, 4)])
    x = random(3, 4, seed=1)
    for found, wanted in zip(run(x), function(x), strict=True):
        assert torch.equal(found, wanted)


def test_gradients_pass_through_a_recorded_function() -> None:
    run = recorded(step, [random(3, 4, 5), random(3, 1, 4)])
    leaves = [random(3, 4, 5, seed=1).requires_grad_(), random(3, 1, 4, seed=2).requires_grad_()]
    found, wanted = (torch.autograd.grad(f(*leaves)[0].sin().sum(), leaves) for f in (run, step))
    for first, second in zip(found, wanted, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: (x if bool(x.sum() > 0) else -x,), "looks at the numbers"),
        (lambda x: (x * float(x[0, 0]),), "looks at the numbers"),
        (lambda x: (x.add_(1),), "writes into what was given"),
    ],
)
def test_what_cannot_be_recorded_is_said(function: Any, reason: str) -> None:
    with pytest.raises(CannotRecord, match=reason):
        recorded(function, [random(3, 4)])
