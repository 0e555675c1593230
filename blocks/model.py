"""The compiled model: embedding, blocks in their layout, norm and logits, with a state that passes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from archspec.blocks.carry import Carry, State
from archspec.blocks.cell import CellModule
from archspec.blocks.declared import Declared
from archspec.blocks.gating import join_layers
from archspec.blocks.halting import HaltingModule, Pondering
from archspec.blocks.mixer import MemoryMixerModule
from archspec.blocks.projection import NormModule
from archspec.errors import UnsupportedError
from archspec.families import FeedForward, Norm
from archspec.initial import Initial, Parameter
from archspec.program import Embed, Inject, Ponder, Remember, RunLayer, unroll
from archspec.schema import Block, Spec


@dataclass
class Output:
    """What a model returns.

    Args:
        logits: [B, T, vocab] (of ``step``: [B, vocab]).
        state: the state after the last token.
        auxiliary_loss: what layers add to the task's loss; None when no layer does.
    """

    logits: Tensor
    state: State
    auxiliary_loss: Tensor | None = None


class FeedForwardModule(Declared):
    """A channel mixer with its matrices."""

    shift_mix: Tensor

    def __init__(self, config: FeedForward, path: str, model_dim: int) -> None:
        super().__init__()
        self.config, self.path = config, path
        self.declare(config.parameters(model_dim))
        if config.shift == "lerp":
            self.declare({"shift_mix": Parameter((model_dim,), Initial(uniform=(0.0, 1.0)))})

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """Return [B, T, D] for x [B, T, D]."""
        if self.config.shift == "lerp":
            kept = carry.take(f"{self.path}.shift")
            last = torch.zeros_like(x[:, :1]) if kept is None else kept.to(x.dtype)
            carry.put(f"{self.path}.shift", x[:, -1:])
            x = x + self.shift_mix * (torch.cat([last, x[:, :-1]], dim=1) - x)
        pieces = self.pieces_for(x)
        if pieces is not None:
            return self.config.apply_fused(x, self.values(), pieces)
        return self.config.apply(x, self.values())


class BlockModule(nn.Module):
    """A sequence mixer and a channel mixer with residuals and norms."""

    def __init__(self, config: Block, path: str, norm: Norm | None, model_dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.placement = config.placement
        self.mixer = mixer
        self.feed_forward = (
            FeedForwardModule(config.feed_forward, f"{path}.feed_forward", model_dim)
            if config.feed_forward is not None
            else None
        )
        norm = config.norm or norm

        def fresh(needed: bool) -> NormModule | None:
            return NormModule(norm, model_dim) if norm is not None and needed else None

        has_channels = self.feed_forward is not None
        self.mixer_norm = fresh(True)
        self.mixer_post_norm = fresh(self.placement == "sandwich")
        self.channel_norm = fresh(has_channels and self.placement != "parallel")
        self.channel_post_norm = fresh(has_channels and self.placement == "sandwich")

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        """Return the block's output [B, T, D]."""
        if self.placement == "parallel":
            normed = _maybe(self.mixer_norm, x)
            x = x + self.mixer(normed, carry)
            return x if self.feed_forward is None else x + self.feed_forward(normed, carry)
        x = self._residual(x, self.mixer, self.mixer_norm, self.mixer_post_norm, carry)
        if self.feed_forward is None:
            return x
        return self._residual(x, self.feed_forward, self.channel_norm, self.channel_post_norm, carry)

    def _residual(
        self, x: Tensor, f: nn.Module, norm: NormModule | None, post: NormModule | None, carry: Carry
    ) -> Tensor:
        if self.placement == "post":
            return _maybe(norm, x + f(x, carry))
        return x + _maybe(post, f(_maybe(norm, x), carry))


def _maybe(norm: NormModule | None, x: Tensor) -> Tensor:
    result: Tensor = x if norm is None else norm(x)
    return result


class InputModule(Declared):
    """What comes in as the residual stream, with a code of the position when the spec asks for one."""

    weight: Tensor
    position_weight: Tensor

    def __init__(self, spec: Spec, vocab_size: int) -> None:
        super().__init__()
        self.input, self.model_dim = spec.input, spec.model_dim
        self.declare(spec.input.parameters(spec.model_dim, vocab_size))
        if self.input.position == "learned":
            shape = (self.input.max_length, spec.model_dim)
            self.declare({"position_weight": Parameter(shape, Initial(normal=0.02))})

    def forward(self, items: Tensor, position: int) -> Tensor:
        """Return [B, T, D] for items [B, T] or [B, T, dim] whose first is at ``position``."""
        x = self.input.embed(items, self.values())
        index = torch.arange(position, position + items.shape[1], device=items.device)
        if self.input.position == "learned":
            if position + items.shape[1] > self.input.max_length:
                raise IndexError(
                    f"input: token {position + items.shape[1] - 1} is beyond the {self.input.max_length} learned "
                    "positions; raise input.max_length or use another position"
                )
            x = x + self.position_weight[index]
        elif self.input.position == "sinusoidal":
            x = x + sinusoid(index, self.model_dim).to(x.dtype)
        return x


def pooled(x: Tensor, pool: str, carry: Carry) -> Tensor:
    """Return what is read after each item of x [B, T, D]: it, or the mean or maximum of all up to it.

    The sum or maximum so far is kept in at least fp32.
    """
    if pool == "last":
        return x
    path, wide = f"output.{pool}", x.to(torch.promote_types(x.dtype, torch.float32))
    kept = carry.take(path)
    if pool == "mean":
        totals = wide.cumsum(1) if kept is None else kept[:, None] + wide.cumsum(1)
        counts = torch.arange(carry.position + 1, carry.position + 1 + x.shape[1], device=x.device)
        found = totals / counts[:, None]
    else:
        found = totals = wide.cummax(1).values if kept is None else torch.maximum(wide.cummax(1).values, kept[:, None])
    carry.put(path, totals[:, -1])
    return found.to(x.dtype)


def sinusoid(index: Tensor, dim: int) -> Tensor:
    """Return the code [T, dim] of integer positions [T]: sines then cosines (Vaswani et al., section 3.5)."""
    half = (dim + 1) // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, device=index.device, dtype=torch.float64) / half)
    angle = index.to(torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :dim]


BuildMixer = Callable[[Block, str, tuple[int, int]], nn.Module]


class SequenceModel(Declared):
    """A compiled spec: tokens (or what else its input is) in, logits (or what else its output is) and state out.

    Args:
        spec: the checked spec.
        vocab_size: number of tokens; it comes from the task.
        build_mixer: makes the mixer of a block, given its path and (layer, number of layers).
    """

    embedding: InputModule

    def __init__(self, spec: Spec, vocab_size: int, build_mixer: BuildMixer) -> None:
        super().__init__()
        self.spec, self.vocab_size = spec, vocab_size
        self.embedding = InputModule(spec, vocab_size)
        self.program = unroll(spec.layout)
        count = len(self.program.blocks)
        self.layers = nn.ModuleList()
        for index, name in enumerate(self.program.blocks):
            block, path = spec.blocks[name], f"layers.{index}"
            mixer = build_mixer(block, f"{path}.mixer", (index, count))
            self.layers.append(BlockModule(block, path, spec.norm, spec.model_dim, mixer))
        join_layers(self.layers)
        self.norm = NormModule(spec.norm, spec.model_dim) if spec.norm is not None else None
        self.halting = nn.ModuleDict(
            {str(loop): HaltingModule(halt, spec.model_dim) for loop, halt in self.program.halts().items()}
        )
        self.declare(spec.output.parameters(spec.model_dim, vocab_size))

    def forward(self, tokens: Tensor, state: State | None = None) -> Output:
        """Return logits [B, T, vocab] for tokens [B, T], continuing from ``state``.

        With other inputs and outputs: [B, T, n] for items [B, T, dim].
        """
        return self._advance(tokens, self._carry(state))

    def _advance(self, tokens: Tensor, carry: Carry) -> Output:
        x = self._run(tokens, carry)[-1]
        logits = self.spec.output.apply(pooled(x, self.spec.output.pooled, carry), self.values(), self.embedding.weight)
        return Output(logits, State(carry.outgoing, carry.position + tokens.shape[1]), _total(carry))

    def step(self, token: Tensor, state: State | None = None, *, inplace: bool = False) -> Output:
        """Return logits [B, vocab] for one token [B] (or item [B, dim]) of each sequence, continuing from ``state``.

        Args:
            inplace: memories may write their new state into the tensors of ``state``, which is then used up.
        """
        carry = self._carry(state)
        carry.inplace = inplace
        output = self._advance(token[:, None], carry)
        return Output(output.logits[:, 0], output.state, output.auxiliary_loss)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return tokens [B, T + max_new_tokens]: the prompt [B, T] and its sampled continuation.

        ``temperature`` 0 takes the most likely token each time; ``top_k`` samples among that many only.

        Raises:
            UnsupportedError: a model that does not go from tokens to tokens.
        """
        ends = (self.spec.input.kind, self.spec.output.kind)
        if ends != ("tokens", "tokens"):
            raise UnsupportedError(f"generate: it goes from tokens to tokens, and this model from {' to '.join(ends)}.")
        output = self(tokens)
        logits, state, found = output.logits[:, -1], output.state, [tokens]
        for index in range(max_new_tokens):
            token = _sample(logits, temperature, top_k, generator)
            found.append(token[:, None])
            if index + 1 < max_new_tokens:
                output = self.step(token, state)
                logits, state = output.logits, output.state
        return torch.cat(found, dim=1)

    def features(self, tokens: Tensor) -> list[Tensor]:
        """Return the hidden states [B, T, D] after each layer, the last one after the final norm."""
        return self._run(tokens, self._carry(None))

    def memory_mixers(self) -> list[MemoryMixerModule]:
        """Return the memory mixers of the model, in order."""
        return [module for module in self.modules() if isinstance(module, MemoryMixerModule)]

    def memory_states(self, tokens: Tensor) -> list[Tensor]:
        """Return, per memory mixer and cell, its flattened state [B, n] after ``tokens`` [B, T]."""
        state = self(tokens).state
        found = []
        for mixer in self.modules():
            if not isinstance(mixer, MemoryMixerModule | CellModule):
                continue
            marks = mixer.memory_marks()
            kept = [
                tensor.flatten(1)
                for name, tensor in sorted(state.tensors.items())
                if any(mark in name for mark in marks)
            ]
            found.append(torch.cat(kept, dim=1))
        return found

    def _carry(self, state: State | None) -> Carry:
        return Carry(None, 0) if state is None else Carry(state.tensors, state.position)

    def _run(self, tokens: Tensor, carry: Carry) -> list[Tensor]:
        x = self.embedding(tokens, carry.position)
        found: list[Tensor] = []
        remembered: dict[int, Tensor] = {}
        pondered: dict[int, Pondering] = {}
        for step in self.program.instructions:
            if isinstance(step, RunLayer):
                x = self.layers[step.index](x, replace(carry, scope=step.scope))
                found.append(x)
            elif isinstance(step, Remember):
                remembered[step.loop] = x
            elif isinstance(step, Inject):
                x = x + remembered[step.loop]
            elif isinstance(step, Ponder):
                halting: HaltingModule = self.halting[str(step.loop)]  # type: ignore[assignment]
                kept = None if step.first else pondered[step.loop]
                x, pondered[step.loop] = halting(x, kept, carry, last=step.last)
            else:
                x = x + self._code(step, x, carry.position)
        if self.norm is not None:
            found[-1] = self.norm(x)
        return found

    def _code(self, step: Embed, x: Tensor, position: int) -> Tensor:
        """Return the code of a pass [1, D], or of each token's position and the pass [T, D]."""
        # Filled on the device: a number that is copied there makes the host wait, and cannot be captured.
        code = sinusoid(torch.full((1,), step.number, device=x.device), x.shape[-1])
        if step.positions:
            places = torch.arange(position, position + x.shape[1], device=x.device)
            code = code + sinusoid(places, x.shape[-1])
        return code.to(x.dtype)


def _total(carry: Carry) -> Tensor | None:
    return torch.stack(carry.auxiliary).sum() if carry.auxiliary else None


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float() / temperature
    if top_k is not None:
        least = scaled.topk(min(top_k, scaled.shape[-1]), dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -math.inf)
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator)[:, 0]


def num_parameters(model: nn.Module, *, embedding: bool = True) -> int:
    """Return the number of scalars learned, with or without the input's map and an output of its own."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if embedding or not isinstance(model, SequenceModel):
        return total
    outside = [*model.embedding.parameters(recurse=False), *model.parameters(recurse=False)]
    return total - sum(parameter.numel() for parameter in outside)
