"""What the ops of the delta families check alike, and how those with a state a head run all heads side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from archspec.kernels.backend import check_floating, check_groups, check_shape, state_dtype
from archspec.kernels.dplr.inputs import check_same_dtype, check_tokens, expand_heads


class Keys(NamedTuple):
    """Checked queries and keys with every head expanded to HV, [B, T, HV, K]; None where a call gives none."""

    query: Tensor
    key: Tensor
    read_key: Tensor | None
    erase_key: Tensor | None


def check_keys(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read_key: Tensor | None,
    erase_key: Tensor | None,
    strengths: Mapping[str, Tensor | None],
    others: Mapping[str, Tensor | None],
) -> tuple[Keys, dict[str, int]]:
    """Check shapes, dtypes and devices.

    Args:
        op: the public op, for messages.
        q, k: [B, T, H, K]; v: [B, T, HV, V], HV a multiple of H.
        read_key, erase_key: [B, T, H or HV, K].
        strengths: by name, [B, T, HV] or [B, T, HV, K].
        others: by name, whose dtype and device alone are checked here.

    Returns:
        The keys, and the sizes found by axis name.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
    """
    keys = {"read_key": read_key, "erase_key": erase_key}
    shapes = {
        "q": (q, "B T H K"), "k": (k, "B T H K"), "v": (v, "B T HV V"),
        **{name: (x, "B T HV K" if x is not None and x.ndim == 4 else "B T HV") for name, x in strengths.items()},
        **{
            name: (x, "B T H K" if x is not None and x.shape[2:-1] == k.shape[2:-1] else "B T HV K")
            for name, x in keys.items()
        },
    }  # fmt: skip
    sizes = check_shapes(op, shapes, others)
    expanded = (None if x is None else expand_heads(x, sizes["HV"]) for x in (q, k, read_key, erase_key))
    return Keys(*expanded), sizes  # type: ignore[arg-type]


def check_shapes(
    op: str, shapes: Mapping[str, tuple[Tensor | None, str]], others: Mapping[str, Tensor | None] | None = None
) -> dict[str, int]:
    """Check the tensors of a call, None where it gives none; q, k, v and the other keys share one dtype.

    Args:
        op: the public op, for messages.
        shapes: tensors by name with the letters of their axes, q, k and v first.
        others: tensors by name, whose dtype and device alone are checked here.

    Returns:
        The sizes found by axis name.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
    """
    sizes: dict[str, int] = {"1": 1}
    for name, (x, letters) in shapes.items():
        if x is not None:
            check_shape(op, name, x, letters, sizes)
        if name == "v":
            if "HV" in sizes:
                check_groups(op, sizes["H"], sizes["HV"])
            check_tokens(op, sizes["T"])
    tensors = {name: x for name, (x, _) in shapes.items() if x is not None}
    check_floating(op, tensors["v"].device, **tensors, **(others or {}))
    check_same_dtype(op, **{name: x for name, x in tensors.items() if name in _ALIKE})
    return sizes


_ALIKE = ("q", "k", "v", "read_key", "erase_key")


def run_heads(
    run: Callable[[Sequence[Tensor], Tensor], tuple[Tensor, Tensor]], tokens: Sequence[Tensor], v: Tensor,
    initial_state: Tensor | None, key_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run a form on the heads of a batch side by side: tokens [B, T, H, d] as [B H, T, d], the state [B H, K, V].

    Args:
        run: returns o [B H, T, V] and the last state, for tokens in the state's dtype and its start.
        v: values [B, T, H, V], whose dtype o gets.
        initial_state: [B, H, K, V]; zeros when None.
        key_dim: K.

    Returns:
        o [B, T, H, V] and the last state [B, H, K, V].
    """
    dtype, (B, _, H, V) = state_dtype(v), v.shape
    start = torch.zeros(B, H, key_dim, V, dtype=dtype, device=v.device) if initial_state is None else initial_state
    o, last = run([x.to(dtype).transpose(1, 2).flatten(0, 1) for x in tokens], start.to(dtype).flatten(0, 1))
    return o.view(B, H, *o.shape[1:]).transpose(1, 2).to(v.dtype), last.view(B, H, key_dim, V)
