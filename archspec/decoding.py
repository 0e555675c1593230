"""Decoding through a CUDA graph: one launch a token, whatever the number of layers."""

from __future__ import annotations

import torch
from torch import Tensor

from archspec.blocks.carry import State
from archspec.blocks.contextual import MemoryAsContextModule
from archspec.blocks.mixer import MemoryMixerModule
from archspec.blocks.model import SequenceModel
from archspec.blocks.projection import ProjectionModule
from archspec.errors import UnsupportedError
from archspec.program import Embed


class GraphDecoder:
    """Decodes one token of each sequence a call; the state lives in fixed tensors that every call advances in place.

    The graph holds the kernels of one call of ``model.step``. It is for models whose step is the same at every
    position: those with positions, anchors or a growing memory are refused.

    Args:
        model: a compiled model on CUDA, in eval mode or without anything that draws random numbers.
        state: the state after the prompt; it is copied.

    Raises:
        UnsupportedError: a model that is not on CUDA, or whose step depends on the position.
    """

    def __init__(self, model: SequenceModel, state: State) -> None:
        device = model.embedding.weight.device
        refusal = position_dependence(model)
        if device.type != "cuda":
            refusal = f"a CUDA graph needs the model on CUDA, found {device.type}"
        if refusal is not None:
            raise UnsupportedError(f"GraphDecoder: {refusal}; decode with model.step(token, state).")
        self.model = model
        self.state = State({name: tensor.detach().clone() for name, tensor in state.tensors.items()}, state.position)
        batch = next(iter(state.tensors.values())).shape[0]
        self.token = torch.zeros(batch, dtype=torch.long, device=device)
        kept = {name: tensor.clone() for name, tensor in self.state.tensors.items()}
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels and makes their workspaces, before the capture
                self._advance()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.logits = self._advance()
        for name, tensor in self.state.tensors.items():
            tensor.copy_(kept[name])

    @torch.no_grad()
    def _advance(self) -> Tensor:
        output = self.model.step(self.token, self.state, inplace=True)
        for name, tensor in output.state.tensors.items():
            fixed = self.state.tensors[name]
            if tensor is not fixed:
                fixed.copy_(tensor)
        return output.logits

    def step(self, token: Tensor) -> Tensor:
        """Return logits [B, vocab] for one token [B] of each sequence; the next call writes over them."""
        self.token.copy_(token)
        self._graph.replay()
        self.state = State(self.state.tensors, self.state.position + 1)
        return self.logits


def position_dependence(model: SequenceModel) -> str | None:
    """Return why a model's step is not the same at every position, or None when it is."""
    if model.spec.input.kind != "tokens":
        return f"the graph's input is a token, and the model reads {model.spec.input.kind} items"
    if model.spec.output.pooled == "mean":
        return "the output is a mean over the items so far"
    if model.spec.input.position != "none":
        return f"the input has {model.spec.input.position} positions"
    if any(isinstance(step, Embed) for step in model.program.instructions):
        return "a loop adds a code of its passes"
    for module in model.modules():
        if isinstance(module, ProjectionModule) and module.projection.position is not None:
            return f"{module.path} has {module.projection.position.kind} positions"
        if isinstance(module, MemoryMixerModule) and module.rule.memory.grows:
            return f"the memory of {module.path} grows with every token"
        anchor = module.rule.update.anchor if isinstance(module, MemoryMixerModule) else None
        if anchor is not None:
            return f"{module.path} takes gradients at an anchor that moves every {anchor.every} tokens"
        if isinstance(module, MemoryAsContextModule):
            return f"{module.path} starts a segment every {module.segment} tokens"
    return None
