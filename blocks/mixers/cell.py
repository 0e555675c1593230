"""Recurrent cells: vectors that depend on the state before the token, nonlinearly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from archspec.cells import PREVIOUS, CellDims, Node
from archspec.component import Count, Flag, Text
from archspec.composition import Finding, Lowered, Mixer, Path
from archspec.declarations import num_buffered, source_parameters, stream_width
from archspec.errors import nearest
from archspec.families import Dim, Stream
from archspec.fitting import gate_blocks_divide
from archspec.initial import FAN_IN, Parameter, Parameters
from archspec.kept import Kept
from archspec.readouts import readout_findings, readout_kept, readout_parameters
from archspec.schema import WIDTH, Readout
from archspec.shapes import HeadDims

if TYPE_CHECKING:
    from torch.nn import Module

Names = Annotated[
    tuple[Text, ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]


class Cell(Mixer, kind="cell"):
    """Nodes over H heads of d channels, token by token; some of them are kept as the state, which starts at zero.

    It lies outside the four choices: its coordinates are nominal.

    Args:
        num_heads: H; a ``head`` map keeps to its head, a ``dense`` one does not.
        dim: size over all heads when relative, of one head when a number.
        streams: named signals that nodes can read besides ``input``.
        state: the nodes whose value a later token reads as ``previous.NAME``.
        nodes: what is computed, by name; the order does not matter.
        output: the node that is returned, through read-out and output projection.
        project: whether there is an output projection.
        readout: norm and gate.
    """

    num_heads: Count = 1
    dim: Dim = WIDTH
    streams: dict[Text, Stream] = Field(default_factory=dict)
    state: Names
    nodes: dict[Text, Node] = Field(min_length=1)
    output: Text
    project: Flag = True
    readout: Readout = Field(default_factory=Readout)

    def head_dims(self, model_dim: int) -> HeadDims:
        """Return the sizes of the heads.

        Raises:
            ValueError: when a relative size does not divide by the number of heads.
        """
        size = self.dim.resolve({"model_dim": model_dim, "num_heads": self.num_heads})
        if self.dim.fixed is None:
            if size % self.num_heads:
                raise ValueError(
                    f"dim is {size} over all heads, which num_heads={self.num_heads} does not divide; "
                    f"change the ratio, model_dim or num_heads"
                )
            size //= self.num_heads
        return HeadDims(model_dim, self.num_heads, size, size)

    def cell_dims(self, model_dim: int) -> CellDims:
        """Return the sizes that nodes see."""
        dims = self.head_dims(model_dim)
        widths = {"input": model_dim}
        for name, stream in self.streams.items():
            widths[name] = stream_width(stream, sum(widths[source] for source in stream.from_), dims)
        return CellDims(dims.num_heads, dims.value_dim, widths)

    def ordered(self) -> list[str]:
        """Return the nodes, those first that others read of the same token.

        Raises:
            ValueError: when nodes read each other in a circle; the message shows it.
        """
        found: list[str] = []

        def visit(name: str, trail: tuple[str, ...]) -> None:
            if name in trail:
                circle = " -> ".join((*trail[trail.index(name) :], name))
                raise ValueError(f"the nodes read each other: {circle}; let one read 'previous.{name}'")
            if name in self.nodes and name not in found:
                for operand in self.nodes[name].names():
                    visit(operand, (*trail, name))
                found.append(name)

        for name in self.nodes:
            visit(name, ())
        return found

    def free(self) -> set[str]:
        """Return the nodes that no state enters: they are computed for all tokens at once."""
        found: set[str] = set()
        for name in self.ordered():
            operands = self.nodes[name].names()
            if not any(each.startswith(PREVIOUS) or (each in self.nodes and each not in found) for each in operands):
                found.add(name)
        return found

    def own_parameters(self, model_dim: int) -> Parameters:
        dims, sizes = self.cell_dims(model_dim), self.head_dims(model_dim)
        found: dict[str, Parameter] = {}
        for name, stream in self.streams.items():
            d_in = sum(dims.widths[source] for source in stream.from_)
            own = source_parameters(stream, d_in, dims.widths[name], vars(sizes), has_weights=stream.has_weights)
            found.update({f"streams.{name}.{key}": p for key, p in own.items()})
            if stream.norm is not None:
                learned = stream.norm.parameters(dims.widths[name])
                found.update({f"streams.{name}.norm.{key}": p for key, p in learned.items()})
        for name, node in self.nodes.items():
            found.update({f"nodes.{name}.{key}": p for key, p in node.parameters(dims).items()})
        found.update(readout_parameters(self.readout, dims.widths, sizes))
        if self.project:
            found["output"] = Parameter((dims.width(self.output), model_dim), FAN_IN, decayed=True)
        return found

    def own_state(self, model_dim: int) -> Kept:
        dims = self.cell_dims(model_dim)
        kept = len(set(self.state)) * dims.num_heads * dims.dim
        own = Kept(memory=kept, buffer=num_buffered(self.own_parameters(model_dim)))
        return own + readout_kept(self.readout, self.head_dims(model_dim))

    def findings(self, model_dim: int) -> Iterator[Finding]:
        found = [*self._stream_findings(), *self._name_findings()]
        if not found:
            found = list(self._use_findings())
        try:
            dims = self.cell_dims(model_dim) if not found else None
        except ValueError as error:
            found.append((("dim",), f"{error}."))
            dims = None
        yield from found
        if dims is not None:
            yield from self._width_findings(dims)
            width = dims.width(self.output)
            if not self.project and width != model_dim:
                yield ("project",), f"{self.output} has {width} channels and the model {model_dim}; project them."
            home = "a cell has nodes for that"
            yield from readout_findings(self.readout, ["input", *self.streams], home)
            if self.readout.gate is not None:
                sizes = self.head_dims(model_dim)
                yield from gate_blocks_divide("readout.gate", self.readout.gate, dims.widths, sizes)

    def _stream_findings(self) -> Iterator[Finding]:
        seen = ["input"]
        for name, stream in self.streams.items():
            if name == "input" or name in self.nodes:
                yield ("streams", name), f"{name!r} is taken; choose another name for the stream."
            for source in stream.from_:
                if source not in seen:
                    known = f"known here: {', '.join(sorted(seen))}.{nearest(source, seen)}"
                    yield ("streams", name, "from"), f"unknown stream {source!r}; {known}"
            seen.append(name)

    def _name_findings(self) -> Iterator[Finding]:
        """Every name must mean something."""
        readable = [*self.nodes, *(f"{PREVIOUS}{name}" for name in self.state), "input", *self.streams]
        for name, node in self.nodes.items():
            if name == "input" or "." in name or name == "previous":
                yield ("nodes", name), f"{name!r} is taken, or has a dot; choose another name for the node."
            for operand in node.names():
                if operand not in readable:
                    yield ("nodes", name), _unknown(operand, readable)
        for index, name in enumerate(self.state):
            if name not in self.nodes:
                yield ("state", index), _unknown(name, list(self.nodes))
        if self.output not in self.nodes:
            yield ("output",), _unknown(self.output, list(self.nodes))

    def _use_findings(self) -> Iterator[Finding]:
        """No circles, and nothing that leads nowhere."""
        try:
            self.ordered()
        except ValueError as error:
            yield ("nodes",), f"{error}."
            return
        used, queue = set(), [self.output]
        while queue:
            name = queue.pop().removeprefix(PREVIOUS)
            if name not in used:
                used.add(name)
                queue.extend(self.nodes[name].names() if name in self.nodes else ())
        for name in self.nodes:
            if name not in used:
                yield ("nodes", name), f"nothing that is returned or kept reads {name!r}; remove it, or read it."
        reads = {operand for node in self.nodes.values() for operand in node.names()}
        for index, name in enumerate(self.state):
            if f"{PREVIOUS}{name}" not in reads:
                yield ("state", index), f"no node reads 'previous.{name}'; remove it from the state, or read it."

    def _width_findings(self, dims: CellDims) -> Iterator[Finding]:
        for name, node in self.nodes.items():
            yield from ((("nodes", name, *path), message) for path, message in node.findings(dims))

    def normal_form(self, plain: dict[str, Any]) -> dict[str, Any]:
        """The order of the state says nothing."""
        return {**plain, "state": sorted(set(plain["state"]))}

    def summary(self) -> str:
        return f"vector({', '.join(self.state)}) x none x gated x cell"

    def lowered(self) -> Lowered:
        return Lowered("cell", "recurrence", "the state enters nonlinearly: one token after another")

    def build(self, instances: Mapping[Path, Module], path: str, model_dim: int, depth: tuple[int, int]) -> Module:
        from archspec.blocks.cell import CellModule

        return CellModule(self, path, model_dim, depth)


def _unknown(name: str, known: list[str]) -> str:
    return f"unknown name {name!r}; known here: {', '.join(sorted(known))}.{nearest(name, known)}"
