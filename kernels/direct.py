"""A differentiable call without a custom op, whose bookkeeping takes longer than small shapes take on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def direct(
    forward: Callable[..., Tensor | Sequence[Tensor]],
    backward: Callable[..., Sequence[Tensor]],
    save: Callable[..., None],
    differentiate: Callable[..., Any],
) -> Callable[..., Any]:
    """Return what runs eagerly as a custom op with the same forms would.

    Args:
        forward: returns the output, or it and the last state, which are differentiable, and what backward needs.
        backward: stands in for the custom op that is a function of its own, as ``ctx.backward_form``.
        save, differentiate: as given to the custom op's ``register_autograd``.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
            found = forward(*inputs)
            output = found if isinstance(found, Tensor) else tuple(found)
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*output[2:])
            save(ctx, inputs, output)
            ctx.backward_form = backward
            return output

        @staticmethod
        def backward(ctx, *gradients):  # type: ignore[no-untyped-def]
            return differentiate(ctx, *gradients)

    call: Callable[..., Any] = Direct.apply
    return call
