"""The read-out after combining as a module: norm and gate over what several memories, or a cell, return."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from archspec.blocks.carry import Carry
from archspec.blocks.gating import GateModule
from archspec.blocks.projection import NormModule
from archspec.blocks.source import Streams
from archspec.pieces import readout_gate
from archspec.schema import Readout
from archspec.shapes import HeadDims


class ReadoutModule(nn.Module):
    """Norm and gate, in the order the spec gives.

    Args:
        readout: the spec's choice.
        path: where the gate's source keeps its state.
        widths: widths of the streams that the gate may read.
        dims: H heads of V channels.
        depth: (layer, number of layers).
    """

    def __init__(
        self, readout: Readout, path: str, widths: Mapping[str, int], dims: HeadDims, depth: tuple[int, int]
    ) -> None:
        super().__init__()
        self.order, self.heads = readout.order, (dims.num_heads, dims.value_dim)
        self.over_model = readout.norm is not None and readout.norm.over == "model"
        width = dims.num_heads * dims.value_dim if self.over_model else dims.value_dim
        self.norm = NormModule(readout.norm, width, dims.num_heads) if readout.norm is not None else None
        self.gate = GateModule(readout.gate, f"{path}.gate", widths, dims, depth) if readout.gate is not None else None
        self.gate_activation = readout_gate(readout, width)

    def forward(self, read: Tensor, streams: Streams, carry: Carry) -> Tensor:
        """Return [B, T, H V] for what was read, [B, T, H V]."""
        shape = (*read.shape[:2], *self.heads)
        if self.norm is not None and self.gate is not None and self.gate_activation and self.norm.pieces_for(read):
            raw = self.gate.before_law(streams, carry).flatten(2)
            split = read.shape if self.over_model else shape
            return self.norm.gated(read.reshape(split), raw.reshape(split), self.gate_activation).flatten(2)
        for stage in self.order:
            if stage == "norm" and self.norm is not None:
                read = self.norm(read) if self.over_model else self.norm(read.reshape(shape)).flatten(2)
            elif stage == "gate" and self.gate is not None:
                gate: Tensor = self.gate(streams, carry, {}).squeeze(-2)  # [B, T, H, 1 or V]
                read = (read.reshape(shape) * gate.to(read.dtype)).flatten(2)
        return read
