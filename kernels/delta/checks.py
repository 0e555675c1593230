"""What the ops of the delta families check alike: queries, keys, values, read and erase keys, and strengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from archspec.kernels.backend import check_floating, check_groups, check_shape
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
    sizes: dict[str, int] = {}
    check_shape(op, "q", q, "B T H K", sizes)
    check_shape(op, "k", k, "B T H K", sizes)
    check_shape(op, "v", v, "B T HV V", sizes)
    check_groups(op, sizes["H"], sizes["HV"])
    check_tokens(op, sizes["T"])
    for name, x in strengths.items():
        if x is not None:
            check_shape(op, name, x, "B T HV K" if x.ndim == 4 else "B T HV", sizes)
    keys = {name: x for name, x in (("read_key", read_key), ("erase_key", erase_key)) if x is not None}
    for name, x in keys.items():
        grouped = x.ndim == 4 and x.shape[2] == sizes["H"]
        check_shape(op, name, x, "B T H K" if grouped else "B T HV K", sizes)
    check_floating(op, v.device, q=q, k=k, v=v, **strengths, **others, **keys)
    check_same_dtype(op, q=q, k=k, v=v, **keys)
    expanded = (None if x is None else expand_heads(x, sizes["HV"]) for x in (q, k, read_key, erase_key))
    return Keys(*expanded), sizes  # type: ignore[arg-type]
