"""A rule's quantities as the plain tensors that kernels take, and what kernels return as the rule's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from archspec.blocks.rule import MemoryState, Quantities
from archspec.kernels.backend import resolve_backend
from archspec.kernels.momentum_delta import MomentumDeltaState
from archspec.kernels.softmax import KvCache
from archspec.rule import Rule

Final = TypeVar("Final", Tensor, KvCache, MomentumDeltaState)


def as_given(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which operations keep the dtypes of their inputs: autocast would round states to bf16."""
    kind = x.device.type
    has_autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # type: ignore[no-untyped-call]
    return torch.autocast(kind, enabled=False) if has_autocast else nullcontext()


def in_one_dtype(quantities: Quantities) -> Quantities:
    """Return the same with queries, keys and values in the narrowest of their dtypes."""
    read_key = quantities.read_key
    every = [quantities.query, quantities.key, quantities.value, *([] if read_key is None else [read_key])]
    if len({x.dtype for x in every}) == 1:
        return quantities
    dtype = min((x.dtype for x in every), key=lambda dtype: dtype.itemsize)
    query, key, value, *rest = (x.to(dtype) for x in every)
    return replace(quantities, query=query, key=key, value=value, read_key=rest[0] if rest else None)


def given(rule: Rule, quantities: Quantities, state: MemoryState | None, start: MemoryState) -> Tensor | None:
    """Return the start state, or None when it is the zero that kernels assume."""
    return start["dual.w"] if state is not None or quantities.start else None


def decodes(quantities: Quantities) -> bool:
    return quantities.query.shape[1] == 1


def decay(rule: Rule, quantities: Quantities) -> Tensor | None:
    """Return log(alpha) as kernels take it: [H] constant, [B, T, H] per head, [B, T, H, K] per key channel."""
    if rule.retention.decay_gate is None:
        return None
    log_alpha = quantities.gates["retention.gate"]
    batch, length = quantities.query.shape[:2]
    if log_alpha.shape[-2:] == (1, 1):
        narrow = log_alpha[..., 0, 0]
        return narrow[0, 0] if narrow.shape[:2] == (1, 1) else narrow.expand(batch, length, -1)
    return log_alpha[..., 0].expand(batch, length, -1, -1)


def strength(gate: Tensor, key: Tensor) -> Tensor:
    """Return a strength [B, T, H] or, when it varies per key channel, [B, T, H, K]."""
    batch, length = key.shape[:2]
    narrow = gate[..., 0]
    if narrow.shape[-1] == 1:
        return narrow[..., 0].expand(batch, length, -1)
    return narrow.expand(batch, length, -1, -1)


def kernel_scale(rule: Rule, quantities: Quantities, backend: str) -> float | None:
    """Return the read-out's factor where the kernel applies it and nothing else remains to be done to the read-out.

    On the CPU and in fp64 ``_finished`` applies it, as the recurrence does.
    """
    memory = rule.memory
    if memory.kind != "matrix" or getattr(memory, "normalizer", None) is not None or backend not in ("auto", "triton"):
        return None
    if resolve_backend("pieces", "auto", quantities.query) != "triton":
        return None
    scale = getattr(memory, "scale", None)
    return float(rule.dims.key_dim**-0.5 if scale is None else scale) or None


def finished(rule: Rule, read: Tensor, quantities: Quantities) -> Tensor:
    """Scale and normalise in the state's precision, return the queries' dtype."""
    return rule.memory.finish(read.to(quantities.state_dtype), rule.dims).to(quantities.query.dtype)


def kept(final: Final | None) -> Final:
    if final is None:
        raise AssertionError("a kernel that was asked for its final state returned none")
    return final
