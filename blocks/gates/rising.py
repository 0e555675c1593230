"""A learned number that rises from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from archspec.families import Gate, gate_size
from archspec.initial import ZEROS, Parameter, Parameters
from archspec.shapes import HeadDims

if TYPE_CHECKING:
    from torch import Tensor


class Rising(Gate, kind="rising"):
    """p_1 + ... + p_l with p = softmax over the layers of learned numbers: 0 in layer 0, then rising, below 1.

    Each layer learns its own row; the layers that have this gate at the same place, in their order, are those the
    softmax is over. ``init`` is the law of a row; absent means zero, equal shares.

    Source: HGRN (arXiv:2311.04823), equation 5; HGRN2 (arXiv:2404.07904).
    """

    has_source: ClassVar[bool] = False
    across_layers: ClassVar[bool] = True
    starts_at_zero: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    @model_validator(mode="after")
    def _has_no_source(self) -> Rising:
        written = self.departures(("from_", "shift", "rank", "hidden", "block_size", "offset", "conv", "conv_offset"))
        if written:
            raise PydanticCustomError(
                "rising_source",
                "a rising gate reads no token: remove {names}, or use a gate such as 'sigmoid'.",
                {"names": ", ".join(name.rstrip("_") for name in written)},
            )
        return self

    def parameters(self, dims: HeadDims) -> Parameters:
        return {"row": Parameter((dims.num_heads, *gate_size(self.per, dims)), self.init or ZEROS)}

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        shares = known["rows"].softmax(0)
        return z + shares[1 : int(known["layer"]) + 1].sum(0)
