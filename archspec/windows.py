"""A loss's window, gathered: the last tokens of every token of a stretch, side by side."""

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
        [T, B, H, length, d] by name: ``key``, ``value``, ``read_key`` where there is one, and the bias's gates by path,
        ``bias.window.weights`` always among them: rows before the first token weigh nothing. And the entries of the
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
    found, windows = dict[str, Tensor](), MemoryState()
    for name, x in {**window_fields(quantities), **gates}.items():
        found[name], windows[f"window.{name}"] = _gathered(x.to(dtype), state.get(f"window.{name}"), window.length)
    # Rows before the first token repeat it, so that no loss is taken where there is none, and weigh nothing.
    ones = torch.ones_like(quantities.key[..., :1], dtype=dtype)
    known = state.get("window.key")
    before = None if known is None else ones.new_ones(*known.shape[:3], 1)
    counted, _ = _gathered(ones, before, window.length, blank=True)
    weights = found.get("bias.window.weights")
    found["bias.window.weights"] = counted if weights is None else counted * weights
    return found, windows


def _gathered(x: Tensor, before: Tensor | None, length: int, *, blank: bool = False) -> tuple[Tensor, Tensor]:
    """Return the window that ends with every token of [B, T, H, d], [T, B, H, length, d], and what the next needs.

    Args:
        before: rows of the tokens before the stretch [B, H, C, d].
        blank: whether what lies before the sequence is zero instead of its first row.
    """
    rows = x if before is None else torch.cat([before.transpose(1, 2), x], dim=1)
    known = rows.shape[1] - x.shape[1]
    missing = length - 1 - known
    first = rows[:, :1].expand(-1, missing, -1, -1)
    padded = torch.cat([torch.zeros_like(first) if blank else first, rows], dim=1)
    after = padded[:, max(missing, x.shape[1]) :].transpose(1, 2)
    return padded.unfold(1, length, 1).permute(1, 0, 2, 4, 3), after
