"""Projections that read no token: a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, TypeVar

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from archspec.component import Number
from archspec.families import Projection

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = ("from_", "shift", "rank", "hidden", "block_size", "offset", "init", "conv", "conv_offset", "parts")


Fields = TypeVar("Fields", bound=Projection)


def without_source(projection: Fields, kind: str) -> Fields:
    """Return ``projection`` if it sets no key of a source that it does not have.

    Raises:
        PydanticCustomError: naming the keys to remove.
    """
    written = projection.departures(SOURCE)
    if written:
        raise PydanticCustomError(
            "projection_source",
            "a {kind} projection reads no token: remove {names}, or use kind 'linear'.",
            {"kind": kind, "names": ", ".join(name.rstrip("_") for name in written)},
        )
    return projection


class ConstantProjection(Projection, kind="constant"):
    """The same number in every channel of every token; then activation, norm, position and feature.

    A key of ones leaves what is written to the strength of the write: with ``step_size`` per key channel, k is that
    gate (1 - alpha in HGRN2, arXiv:2404.07904; the token's weight in LightNet, arXiv:2405.21022).
    """

    value: Number = 1.0

    has_weights: ClassVar[bool] = False
    has_source: ClassVar[bool] = False

    @model_validator(mode="after")
    def _has_no_source(self) -> ConstantProjection:
        return without_source(self, "constant")

    def vector(self, num_heads: int, dim: int, parameters: Mapping[str, Tensor], like: Tensor) -> Tensor:
        return like.new_full((num_heads, dim), self.value)
