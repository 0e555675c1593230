"""The two ends of a model: what comes in becomes the residual stream, and the stream becomes what goes out.

Their sizes (vocabulary, channels, classes) come from the task: they are no part of an architecture.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from archspec.component import Component, Count
from archspec.initial import FAN_IN, Offset, Parameter, Parameters

if TYPE_CHECKING:
    from torch import Tensor

Pool = Literal["last", "mean", "max"]


class Input(Component, family="input", noun="input", default_kind="tokens"):
    """What a model reads, one item after another.

    Attributes:
        from_task: fields that are sizes of the task's.

    Args:
        position: a code of the item's index is added: none, a learned vector, or sines and cosines.
        max_length: items that have a learned vector.
    """

    position: Literal["none", "learned", "sinusoidal"] = "none"
    max_length: Count = 2048

    from_task: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def parameters(self, model_dim: int, vocab_size: int) -> Parameters:
        """Return what turns an item into the stream; its ``weight`` is [vocab_size, D] for tokens."""

    @abstractmethod
    def embed(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the stream [B, T, D] for a stretch of items.

        Raises:
            ShapeError: items of another kind or size.
        """

    def flops_per_item(self, model_dim: int) -> int:
        """Return multiply-adds counted as two, one item, forward."""
        return 0

    def idle(self) -> tuple[str, ...]:
        """Return the fields that change nothing as they are: the normal form has none of them."""
        return () if self.position == "learned" else ("max_length",)


class Head(Component, family="output", noun="output", default_kind="tokens"):
    """What a model says after every item.

    Attributes:
        from_task: fields that are sizes of the task's.

    A field ``pool`` says what is read after item t: the stream there (``last``, as without the field), or the mean or
    maximum of the items up to t, so that the last row of a sequence is the answer for all of it.
    """

    from_task: ClassVar[tuple[str, ...]] = ()

    @property
    def pooled(self) -> Pool:
        """What is read after an item t."""
        return getattr(self, "pool", "last")  # type: ignore[no-any-return]

    @property
    def reads_embedding(self) -> bool:
        """Whether the input's weights are used, so that the input must be tokens."""
        return False

    @abstractmethod
    def parameters(self, model_dim: int, vocab_size: int) -> Parameters:
        """Return what is learned."""

    @abstractmethod
    def apply(self, x: Tensor, parameters: Mapping[str, Tensor], embedding: Tensor) -> Tensor:
        """Return [B, T, n] for the (pooled) stream [B, T, D]; ``embedding`` is the input's weight."""

    @abstractmethod
    def width(self, vocab_size: int) -> int:
        """Return n, the numbers that come out a token."""


def weights(model_dim: int, width: int, offset: Offset = None) -> Parameters:
    """Return the weights of x W [+ b], W [D, width]: those of a head that has its own."""
    found = {"head": Parameter((model_dim, width), FAN_IN, decayed=True)}
    return found if offset is None else {**found, "head_offset": Parameter((width,), offset)}


def projected(x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return x W [+ b] with the tensors of ``weights``."""
    found = x @ parameters["head"]
    return found + parameters["head_offset"] if "head_offset" in parameters else found
