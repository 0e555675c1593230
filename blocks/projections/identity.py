"""Projections and streams that take their source as it is."""

from __future__ import annotations

from typing import ClassVar, TypeVar

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from archspec.families import Projection, Stream, StreamFields

Fields = TypeVar("Fields", bound=StreamFields)


def without_weights(source: Fields) -> Fields:
    """Return ``source`` if it sets no key of a linear map that it does not have.

    Raises:
        PydanticCustomError: naming the keys to remove.
    """
    written = source.departures(("rank", "hidden", "block_size", "offset", "init"))
    if written:
        raise PydanticCustomError(
            "identity_weights",
            "an identity has no weights: remove {names}, or use kind 'linear'.",
            {"names": ", ".join(written)},
        )
    return source


class IdentityProjection(Projection, kind="identity"):
    """The source itself, whose width must be the projection's, then conv, activation, norm, position, feature."""

    has_weights: ClassVar[bool] = False

    @model_validator(mode="after")
    def _has_no_weights(self) -> IdentityProjection:
        return without_weights(self)


class IdentityStream(Stream, kind="identity"):
    """The source itself, then conv, activation and norm."""

    has_weights: ClassVar[bool] = False

    @model_validator(mode="after")
    def _has_no_weights(self) -> IdentityStream:
        return without_weights(self)
