"""Learned maps of streams, nodes and previous states, summed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from archspec.cells import CellDims, Node
from archspec.component import Text
from archspec.composition import Finding
from archspec.families import Part
from archspec.initial import FAN_IN, Initial, Offset, Parameter, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class Map(Part):
    """How one operand x enters: x W (``dense``), x W_h for each head by itself (``head``), or x * w (``diagonal``).

    Args:
        kind: which of the three.
        init: law of the weights; absent means normal with variance 1/d_in, and for ``diagonal`` uniform in [-1, 1].
    """

    short_forms: ClassVar[tuple[dict[str, Any], ...]] = ({"enum": ["dense", "head", "diagonal"]},)

    kind: Literal["dense", "head", "diagonal"]
    init: Initial | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    def parameter(self, width: int, dims: CellDims) -> Parameter:
        """Declare the weights for an operand of ``width`` channels."""
        heads, dim = dims.num_heads, dims.dim
        if self.kind == "dense":
            return Parameter((width, heads * dim), self.init or FAN_IN, decayed=True)
        if self.kind == "head":
            return Parameter((heads, width // heads, dim), self.init or FAN_IN, decayed=True)
        return Parameter((heads, dim), self.init or Initial(uniform=(-1.0, 1.0)))


class Linear(Node, kind="linear"):
    """act(sum over the operands of their maps + b).

    Args:
        of: operand -> map.
        offset: law of b, laid out per head; absent means there is none.
    """

    of: dict[Text, Map] = Field(min_length=1)
    offset: Offset = None

    def names(self) -> tuple[str, ...]:
        return tuple(self.of)

    def parameters(self, dims: CellDims) -> Parameters:
        found = {_weight(name): each.parameter(dims.width(name), dims) for name, each in self.of.items()}
        if self.offset is not None:
            found["offset"] = Parameter((dims.num_heads, dims.dim), self.offset)
        return found

    def findings(self, dims: CellDims) -> Iterator[Finding]:
        wide = dims.num_heads * dims.dim
        for name, each in self.of.items():
            width = dims.width(name)
            if each.kind == "head" and width % dims.num_heads:
                yield ("of", name), f"{name} is {width} wide, which num_heads={dims.num_heads} does not divide."
            if each.kind == "diagonal" and width != wide:
                yield ("of", name), f"{name} is {width} wide and the cell {wide}; use 'dense' or 'head'."

    def prepare(self, known: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor | None:
        parts = [self._mapped(name, known[name], parameters) for name in self.of if name in known]
        if self.offset is not None:
            parts.append(parameters["offset"].flatten())
        return sum(parts[1:], parts[0]) if parts else None

    def value(self, values: Mapping[str, Tensor], parameters: Mapping[str, Tensor], prepared: Tensor | None) -> Tensor:
        parts = [self._mapped(name, values[name], parameters) for name in self.of if name in values]
        parts = parts if prepared is None else [prepared, *parts]
        return sum(parts[1:], parts[0])

    def _mapped(self, name: str, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return [..., H d] for x [..., width]."""
        weight, kind = parameters[_weight(name)], self.of[name].kind
        if kind == "dense":
            return x @ weight
        if kind == "diagonal":
            return x * weight.flatten()
        by_head = x.reshape(-1, weight.shape[0], weight.shape[1]).transpose(0, 1)  # [H, tokens, width / H]
        return (by_head @ weight).transpose(0, 1).reshape(*x.shape[:-1], -1)


def _weight(name: str) -> str:
    """Return what the weights of an operand are called."""
    return f"w_{name.replace('.', '_')}"
