"""Linear maps of one tensor against torch's own, one by one: values, gradients, second gradients, under transforms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from archspec.kernels.maps import linear_maps

Call = Callable[..., tuple[Tensor, ...]]


def together(x: Tensor, a: Tensor, b: Tensor, c: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
    return linear_maps(x, [(a, None), (b, offset), (c, None)])


def one_by_one(x: Tensor, a: Tensor, b: Tensor, c: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
    return x @ a, torch.nn.functional.linear(x, b.t(), offset), x @ c


def draw(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (2, 3, 5)) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (shape, (5, 4), (5, 7), (5, 1), (7,))
    return [torch.randn(size, dtype=dtype).requires_grad_() for size in shapes]


def summed(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([y.sin().sum() * (i + 1) for i, y in enumerate(outputs)]).sum()


def gradients(call: Call, leaves: list[Tensor], used: tuple[int, ...] = (0, 1, 2)) -> list[Tensor | None]:
    outputs = call(*leaves)
    return list(torch.autograd.grad(summed(tuple(outputs[i] for i in used)), leaves, allow_unused=True))


@pytest.mark.parametrize("used", [(0, 1, 2), (1,), (0, 2)], ids=str)
def test_gradients_are_those_of_the_maps_one_by_one(used: tuple[int, ...]) -> None:
    leaves = draw()
    for found, wanted in zip(gradients(together, leaves, used), gradients(one_by_one, leaves, used), strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(found, wanted)


def test_what_is_frozen_gets_no_gradient() -> None:
    leaves = draw()
    for frozen in (leaves[0], leaves[2]):
        frozen.requires_grad_(False)
        live = [leaf for leaf in leaves if leaf.requires_grad]
        found, wanted = (torch.autograd.grad(summed(call(*leaves)), live) for call in (together, one_by_one))
        torch.testing.assert_close(found, wanted)
        frozen.requires_grad_()


def test_first_and_second_derivatives() -> None:
    assert torch.autograd.gradcheck(together, draw())
    assert torch.autograd.gradgradcheck(together, draw())


def test_a_second_pass_finds_the_same() -> None:
    leaves = draw()
    loss = summed(together(*leaves))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(first, torch.autograd.grad(loss, leaves), strict=True))


def test_the_gradient_is_added_up_by_the_products() -> None:
    leaves = draw(torch.float32, (64, 5))
    outputs = together(*leaves)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    named = {event.key for event in profile.key_averages()}
    assert "aten::addmm_" in named
    assert not {"aten::add", "aten::add_"} & named


def test_under_autocast_they_are_torchs_own() -> None:
    leaves = draw(torch.float32)
    results = []
    for call in (together, one_by_one):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = call(*leaves)
        assert outputs[0].dtype is torch.bfloat16
        results.append(torch.autograd.grad(summed(outputs), leaves))
    torch.testing.assert_close(*results)


def test_compiled_without_graph_breaks() -> None:
    leaves = draw(torch.float32)
    compiled = torch.compile(together, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(gradients(compiled, leaves), gradients(one_by_one, leaves), strict=True):
        torch.testing.assert_close(found, wanted)


def test_under_function_transforms() -> None:
    x, *factors = (leaf.detach() for leaf in draw())

    def loss(row: Tensor) -> Tensor:
        return summed(together(row, *factors))

    found = torch.func.vmap(torch.func.grad(loss))(x)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(summed(one_by_one(leaf, *factors)), leaf)
    torch.testing.assert_close(found, wanted)
