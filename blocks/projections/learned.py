"""Projections that read no token: one learned vector a head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from archspec.families import Projection
from archspec.initial import Initial, Parameter, Parameters

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = ("from_", "shift", "rank", "hidden", "block_size", "offset", "conv", "conv_offset", "parts")


class LearnedProjection(Projection, kind="learned"):
    """A parameter per head, the same for every token; then activation, norm, position and feature.

    ``init`` is its law; absent means standard normal. As a query it makes attention a running average, whose weights
    depend on the keys alone: Aaren (arXiv:2405.13956), section 3.
    """

    has_weights: ClassVar[bool] = False
    has_source: ClassVar[bool] = False

    @model_validator(mode="after")
    def _has_no_source(self) -> LearnedProjection:
        written = self.departures(SOURCE)
        if written:
            raise PydanticCustomError(
                "learned_projection",
                "a learned projection reads no token: remove {names}, or use kind 'linear'.",
                {"names": ", ".join(name.rstrip("_") for name in written)},
            )
        return self

    def own_parameters(self, num_heads: int, dim: int) -> Parameters:
        return {"vector": Parameter((num_heads, dim), self.init or Initial(normal=1.0))}

    def vector(self, num_heads: int, dim: int, parameters: Mapping[str, Tensor], like: Tensor) -> Tensor:
        return parameters["vector"].to(like.dtype)
