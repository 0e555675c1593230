"""The decoding step of the delta rule as one Triton kernel that updates the state in place."""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.kernels.delta.inputs import DeltaInputs, Order
from archspec.launches import padded_dim

DECAY_FIRST = tl.constexpr(get_args(Order).index("decay_first"))
TOGETHER = tl.constexpr(get_args(Order).index("together"))
STEP_FIRST = tl.constexpr(get_args(Order).index("step_first"))


@triton.jit
def _decays(g, row, i_h, cols_k, keep_k, HV: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr):
    """exp(g) of one token, [K, 1] or a scalar."""
    if GATE == 1:
        alpha = tl.exp(tl.load(g + row * HV + i_h).to(tl.float32))
    else:  # one return: Triton 3.6 compiles what stands behind an early one, and their types differ
        alpha = tl.exp(tl.load(g + (row * HV + i_h) * K + cols_k, mask=keep_k, other=0.0).to(tl.float32))[:, None]
    return alpha


@triton.jit
def _strength(beta, row, i_h, cols_k, keep_k, HV: tl.constexpr, K: tl.constexpr, PER_KEY: tl.constexpr):
    """A strength of one token for every key channel, [K]."""
    if PER_KEY:
        return tl.load(beta + (row * HV + i_h) * K + cols_k, mask=keep_k, other=0.0).to(tl.float32)
    return tl.load(beta + row * HV + i_h + 0 * cols_k).to(tl.float32)


@triton.jit
def _key(x, row, i_h, cols_k, keep_k, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr):
    """A key of one token from a tensor of H heads, each for HV / H value heads."""
    at = (row * H + i_h // (HV // H)) * K + cols_k
    return tl.load(x + at, mask=keep_k, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["scale", "T"])
def _step_kernel(
    q, k, v, beta, g, write_beta, read_key, erase_key, state, out, scale, T,
    H: tl.constexpr, HV: tl.constexpr, HR: tl.constexpr, HE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr, BETA_PER_KEY: tl.constexpr,
    WRITE_PER_KEY: tl.constexpr, HAS_WRITE: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Program (batch and head, v block): GATE 0 none, 1 a decay a token, 2 one per key channel; HR, HE 0: the key."""
    i_v, i_bh = tl.program_id(1), tl.program_id(0)
    i_b, i_h = tl.cast(i_bh // HV, tl.int64), i_bh % HV
    cols_k, cols_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    keep_k, keep_v = cols_k < K, cols_v < V
    at = state + tl.cast(i_bh, tl.int64) * (K * V) + cols_k[:, None] * V + cols_v[None, :]
    keep = keep_k[:, None] & keep_v[None, :]
    S = tl.load(at, mask=keep, other=0.0)
    for t in range(T):
        row = i_b * T + t
        key = _key(k, row, i_h, cols_k, keep_k, H, HV, K)
        reader, eraser = key, key
        if HR != 0:
            reader = _key(read_key, row, i_h, cols_k, keep_k, HR, HV, K)
        if HE != 0:
            eraser = _key(erase_key, row, i_h, cols_k, keep_k, HE, HV, K)
        erased = _strength(beta, row, i_h, cols_k, keep_k, HV, K, BETA_PER_KEY)
        written = erased
        if HAS_WRITE:
            written = _strength(write_beta, row, i_h, cols_k, keep_k, HV, K, WRITE_PER_KEY)
        value = tl.load(v + (row * HV + i_h) * V + cols_v, mask=keep_v, other=0.0).to(tl.float32)
        if GATE != 0 and ORDER == DECAY_FIRST:
            S *= _decays(g, row, i_h, cols_k, keep_k, HV, K, GATE)
        predicted = tl.sum(S * reader[:, None], 0)
        if GATE != 0 and ORDER == TOGETHER:
            S *= _decays(g, row, i_h, cols_k, keep_k, HV, K, GATE)
        if HAS_WRITE or HE != 0:
            S += (written * key)[:, None] * value[None, :] - (erased * eraser)[:, None] * predicted[None, :]
        else:
            S += (erased * key)[:, None] * (value - predicted)[None, :]
        if GATE != 0 and ORDER == STEP_FIRST:
            S *= _decays(g, row, i_h, cols_k, keep_k, HV, K, GATE)
        query = _key(q, row, i_h, cols_k, keep_k, H, HV, K)
        o = tl.sum(S * query[:, None], 0) * scale
        tl.store(out + (row * HV + i_h) * V + cols_v, o.to(out.dtype.element_ty), mask=keep_v)
    tl.store(at, S, mask=keep)


def delta_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, write_beta: Tensor | None,
    read_key: Tensor | None, erase_key: Tensor | None, state: Tensor, scale: float, order: str,
) -> Tensor:  # fmt: skip
    """Return the read-outs [B, T, HV, V] and advance ``state`` [B, HV, K, V] in place."""
    B, T, H, K = q.shape
    HV, V = v.shape[-2:]
    out = torch.empty_like(v)
    BK = padded_dim(K)
    BV = min(padded_dim(V), max(16, 4096 // BK))  # 32 fp32 registers of state a thread
    _step_kernel[(B * HV, -(-V // BV))](
        q, k, v, beta, g, write_beta, read_key, erase_key, state, out, scale, T, H=H, HV=HV,
        HR=0 if read_key is None else read_key.shape[2], HE=0 if erase_key is None else erase_key.shape[2],
        K=K, V=V, BK=BK, BV=BV, GATE=0 if g is None else g.ndim - 2, BETA_PER_KEY=beta.ndim == 4,
        WRITE_PER_KEY=write_beta is not None and write_beta.ndim == 4, HAS_WRITE=write_beta is not None,
        ORDER=get_args(Order).index(order), num_warps=4,
    )  # fmt: skip
    return out


_step_op = torch.library.custom_op("archspec::delta_rule_step", delta_step, mutates_args=("state",))


@_step_op.register_fake
def _step_fake(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, write_beta: Tensor | None,
    read_key: Tensor | None, erase_key: Tensor | None, state: Tensor, scale: float, order: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(v)


def delta_step_fused(inputs: DeltaInputs, state: Tensor, scale: float, order: str) -> Tensor:
    """Run the step on contiguous copies where needed; ``state`` [B, HV, K, V] fp32 is updated in place.

    Keys may have fewer heads than values here.
    """
    q, k, v, *rest = (None if x is None else x.contiguous() for x in inputs)
    kept = state if state.is_contiguous() else state.contiguous()
    o: Tensor = _step_op(q, k, v, *rest, kept, scale, order)
    if kept is not state:
        state.copy_(kept)
    return o
