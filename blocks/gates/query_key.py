"""The bonus weight of the current token (RWKV)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.families import Gate
from archspec.initial import ONES, Parameter, Parameters
from archspec.shapes import HeadDims

if TYPE_CHECKING:
    from torch import Tensor


class QueryKey(Gate, kind="query_key"):
    """sum_i q_i s_i k_i r_i per head, r learned per key channel.

    Args:
        strength: s, by which the key is scaled before (name it under ``gates:`` to share it with the write size).

    Source: RWKV-7 (arXiv:2503.14456), its bonus term, whose key is the one that is written.
    """

    strength: Gate | None = None

    has_source: ClassVar[bool] = False
    sums_channels: ClassVar[bool] = True

    def needs(self) -> tuple[str, ...]:
        return ("query", "key")

    def parameters(self, dims: HeadDims) -> Parameters:
        return {"weight": Parameter((dims.num_heads, dims.key_dim, 1), self.init or ONES)}

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        key = known["key"] * known["strength"] if "strength" in known else known["key"]
        return (known["query"] * key * known["weight"]).sum(-2, keepdim=True)
