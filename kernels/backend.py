"""What every kernel family shares: choosing a backend, checking shapes, the default scale, packed sequences.

Backends are named by strings at every public op: ``auto``, ``triton``, ``chunked`` or ``reference``. ``auto`` is
Triton for CUDA tensors that the kernel covers and the chunked torch form for all others.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from archspec.errors import ShapeError, UnsupportedError, unknown

Backend = Literal["auto", "triton", "chunked", "reference"]
Form = Literal["triton", "chunked", "reference"]

MAX_HEAD_DIM = 256
"""Widest key or value dim of the Triton kernels: one head's state tile must fit a multiprocessor."""

# Read once at import: torch.compile would otherwise break the graph on a module search or an environment read.
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def resolve_backend(
    op: str, backend: str, x: Tensor, dims: Mapping[str, int] | None = None, unserved: str | None = None,
    *, has_triton: bool = True,
) -> Form:  # fmt: skip
    """Return the form that serves this call: ``triton``, ``chunked`` or ``reference``.

    Args:
        op: the public op's name, for messages.
        backend: what the user asked for.
        x: one of the inputs; its device and dtype decide.
        dims: named head dims that the Triton kernel limits, such as ``{"key_dim": 128, "value_dim": 64}``.
        unserved: what this call asks for that the Triton kernel does not serve, such as ``"order='together'"``.
        has_triton: whether this op has a Triton kernel at all.

    Raises:
        UnsupportedError: an unknown backend, or ``triton`` for tensors that the kernel cannot take.
    """
    if backend in ("chunked", "reference"):
        return backend  # type: ignore[return-value]
    if backend not in get_args(Backend):
        raise UnsupportedError(f"{op}: {unknown('backend', backend, get_args(Backend))}")
    refusal = _triton_refusal(x, dims or {}, unserved, has_triton)
    if refusal is None:
        return "triton"
    if backend == "triton":
        raise UnsupportedError(f"{op}: {refusal}")
    return "chunked"


def _triton_refusal(x: Tensor, dims: Mapping[str, int], unserved: str | None, has_triton: bool) -> str | None:
    """Return why Triton cannot serve these tensors, as a sentence with its remedy, or None when it can."""
    if not has_triton:
        return "has no Triton kernel; use backend='chunked'."
    if unserved is not None:
        return f"the Triton kernel does not serve {unserved}; use backend='chunked' or leave it out."
    if not HAS_TRITON:
        return "Triton is not installed; use backend='chunked' or install triton>=3.6."
    if x.device.type != "cuda" and not INTERPRETED:
        return f"the Triton kernel needs CUDA tensors, found {x.device.type}; use backend='chunked'."
    if x.dtype not in TRITON_DTYPES:
        return f"the Triton kernel takes bfloat16, float16 or float32, found {x.dtype}; use backend='chunked'."
    for name, size in dims.items():
        if size > MAX_HEAD_DIM:
            return (
                f"{name}={size} is over the Triton kernel's {MAX_HEAD_DIM}; use backend='chunked' or a smaller {name}."
            )
    return None


def check_shape(op: str, name: str, x: Tensor, letters: str, sizes: dict[str, int]) -> None:
    """Check that ``x`` has the axes ``letters`` (such as ``"B T H K"``), binding letters not yet in ``sizes``.

    Raises:
        ShapeError: the number of axes or the size of one is not what earlier tensors fixed.
    """
    axes, found = letters.split(), x.shape
    if len(found) == len(axes):
        for axis, size in zip(axes, found, strict=True):
            if sizes.setdefault(axis, size) != size:
                break
        else:
            return
    wanted = ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in axes)
    raise ShapeError(f"{op}: {name} has shape {list(found)}; required is [{wanted}]. Layout is time before heads.")


def check_floating(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Check that every given tensor is floating point and on ``device``.

    Raises:
        ShapeError: a tensor of integers, or on another device.
    """
    for name, x in tensors.items():
        if x is None:
            continue
        if not x.is_floating_point():
            raise ShapeError(f"{op}: {name} has dtype {x.dtype}; a floating dtype is required.")
        if x.device != device:
            raise ShapeError(f"{op}: {name} is on {x.device}, the other inputs on {device}; move it there.")


def check_groups(op: str, num_heads: int, num_value_heads: int) -> int:
    """Return how many value heads share one key head (HV / H).

    Raises:
        ShapeError: HV is not a positive multiple of H.
    """
    if num_heads < 1 or num_value_heads % num_heads or num_value_heads < num_heads:
        raise ShapeError(
            f"{op}: v has {num_value_heads} heads and k {num_heads}; v's must be a positive multiple of k's."
        )
    return num_value_heads // num_heads


def check_cu_seqlens(op: str, cu_seqlens: Tensor | None, batch: int) -> int:
    """Return the number of sequences N: the batch size, or what ``cu_seqlens`` [N + 1] packs into one row.

    Only shape and dtype are checked here, so that a call on a GPU does not wait for the values.

    Raises:
        ShapeError: packed sequences with a batch other than 1, or ``cu_seqlens`` of a wrong shape or dtype.
    """
    if cu_seqlens is None:
        return batch
    if batch != 1:
        raise ShapeError(f"{op}: cu_seqlens packs sequences into one row, found batch {batch}; use batch 1.")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ShapeError(
            f"{op}: cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; "
            "required are int32 or int64 offsets [N + 1] from 0 to T."
        )
    return cu_seqlens.numel() - 1


def packed_bounds(op: str, cu_seqlens: Tensor, time: int) -> list[tuple[int, int]]:
    """Return the (start, end) of each packed sequence, reading ``cu_seqlens`` on the host.

    Raises:
        ShapeError: offsets that do not rise from 0 to T.
    """
    offsets = [int(x) for x in cu_seqlens.tolist()]
    pairs = list(itertools.pairwise(offsets))
    if offsets[0] != 0 or offsets[-1] != time or any(end <= start for start, end in pairs):
        raise ShapeError(f"{op}: cu_seqlens is {offsets}; required are offsets rising from 0 to T={time}.")
    return pairs


def run_packed(
    bounds: list[tuple[int, int]], run: Callable[[int, slice], tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    """Run one call a sequence, ``run(n, slice of time) -> (o [1, T_n, ...], final state [1, ...] or None)``.

    Returns:
        Outputs joined along time and final states joined along N.
    """
    parts = [run(n, slice(start, end)) for n, (start, end) in enumerate(bounds)]
    states = [state for _, state in parts if state is not None]
    return torch.cat([o for o, _ in parts], 1), torch.cat(states) if states else None


def default_scale(scale: float | None, key_dim: int) -> float:
    """Return ``scale``, or K**-0.5 when it is None."""
    return key_dim**-0.5 if scale is None else float(scale)


def state_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the state for inputs like ``x``: float64 for float64, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
