"""Checked tensors of one dplr_rule call, and what delta_rule and dplr_rule share in checking them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from archspec.errors import ShapeError
from archspec.kernels.backend import check_shape, packed_bounds, run_packed


class DplrInputs(NamedTuple):
    """Tensors of a dplr_rule call with every head expanded: q, k, a, b [B, T, HV, K], v [B, T, HV, V], g or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    g: Tensor | None

    def at(self, tokens: slice) -> DplrInputs:
        """Return the inputs of some tokens."""
        return DplrInputs(*(None if x is None else x[:, tokens] for x in self))  # type: ignore[arg-type]


def expand_heads(x: Tensor, num_value_heads: int) -> Tensor:
    """Return [B, T, H, K] with each head repeated for the value heads it serves, [B, T, HV, K]."""
    return x if x.shape[2] == num_value_heads else x.repeat_interleave(num_value_heads // x.shape[2], dim=2)


def expand_gate(op: str, g: Tensor | None, sizes: dict[str, int]) -> Tensor | None:
    """Check a log decay [HV], [B, T, HV] or [B, T, HV, K], and expand the first to [B, T, HV].

    Raises:
        ShapeError: any other shape.
    """
    if g is None:
        return None
    letters = {1: "HV", 3: "B T HV", 4: "B T HV K"}.get(g.ndim)
    if letters is None:
        raise ShapeError(
            f"{op}: g has shape {list(g.shape)}; required is [HV], [B, T, HV] or [B, T, HV, K] with "
            f"{', '.join(f'{letter}={sizes[letter]}' for letter in ('B', 'T', 'HV', 'K'))}."
        )
    check_shape(op, "g", g, letters, sizes)
    return g.expand(sizes["B"], sizes["T"], sizes["HV"]) if g.ndim == 1 else g


def check_same_dtype(op: str, **tensors: Tensor) -> None:
    """Check that the tensors share one dtype.

    Raises:
        ShapeError: they do not.
    """
    found: dict[str, torch.dtype] = {name: x.dtype for name, x in tensors.items()}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} {dtype}" for name, dtype in found.items())
        raise ShapeError(f"{op}: one dtype is required, found {listed}; convert them to one.")


def check_tokens(op: str, num_tokens: int) -> None:
    """Check that there is at least one token.

    Raises:
        ShapeError: T = 0.
    """
    if num_tokens < 1:
        raise ShapeError(f"{op}: T=0; at least one token is required.")


class _Cuttable(Protocol):
    def at(self, tokens: slice) -> Self: ...


Inputs = TypeVar("Inputs", bound=_Cuttable)


def run_sequences(
    op: str,
    run: Callable[[Inputs, Tensor | None], tuple[Tensor, Tensor]],
    inputs: Inputs,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    num_tokens: int,
) -> tuple[Tensor, Tensor | None]:
    """Run a form on a batch of sequences, or on each of the sequences that ``cu_seqlens`` packs into one row."""
    if cu_seqlens is None:
        o, state = run(inputs, initial_state)
        return o, state if output_final_state else None

    def one(n: int, tokens: slice) -> tuple[Tensor, Tensor | None]:
        start = None if initial_state is None else initial_state[n : n + 1]
        o, state = run(inputs.at(tokens), start)
        return o, state if output_final_state else None

    return run_packed(packed_bounds(op, cu_seqlens, num_tokens), one)
