"""Nodes: what a recurrent cell is put together from. No torch.

A cell computes named vectors, H heads of d channels each, for every token. A node is one of them: a function of the
input and other streams, of other nodes, and of a state's value before the token, ``previous.NAME``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from archspec.component import Component, Text
from archspec.composition import Finding
from archspec.families import Activation
from archspec.initial import Parameters

if TYPE_CHECKING:
    from torch import Tensor

PREVIOUS = "previous."


@dataclass(frozen=True)
class CellDims:
    """Sizes inside a cell: H heads of d channels, and the widths of the streams it reads by name."""

    num_heads: int
    dim: int
    widths: Mapping[str, int]

    def width(self, name: str) -> int:
        """Return the channels of a stream, or of a node or a state, over all heads."""
        return self.widths.get(name, self.num_heads * self.dim)


def _as_factors(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise PydanticCustomError(
        "operand_form",
        "found {found}; required: a name, or a list of names for their product.",
        {"found": repr(value)},
    )


Operand = Annotated[
    tuple[Text, ...],
    BeforeValidator(_as_factors),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
"""A name, or several whose product is meant."""


class Node(Component, family="node", noun="node"):
    """One vector of a cell: act(f(operands)).

    Args:
        activation: act.
    """

    activation: Activation = "none"

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Return the streams, nodes and previous states that the node reads, each once, in order."""

    def parameters(self, dims: CellDims) -> Parameters:
        """Return what the node learns; nothing by default."""
        return {}

    def findings(self, dims: CellDims) -> Iterator[Finding]:
        """Yield (path below the node, sentence) for operands that do not fit: by default, not as wide as the cell."""
        wide = dims.num_heads * dims.dim
        for name in self.names():
            if dims.width(name) != wide:
                yield (), f"{name} is {dims.width(name)} wide and the cell {wide}; use a 'dense' map of a linear node."

    def prepare(self, known: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor | None:
        """Return the part made of ``known`` operands only, for all tokens at once; None if there is no such part."""
        return None

    @abstractmethod
    def value(self, values: Mapping[str, Tensor], parameters: Mapping[str, Tensor], prepared: Tensor | None) -> Tensor:
        """Return f [..., H d], before the activation.

        Args:
            values: the operands [..., H d], streams [..., width]; those that ``prepared`` is made of are left out.
            parameters: what the node learns.
            prepared: what ``prepare`` returned, for the tokens at hand.
        """


class Arithmetic(Node):
    """A node without weights, of a list of operands.

    Args:
        of: names, or lists of names for their products.
    """

    of: Annotated[tuple[Operand, ...], Field(min_length=1)]

    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for factors in self.of for name in factors))

    def value(self, values: Mapping[str, Tensor], parameters: Mapping[str, Tensor], prepared: Tensor | None) -> Tensor:
        return self.combine([product(values, factors) for factors in self.of])

    @abstractmethod
    def combine(self, operands: list[Tensor]) -> Tensor:
        """Return f of the operands, [..., H d] each."""


Pair = Annotated[tuple[Operand, ...], Field(min_length=2, max_length=2)]


class Pairwise(Arithmetic):
    """A node of exactly two operands."""

    of: Pair


def product(values: Mapping[str, Tensor], factors: tuple[str, ...]) -> Tensor:
    """Return the product of named values."""
    found = values[factors[0]]
    for name in factors[1:]:
        found = found * values[name]
    return found
