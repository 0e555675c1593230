"""Streams and projections: what a mixer makes of its tokens before a memory sees them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from archspec.component import Component, Count, Flag, Off, Positive
from archspec.errors import UnsupportedError
from archspec.initial import Parameters
from archspec.sources import Activation, Dim, Gate, Part, Source

if TYPE_CHECKING:
    from torch import Tensor


class Norm(Component, family="norm", noun="norm"):
    """A normalisation over the last axis (or, with ``over: model``, over all heads together).

    Args:
        per_head: every head has a learned scale and shift of its own (a group norm's), instead of one for all.
    """

    eps: Positive = 1e-6
    over: Literal["head", "model"] = "head"
    per_head: Flag = False

    @model_validator(mode="after")
    def _one_head_or_all(self) -> Norm:
        if self.per_head and self.over == "model":
            raise PydanticCustomError(
                "norm_heads", "over model has a scale for every channel of every head already: remove 'per_head'."
            )
        return self

    def parameters(self, dim: int) -> Parameters:
        """Return the learned scale and shift for an axis of ``dim`` channels; none by default."""
        return {}

    def parameters_of(self, num_heads: int, dim: int) -> Parameters:
        """Return the learned scale and shift for heads of ``dim`` channels: one for all, or ``per_head``."""
        if not self.per_head:
            return self.parameters(dim)
        return {name: replace(p, shape=(num_heads, *p.shape)) for name, p in self.parameters(dim).items()}

    @abstractmethod
    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Normalise ``x`` [..., dim] over its last axis."""


class Position(Component, family="position", noun="position"):
    """A position law on queries and keys: acts on one head's vector at a known token index.

    Attributes:
        on_scores: whether it acts on the scores of stored tokens instead, as ``score_decay`` says.
    """

    on_scores: ClassVar[bool] = False

    @abstractmethod
    def apply(self, x: Tensor, positions: Tensor, *, is_query: bool) -> Tensor:
        """Encode ``x`` [B, T, H, K] at the integer ``positions`` [T]."""

    def score_decay(self) -> Gate:
        """Return the decay whose logarithm a score loses with every token between reader and read."""
        raise UnsupportedError(f"position {self.kind}: it acts on queries and keys, not on scores.")


class FeatureMap(Component, family="feature", noun="feature map"):
    """phi: what a key and a query become before the memory sees them."""

    def output_dim(self, dim: int) -> int:
        """Return the size of phi(x) for x of size ``dim``."""
        return dim

    def parameters(self, num_heads: int, dim: int) -> Parameters:
        """Return the learned parameters; none by default."""
        return {}

    @abstractmethod
    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return phi(x) for ``x`` [B, T, H, K]."""


class StreamFields(Source):
    """What streams and projections have in common: a source, a width, an activation and a norm.

    Attributes:
        has_weights: whether the source's linear map exists.
    """

    dim: Dim | None = None
    activation: Activation = "none"
    norm: Annotated[Norm | None, Off] = None

    has_weights: ClassVar[bool] = True


class Stream(StreamFields, family="stream", noun="stream", default_kind="linear"):
    """A named signal inside a mixer that projections and gates can read."""


class Blend(Part):
    """Mix a projection with the same projection of the first layer: x <- lerp(x, x_first, gate)."""

    with_: Annotated[Literal["first_layer"], Field(alias="with")]
    gate: Gate


class Projection(StreamFields, family="projection", noun="projection", default_kind="linear"):
    """Query, key or value. Stages: shift, linear, conv, activation, norm, blend, position, feature.

    Attributes:
        has_source: whether it reads the token; else ``vector`` gives what stands before the activation.
        derived: path of the gate that it is made of by ``derive``, which then comes before all projections; None for
            those that are not.

    Args:
        heads: number of groups; heads share the projection within a group.
        position: position law on the vector of each head.
        blend: mixing with the first layer's projection.
        feature: the feature map.
        parts: several projections, concatenated along the head's vector.
    """

    heads: Count | None = None
    position: Annotated[Position | None, Off] = None
    blend: Blend | None = None
    feature: Annotated[FeatureMap | None, Off] = None
    parts: tuple[Projection, ...] = ()

    has_source: ClassVar[bool] = True
    derived: ClassVar[str | None] = None

    def own_parameters(self, num_heads: int, dim: int) -> Parameters:
        """Return what a projection without a source learns; nothing by default."""
        return {}

    def vector(self, num_heads: int, dim: int, parameters: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Return the vector [H, dim] of a projection without a source, of the dtype and device of ``like``."""
        raise UnsupportedError(f"projection {self.kind}: it reads the token and has no vector of its own.")

    def derive(self, gate: Tensor) -> Tensor:
        """Return what stands before the activation [B, T, H, d] for the gate ``derived``, of the same layout.

        The retention's gate is given by its logarithm.
        """
        raise UnsupportedError(f"projection {self.kind}: it is made of no gate.")

    def dump(self) -> dict[str, Any]:
        """Return the keys that were written, and the kind if it was: what is left out is left to amend."""
        written = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return {"kind": self.kind, **written} if self.names_its_kind else written

    @classmethod
    def from_list(cls, items: list[Any]) -> Component | None:
        """A bare list is the concatenation of its parts."""
        return cls.parse({"kind": "linear", "parts": items})
