"""What a mixer learns besides projections and gates: its memory's start and network, and its output's stages."""

from __future__ import annotations

from torch import Tensor

from archspec.blocks.declared import Declared
from archspec.families import OutputStage
from archspec.rule import Rule


class MemoryWeights(Declared):
    """The learned start weights of a memory and the parameters of its network."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.start_names = tuple(rule.memory.initial(rule.dims))
        anchor = rule.update.anchor
        shares = {} if anchor is None else anchor.parameters
        self.declare({**rule.memory.initial(rule.dims), **rule.memory.parameters(rule.dims), **shares})

    def start(self) -> dict[str, Tensor]:
        """Return the start weights by weight name."""
        values = self.values()
        return {name: values[name] for name in self.start_names}

    def network(self) -> dict[str, Tensor]:
        """Return the network's own parameters by name."""
        return {name: tensor for name, tensor in self.values().items() if name not in self.start_names}


class OutputModule(Declared):
    """One stage of a mixer's output with its parameters."""

    def __init__(self, stage: OutputStage, width: int, model_dim: int) -> None:
        super().__init__()
        self.stage = stage
        self.declare(stage.parameters(width, model_dim))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the stage's output [B, T, width'] for y [B, T, width] and the mixer's input x [B, T, D]."""
        return self.stage.apply(y, x, self.values())
