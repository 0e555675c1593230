"""The sequential family's form: one token after another, each as a recorded list of operations on the weights.

It serves rules whose every gradient sees weights that the token before has moved. What does not depend on the weights
is done for all tokens at once: quantities are laid out and cut, a loss's window is gathered, and the read-outs of a
stretch are one batch. What is left, ``descending.advance`` of one token, is recorded once for tensors of these shapes
(see ``recording``), and so is its pullback: going back, every token starts from the state before it, which is all that
is kept of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from archspec.blocks.descending import advance, product
from archspec.blocks.recurrence import recurrence
from archspec.blocks.rule import MemoryState, Quantities, initial_state
from archspec.recording import CannotRecord, Program, recorded
from archspec.rule import Rule
from archspec.windows import window_fields, window_rows

STRETCH = 32  # tokens whose weights are held side by side, so that they are read in one batch
MAX_PROGRAMS = 256

_programs: dict[str, _Token | None] = {}


def sequential(
    rule: Rule, quantities: Quantities, state: MemoryState | None, position: int, backend: str
) -> tuple[Tensor, MemoryState]:
    """Run the rule token by token; arguments and results as for ``recurrence``."""
    fresh = initial_state(rule, quantities)
    before = fresh if state is None else state
    tokens, windows = _cut(rule, quantities, before)
    parameters = {name: x.to(quantities.state_dtype).contiguous() for name, x in quantities.parameters.items()}
    layout = _Layout(
        state=tuple(fresh),
        fields=tuple(tokens.fields),
        gates=tuple(tokens.gates),
        parameters=tuple(parameters),
        steps=quantities.steps,
    )
    kept = [before[name].contiguous() for name in layout.state]
    rows = [*tokens.fields.values(), *tokens.gates.values(), *(x[None] for x in parameters.values())]
    length = quantities.query.shape[1]
    recordings = _recordings(rule, layout, [*kept, *(x[0] for x in rows)], position, length)
    if recordings is None:
        return recurrence(rule, quantities, state, position)
    reads = []
    for start in range(0, length, STRETCH):
        count = min(STRETCH, length - start)
        part = [x[start : start + count] if x.shape[0] > 1 else x for x in rows]
        found = _Stretch.apply(recordings[start : start + count], *kept, *part)  # type: ignore[no-untyped-call]
        kept = list(found[: len(kept)])
        weights = dict(zip(rule.memory.weights(rule.dims), found[len(kept) :], strict=True))
        query = quantities.query[:, start : start + count].transpose(1, 2).to(quantities.state_dtype)
        reads.append(rule.memory.finish(rule.memory.network(product(weights), query, parameters), rule.dims))
    read = torch.cat(reads, dim=2).transpose(1, 2).to(quantities.query.dtype)
    return read, {**dict(zip(layout.state, kept, strict=True)), **windows}


@dataclass(frozen=True)
class _Layout:
    """Which tensors a recorded token takes, in this order.

    Args:
        state: what a token leaves behind for the next, by name.
        fields: attributes of ``Quantities`` [B, H, C, d].
        gates: gates by path, as ``recurrence`` lays them out for one token.
        parameters: parameters of the memory's network by name.
        steps: steps a token takes.
    """

    state: tuple[str, ...]
    fields: tuple[str, ...]
    gates: tuple[str, ...]
    parameters: tuple[str, ...]
    steps: int

    def token(self, arguments: Sequence[Tensor]) -> tuple[Quantities, MemoryState]:
        """Return the token, and the state before it, that a list of tensors stands for."""
        given = iter(arguments)
        state = {name: next(given) for name in self.state}
        fields: dict[str, Any] = {name: next(given) for name in self.fields}
        gates = {name: next(given) for name in self.gates}
        parameters = {name: next(given) for name in self.parameters}
        # Its query reads the weights afterwards.
        return Quantities(fields["key"], gates=gates, parameters=parameters, steps=self.steps, **fields), state


class _Token:
    """One token of a rule as recorded operations, and their pullback.

    Args:
        rule, layout: what is recorded.
        phase: how many tokens lie between it and the anchor before it.
        arguments: tensors like those it will be given.
    """

    def __init__(self, rule: Rule, layout: _Layout, phase: int, arguments: Sequence[Tensor]) -> None:
        # A token brings its whole window along.
        self.rule = replace(rule, bias=rule.bias.model_copy(update={"window": None}))
        self.layout, self.phase = layout, phase
        self.num_states = len(layout.state)
        self.run = recorded(self._advanced, arguments)
        self._pull: Program | None = None

    def _advanced(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Return the state after the token and the weights to read."""
        token, before = self.layout.token(given)
        source, after = advance(self.rule, token, before, self.phase)
        names = self.rule.memory.weights(self.rule.dims)
        return tuple(x.contiguous() for x in (*(after[n] for n in self.layout.state), *(source[n] for n in names)))

    def pull(self, arguments: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the gradients of the arguments from those of what ``run`` returned."""
        if self._pull is None:
            count = len(arguments)

            def pulled(*given: Tensor) -> list[Tensor]:
                vjp: Any = torch.func.vjp(self._advanced, *given[:count])
                return [x.contiguous() for x in vjp[1](tuple(given[count:]))]

            self._pull = recorded(pulled, [*arguments, *gradients])
        return self._pull(*arguments, *gradients)


def _recordings(
    rule: Rule, layout: _Layout, arguments: Sequence[Tensor], position: int, length: int
) -> list[_Token] | None:
    """Return the recorded tokens of a stretch, for arguments like these; None when they cannot be recorded."""
    every = 1 if rule.update.anchor is None else rule.update.anchor.every
    kinds = [id(type(choice)) for choice in (rule.memory, rule.bias, rule.retention, rule.update)]
    shapes = [(tuple(x.shape), x.dtype, x.device, torch.is_autocast_enabled(x.device.type)) for x in arguments]
    key = repr((rule, kinds, layout, shapes))
    found: dict[int, _Token] = {}
    for phase in {(position + t) % every for t in range(min(length, every))}:
        token = _recorded(rule, layout, phase, arguments, f"{phase} {key}")
        if token is None:
            return None
        found[phase] = token
    return [found[(position + t) % every] for t in range(length)]


def _recorded(rule: Rule, layout: _Layout, phase: int, arguments: Sequence[Tensor], key: str) -> _Token | None:
    if key not in _programs:
        while len(_programs) >= MAX_PROGRAMS:
            del _programs[next(iter(_programs))]
        try:
            _programs[key] = _Token(rule, layout, phase, arguments)
        except CannotRecord:
            _programs[key] = None
    return _programs[key]


class _Stretch(torch.autograd.Function):
    """Some tokens: (state before, rows of the tokens) to (state after, weights to read [B, H, C, d_in, d_out])."""

    @staticmethod
    def forward(ctx: Any, tokens: Sequence[_Token], *given: Tensor) -> tuple[Tensor, ...]:
        """Run the tokens; rows have them as the first axis, or one row for all."""
        num_states = tokens[0].num_states
        kept, rows = list(given[:num_states]), given[num_states:]
        states, sources = [], []
        for token, row in zip(tokens, _each(rows, len(tokens)), strict=True):
            states.append(kept)
            found = token.run(*kept, *row)
            kept = list(found[:num_states])
            sources.append(found[num_states:])
        ctx.tokens = tokens
        ctx.save_for_backward(*rows, *(x for state in states for x in state))
        side_by_side = [torch.stack(tensors, dim=2) for tensors in zip(*sources, strict=True)]
        # A state that is passed on as it came is a tensor of its own, as autograd wants what a function returns.
        return (*(x.clone() if any(x is y for y in given) else x for x in kept), *side_by_side)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Go back token by token, each from the state before it."""
        count, num_states = len(ctx.tokens), ctx.tokens[0].num_states
        num_rows = len(ctx.saved_tensors) - num_states * count
        rows, states = ctx.saved_tensors[:num_rows], ctx.saved_tensors[num_rows:]
        after = [x.contiguous() for x in gradients[:num_states]]
        sources = [x.movedim(2, 0).contiguous().unbind(0) for x in gradients[num_states:]]
        found: list[tuple[Tensor, ...]] = []
        for t, row in reversed(list(enumerate(_each(rows, count)))):
            state = states[t * num_states : (t + 1) * num_states]
            pulled = ctx.tokens[t].pull([*state, *row], [*after, *(x[t] for x in sources)])
            after = list(pulled[:num_states])
            found.append(pulled[num_states:])
        of_rows = []
        for x, tensors in zip(rows, zip(*reversed(found), strict=True), strict=True):
            whole = torch.stack(tensors)
            of_rows.append(whole if x.shape[0] == count else whole.sum(0, keepdim=True))
        return (None, *after, *of_rows)


def _each(rows: Sequence[Tensor], count: int) -> list[tuple[Tensor, ...]]:
    """Return the rows of each token."""
    cut = [x.unbind(0) if x.shape[0] == count else [x[0]] * count for x in rows]
    return list(zip(*cut, strict=True))


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a stretch: fields and gates by name, with the tokens as the first axis, or one row for all."""

    fields: Mapping[str, Tensor]
    gates: Mapping[str, Tensor]


def _cut(rule: Rule, quantities: Quantities, state: MemoryState) -> tuple[_Tokens, MemoryState]:
    """Return the tokens, each as ``recurrence`` lays it out, with its window before it, and the window at the end."""
    dtype, steps = quantities.state_dtype, quantities.steps
    gates = {path: _gate(path, gate.to(dtype), steps) for path, gate in quantities.gates.items()}
    fields = window_fields(quantities)
    if rule.bias.window is None:
        laid = {name: _by_token(x.to(dtype), steps if name != "read_key" else 1) for name, x in fields.items()}
        return _Tokens(laid, gates), {}
    found, windows = window_rows(rule, quantities, state)
    laid = {path: x.unsqueeze(-2).contiguous() for path, x in found.items() if path.startswith("bias.")}
    return _Tokens({name: found[name].contiguous() for name in fields}, {**gates, **laid}), windows


def _by_token(x: Tensor, steps: int) -> Tensor:
    """Return [B, S T, H, d] as [T, B, H, S, d]."""
    return x.reshape(x.shape[0], -1, steps, *x.shape[2:]).permute(1, 0, 3, 2, 4).contiguous()


def _gate(path: str, gate: Tensor, steps: int) -> Tensor:
    """Return a gate [B or 1, T or 1, H, ..] with its tokens first; one with a row a step as [T, B, S, H, ..]."""
    if path in Quantities.stepped_gates and steps > 1 and gate.shape[1] > 1:
        gate = gate.reshape(gate.shape[0], -1, steps, *gate.shape[2:])
    return gate.transpose(0, 1).contiguous()
