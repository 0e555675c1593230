"""Memory as context as a module: attention over segments, each with what its tokens read from a memory."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from archspec.blocks.carry import Carry
from archspec.blocks.mixer import MemoryMixerModule
from archspec.blocks.rule import MemoryState


class MemoryAsContextModule(nn.Module):
    """x [B, T, D] to [B, T, D]; the equations are those of ``blocks.mixers.memory_as_context``.

    Kept between tokens: the memory, the weights it had at the segment's start (``start``), the attention's store of
    the segment, and the look-up's convolutions (in the scope ``lookup.``).
    """

    def __init__(self, memory: nn.Module, attention: nn.Module, path: str, segment: int) -> None:
        super().__init__()
        if not isinstance(memory, MemoryMixerModule):
            raise TypeError(f"memory_as_context looks things up in a memory mixer, found {type(memory).__name__}")
        self.memory, self.attention, self.path, self.segment = memory, attention, path, segment

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """Run the segments one after another: what one writes, the next reads."""
        outputs, before, place = [], carry.incoming, 0
        while place < x.shape[1]:
            position = carry.position + place
            count = min(self.segment - position % self.segment, x.shape[1] - place)
            # What layers share is for whole stretches: a segment has tokens that the other layers do not.
            part = Carry(before, position, {}, {}, carry.auxiliary, carry.scope)
            outputs.append(self._segment(x[:, place : place + count], part))
            before, place = part.outgoing, place + count
        carry.outgoing.update(before or {})
        return torch.cat(outputs, dim=1)

    def _segment(self, x: Tensor, carry: Carry) -> Tensor:
        """Read, attend and write the tokens x [B, n, D] of one segment."""
        phase = carry.position % self.segment
        start = self._start(x, carry, phase)
        read = self.memory.look_up(x, replace(carry, scope=f"{carry.scope}lookup."), start)
        pairs = torch.stack([read, x], dim=2).flatten(1, 2)  # h_1 x_1 h_2 x_2 ...
        incoming = carry.incoming if phase else None
        y: Tensor = self.attention(pairs, replace(carry, incoming=incoming, position=2 * phase))[:, 1::2]
        for name, tensor in start.items():
            carry.put(f"{self.path}.start.{name}", tensor)
        written: Tensor = self.memory(y, carry)
        return y * written

    def _start(self, x: Tensor, carry: Carry, phase: int) -> MemoryState:
        """Return the memory's weights as they stood when the segment started."""
        if phase:
            return carry.take_all(f"{self.path}.start") or {}
        state = carry.take_all(self.memory.path)
        state = self.memory.initial_state(x) if state is None else state
        return {name: tensor for name, tensor in state.items() if name.startswith("dual.")}
