"""act(gate) * up as one Triton kernel forward and one backward: what a gated feed-forward does between its matrices.

With the matrix after it, the product is not kept: the backward kernel makes it again beside the gradients.
"""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from archspec.kernels.direct import direct
from archspec.kernels.pointwise.activation_fused import ACTIVATION, activate, activate_slope

BLOCK = 2048
"""Elements a program: 16 a thread, two loads of 16 bytes of each bf16 input."""


@triton.jit
def _product_forward(gate, up, out, size, ACT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < size
    z = tl.load(gate + at, mask=keep, other=0.0).to(tl.float32)
    y = tl.load(up + at, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + at, (activate(z, ACT) * y).to(out.dtype.element_ty), mask=keep)


@triton.jit
def _product_backward(gate, up, dout, dgate, dup, again, size, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients and, given ``again`` (which may be ``dout``), the product."""
    at = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < size
    z = tl.load(gate + at, mask=keep, other=0.0).to(tl.float32)
    y = tl.load(up + at, mask=keep, other=0.0).to(tl.float32)
    gradient = tl.load(dout + at, mask=keep, other=0.0).to(tl.float32)
    opened = activate(z, ACT)
    tl.store(dgate + at, (gradient * y * activate_slope(z, ACT)).to(dgate.dtype.element_ty), mask=keep)
    tl.store(dup + at, (gradient * opened).to(dup.dtype.element_ty), mask=keep)
    if again is not None:
        tl.store(again + at, (opened * y).to(again.dtype.element_ty), mask=keep)


def product_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    out = torch.empty_like(up)
    grid = (-(-up.numel() // BLOCK),)
    _product_forward[grid](gate, up, out, up.numel(), ACT=ACTIVATION[activation], BLOCK=BLOCK, num_warps=4)
    return out


_product_op = torch.library.custom_op("archspec::gated_product_forward", product_forward, mutates_args=())


@_product_op.register_fake
def _product_fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(up)


def product_backward(dout: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    return _gradients(dout, gate, up, activation, None)


def _gradients(dout: Tensor, gate: Tensor, up: Tensor, activation: str, again: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, and leave their product in ``again``."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    grid = (-(-up.numel() // BLOCK),)
    act = ACTIVATION[activation]
    _product_backward[grid](gate, up, dout, dgate, dup, again, up.numel(), ACT=act, BLOCK=BLOCK, num_warps=4)
    return dgate, dup


_product_backward_op = torch.library.custom_op("archspec::gated_product_backward", product_backward, mutates_args=())


@_product_backward_op.register_fake
def _product_backward_fake(dout: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)
    ctx.backward_form = _product_backward_op


def _differentiate(ctx, dout):  # type: ignore[no-untyped-def]
    gate, up = ctx.saved_tensors
    return *ctx.backward_form(dout.contiguous(), gate, up, ctx.activation), None


_product_op.register_autograd(_differentiate, setup_context=_save)


_direct = direct(product_forward, product_backward, _save, _differentiate)


def gated_product_fused(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Run the Triton form; arguments as in `archspec.kernels.pointwise.gated_product`, checked there."""
    run = _product_op if torch.compiler.is_compiling() else _direct
    out: Tensor = run(gate.contiguous(), up.contiguous(), activation)
    return out


class _GatedMap(torch.autograd.Function):
    """(act(gate) up) W, which keeps gate, up and W."""

    @staticmethod
    def forward(ctx, gate, up, weight, activation):
        ctx.save_for_backward(gate, up, weight)
        ctx.activation = activation
        return product_forward(gate, up, activation) @ weight

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        product = rows @ weight.t()  # its gradient, over which the product itself is written
        dgate, dup = _gradients(product, gate, up, ctx.activation, product)
        return dgate, dup, product.t() @ rows if ctx.needs_input_grad[2] else None, None


def gated_map_fused(gate: Tensor, up: Tensor, weight: Tensor, activation: str) -> Tensor:
    """Run the Triton form; arguments as in `archspec.kernels.pointwise.gated_map`, checked there.

    Traced by ``torch.compile`` or under autocast, the product is kept.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(up.device.type):
        return gated_product_fused(gate, up, activation) @ weight
    y: Tensor = _GatedMap.apply(gate.contiguous(), up.contiguous(), weight, activation)
    return y
