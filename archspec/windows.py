"""A loss's window over a stretch: the tokens it reaches, and each token's own side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from archspec.blocks.rule import MemoryState, Quantities
from archspec.rule import Rule


def window_fields(quantities: Quantities) -> dict[str, Tensor]:
    """Return what a loss reads of a token, by name, [B, T, H, d]."""
    fields = {"key": quantities.key, "value": quantities.value}
    if quantities.read_key is not None:
        fields["read_key"] = quantities.read_key
    return fields


def window_rows(rule: Rule, quantities: Quantities, state: MemoryState) -> tuple[dict[str, Tensor], MemoryState]:
    """Return the window that ends with every token, and what of it the tokens after the stretch need.

    Args:
        state: before the stretch; its ``window.`` entries are read.

    Returns:
        [T, B, H, length, d] by name, as ``window_tokens``; and the entries of the state after the stretch.
    """
    found, after = window_tokens(rule, quantities, state)
    length = next(iter(found.values())).shape[1] - quantities.key.shape[1] + 1
    return {name: x.unfold(1, length, 1).permute(1, 0, 2, 4, 3) for name, x in found.items()}, after


def window_tokens(rule: Rule, quantities: Quantities, state: MemoryState) -> tuple[dict[str, Tensor], MemoryState]:
    """Return the tokens that windows of a stretch reach, and what of them the tokens after the stretch need.

    Args:
        state: before the stretch; its ``window.`` entries are read.

    Returns:
        [B, length - 1 + T, H, d] by name: ``key``, ``value``, ``read_key`` where there is one, and the bias's gates by
        path, ``bias.window.weights`` always among them: tokens that are not there weigh nothing. And the entries of the
        state after the stretch.
    """
    window, dtype = rule.bias.window, quantities.state_dtype
    if window is None:
        raise RuntimeError("a loss without a window has none to gather")
    shape = quantities.key.shape[:3]
    gates = {
        path: gate.to(dtype).squeeze(-2).expand(*shape, -1)
        for path, gate in quantities.gates.items()
        if path.startswith("bias.") and not path.startswith("bias.read_key.")
    }
    found, after = dict[str, Tensor](), MemoryState()
    for name, x in {**window_fields(quantities), **gates}.items():
        found[name], after[f"window.{name}"] = _continued(x.to(dtype), state.get(f"window.{name}"), window.length)
    # What stands before the first token repeats it, so that no loss is taken where there is none, and weighs nothing.
    ones = torch.ones_like(quantities.key[..., :1], dtype=dtype)
    known = state.get("window.key")
    before = None if known is None else ones.new_ones(*known.shape[:3], 1)
    counted, _ = _continued(ones, before, window.length, blank=True)
    weights = found.get("bias.window.weights")
    found["bias.window.weights"] = counted if weights is None else counted * weights
    return found, after


def _continued(x: Tensor, before: Tensor | None, length: int, *, blank: bool = False) -> tuple[Tensor, Tensor]:
    """Return [B, T, H, d] with the length - 1 tokens before it, and those that the next stretch needs [B, H, C, d].

    Args:
        before: rows of the tokens before the stretch [B, H, C, d].
        blank: whether what lies before the sequence is zero instead of its first row.
    """
    rows = x if before is None else torch.cat([before.transpose(1, 2), x], dim=1)
    missing = length - 1 - (rows.shape[1] - x.shape[1])
    first = rows[:, :1].expand(-1, missing, -1, -1)
    padded = torch.cat([torch.zeros_like(first) if blank else first, rows], dim=1)
    return padded, padded[:, max(missing, x.shape[1]) :].transpose(1, 2)
