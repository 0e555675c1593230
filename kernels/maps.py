"""Linear maps of one tensor whose gradient is added up by the products that make its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class _Maps(torch.autograd.Function):
    """x W_i + b_i for several i: dx = sum_i dy_i W_i^T, where a product writes over the sum of those before it.

    Autograd adds the parts up by themselves, each time reading two tensors of x's size and writing one; the product
    reads one and writes one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, count: int, *factors: Any) -> tuple[Tensor, ...]:
        return tuple(_mapped(x, *pair) for pair in zip(factors[:count], factors[count:], strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.count, *factors = inputs
        ctx.save_for_backward(x, *factors[: ctx.count])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        rows = x.reshape(-1, x.shape[-1])
        dx: Tensor | None = None
        found: list[Tensor | None] = [None] * (2 * ctx.count)
        # From the narrowest: the first product has no sum to read, which only those of wide maps can hide.
        for i in sorted(range(ctx.count), key=lambda i: weights[i].shape[-1]):
            dy = dys[i]
            if dy is None:
                continue
            dy = dy.reshape(-1, dy.shape[-1])
            if needs_x:
                dx = _added(dx, dy, weights[i].t())
            if needs[i]:
                found[i] = rows.t() @ dy
            if needs[ctx.count + i]:
                found[ctx.count + i] = dy.sum(0)
        return None if dx is None else dx.view(x.shape), None, *found


def _mapped(x: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
    return x @ weight if offset is None else functional.linear(x, weight.t(), offset)


def _added(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return total + left right, written over the total where no derivative of it will be asked for."""
    if total is None:
        return left @ right
    return torch.addmm(total, left, right) if torch.is_grad_enabled() else total.addmm_(left, right)


def linear_maps(x: Tensor, factors: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, ...]:
    """Return x W + b for every (W, b) of ``factors``, as torch computes them one by one.

    Without a gradient, traced by ``torch.compile`` (which fuses the sums itself) and under autocast (where they are of
    fp32) they are torch's own.

    Args:
        x: [..., D].
        factors: weights [D, n] and offsets [n] or None.
    """
    ours = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    if not ours or torch.is_autocast_enabled(x.device.type):
        return tuple(_mapped(x, *pair) for pair in factors)
    weights, offsets = zip(*factors, strict=True)
    found: tuple[Tensor, ...] = _Maps.apply(x, len(weights), *weights, *offsets)  # type: ignore[no-untyped-call]
    return found
