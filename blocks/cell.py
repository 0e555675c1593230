"""A recurrent cell as a module: what no state enters for all tokens at once, the rest token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from archspec.blocks.activation import activate
from archspec.blocks.carry import Carry
from archspec.blocks.declared import Declared, Named
from archspec.blocks.projection import StreamModule
from archspec.blocks.readout import ReadoutModule
from archspec.cells import PREVIOUS, CellDims, Node
from archspec.initial import FAN_IN, Parameter

if TYPE_CHECKING:
    from archspec.blocks.mixers.cell import Cell

Values = dict[str, Tensor]


class NodeModule(Declared):
    """One node with what it learns."""

    def __init__(self, node: Node, dims: CellDims, depth: tuple[int, int]) -> None:
        super().__init__(depth)
        self.node, self.dims = node, dims
        self.declare(node.parameters(dims))


@dataclass(frozen=True)
class Running:
    """A node at work: its module, and its parameters in the dtype of the state."""

    module: NodeModule
    parameters: Values

    @property
    def names(self) -> tuple[str, ...]:
        """The operands."""
        return self.module.node.names()

    def prepare(self, known: Values) -> Tensor | None:
        """Return the part made of ``known`` operands and the offset, for all tokens at once."""
        return self.module.node.prepare(known, self.parameters)

    def value(self, values: Values, prepared: Tensor | None) -> Tensor:
        """Return the node [..., H d], its activation taken head by head."""
        node, dims = self.module.node, self.module.dims
        x = node.value(values, self.parameters, prepared)
        if node.activation in ("none", "linear"):
            return x
        return activate(node.activation, x.reshape(*x.shape[:-1], dims.num_heads, dims.dim)).flatten(-2)


class CellModule(Declared):
    """x [B, T, D] to [B, T, D]; the nodes are those of ``blocks.mixers.cell``.

    The state is kept in at least fp32, as memories are: [B, H d] for each of its nodes.
    """

    output: Tensor

    def __init__(self, config: Cell, path: str, model_dim: int, depth: tuple[int, int]) -> None:
        super().__init__(depth)
        self.config, self.path = config, path
        sizes, self.dims = config.head_dims(model_dim), config.cell_dims(model_dim)
        widths = self.dims.widths
        self.streams = Named(
            {name: StreamModule(each, f"{path}.streams.{name}", widths, sizes) for name, each in config.streams.items()}
        )
        self.nodes = Named({name: NodeModule(node, self.dims, depth) for name, node in config.nodes.items()})
        self.readout = ReadoutModule(config.readout, f"{path}.readout", widths, sizes, depth)
        inner = self.dims.width(config.output)
        if config.project:
            self.declare({"output": Parameter((inner, model_dim), FAN_IN, decayed=True)})
        free, order = config.free(), config.ordered()
        self.free = [name for name in order if name in free]
        self.bound = [name for name in order if name not in free]

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """Return the mixer's output [B, T, D] for x [B, T, D]; the state passes through ``carry``."""
        streams: Values = {"input": x}
        for name, stream in self.streams.items():
            streams[name] = stream(streams, carry)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        nodes = self._running(dtype)
        known = {name: stream.to(dtype) for name, stream in streams.items()}
        for name in self.free:
            known[name] = nodes[name].value(known, nodes[name].prepare({}))
        state = self._start(carry, x.shape[0], known["input"])
        read = self._run(nodes, known, state)
        for name, tensor in state.items():
            carry.put(f"{self.path}.{name}", tensor)
        combined: Tensor = self.readout(read.to(x.dtype), streams, carry)
        return combined @ self.output if self.config.project else combined

    def memory_marks(self) -> list[str]:
        """Return what the paths of the state's tensors contain."""
        return [f"{self.path}.{name}" for name in self.config.state]

    def _running(self, dtype: torch.dtype) -> dict[str, Running]:
        """Return the nodes with their parameters in the dtype of the state."""
        return {
            name: Running(module, {key: tensor.to(dtype) for key, tensor in module.values().items()})
            for name, module in self.nodes.items()
            if isinstance(module, NodeModule)
        }

    def _start(self, carry: Carry, batch: int, like: Tensor) -> Values:
        kept = carry.take_all(self.path)
        if kept is None:
            wide = self.dims.num_heads * self.dims.dim
            return {name: like.new_zeros(batch, wide) for name in self.config.state}
        return {name: kept[name] for name in self.config.state}

    def _run(self, nodes: dict[str, Running], known: Values, state: Values) -> Tensor:
        """Advance ``state`` over the tokens and return the output node, [B, T, H d]."""
        prepared = {name: nodes[name].prepare(known) for name in self.bound}
        # A prepared part is made of everything known, and what it is made of takes no part in the loop.
        needs = {
            name: [each for each in nodes[name].names if prepared[name] is None or each not in known]
            for name in self.bound
        }
        kept = {*state, self.config.output}
        length = known["input"].shape[1]
        # unbind: one backward for all tokens, where a slice each would fill a whole sequence with zeros each.
        ahead = {
            name: tensor.unbind(1)
            for name, tensor in known.items()
            if name in kept or any(name in each for each in needs.values())
        }
        parts = {
            name: part.unbind(1) if part is not None and part.ndim == 3 else (part,) * length  # an offset has no tokens
            for name, part in prepared.items()
        }
        found = []
        for t in range(length):
            values = {f"{PREVIOUS}{name}": tensor for name, tensor in state.items()}
            values.update({name: tokens[t] for name, tokens in ahead.items()})
            for name in self.bound:
                values[name] = nodes[name].value({each: values[each] for each in needs[name]}, parts[name][t])
            state.update({name: values[name] for name in state})
            found.append(values[self.config.output])
        return torch.stack(found, dim=1)
