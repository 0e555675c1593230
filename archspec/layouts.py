"""Rules on a matrix as other rules on other layouts, so that the forms of a few serve many.

- A query that reads before its own token reads what the token before it has left: queries move up by one token.
- Turns of pairs of states are taken into the keys: with R_t the product of all turns so far, Z_t = R_t^-1 S_t follows
  the rule without turns, for what is read and written turned back. Turns of a pair commute with each other and with a
  decay of the pair. A step that sees weights from before the token's turn (``together`` and ``step_first``) reads with
  the turn before. Turned value channels turn the values written and what is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from archspec import kernel_inputs
from archspec.blocks.rule import MemoryState, Quantities, initial_state
from archspec.rule import Rule

Run = Callable[[Rule, Quantities, MemoryState | None, str], tuple[Tensor, MemoryState]]
"""(rule, quantities, state, backend) to the reads [B, T, H, V] and the state after the stretch."""


def reading_before(
    rule: Rule, quantities: Quantities, state: MemoryState | None, backend: str, run: Run
) -> tuple[Tensor, MemoryState]:
    """Run a form whose queries read after their own tokens; with ``read: before``, for queries one token earlier."""
    if rule.read == "after":
        return run(rule, quantities, state, backend)
    query, dtype = quantities.query, quantities.state_dtype
    start = initial_state(rule, quantities) if state is None else state
    first = query[:, 0, :, None].to(dtype) @ start["dual.w"]  # [B, H, 1, V]
    following = torch.cat([query[:, 1:], torch.zeros_like(query[:, :1])], dim=1)
    read, after = run(rule, replace(quantities, query=following), state, backend)
    first = kernel_inputs.finished(rule, first.transpose(1, 2), quantities)
    return torch.cat([first, read[:, :-1]], dim=1), after


@dataclass(frozen=True)
class Turns:
    """What a complex decay does to a stretch of T tokens.

    Args:
        after: the sum of the angles so far, this token's included, on the pairs of a weight
            [B or 1, T, H, 1 or K/2, 1 or V/2].
        before: the same without this token's.
        log_decay: the log of the magnitude, on both channels of every pair, as the gate ``retention.gate`` is.
        received: b, the complex factor on what is written, or None where it is 1.
    """

    after: Tensor
    before: Tensor
    log_decay: Tensor
    received: Tensor | None

    @classmethod
    def of(cls, rule: Rule, quantities: Quantities) -> Turns:
        """Return the turns of a rule whose retention has them."""
        retention: Any = rule.retention
        gates = {
            path.removeprefix("retention."): gate.to(quantities.state_dtype)
            for path, gate in quantities.gates.items()
            if path.startswith("retention.")
        }
        log_decay, phase, received = retention.polar(gates)
        phase = phase.expand(-1, quantities.query.shape[1], -1, -1, -1)
        after = phase.cumsum(1)
        # Of a system that is integrated the magnitude is another than the gate's.
        given = getattr(retention, "discretization", "exact") != "bilinear"
        log_decay = quantities.gates["retention.gate"] if given else retention.laid_out(log_decay)
        return cls(after, after - phase, log_decay, received)

    def seen(self, rule: Rule) -> Tensor:
        """Return the turns of the weights that a token's step sees."""
        return self.after if rule.retention.order == "decay_first" else self.before

    def written(self, rule: Rule) -> Tensor:
        """Return the turns of the weights that a token's step is added to."""
        return self.before if rule.retention.order == "step_first" else self.after


def with_turned_keys(
    rule: Rule, quantities: Quantities, state: MemoryState | None, backend: str, run: Run
) -> tuple[Tensor, MemoryState]:
    """Run a form without turns on keys and queries that are turned back, for pairs of key channels."""
    turns, rows = Turns.of(rule, quantities), quantities.steps
    key, gates = quantities.key, {**quantities.gates, "retention.gate": turns.log_decay}
    step, writer = gates["update.step_size"], key
    # Strengths of key channels, and what pairs receive, belong to the key before it is turned.
    if step.shape[-2] > 1:
        writer = (key.to(step.dtype) * step.squeeze(-1)).to(key.dtype)
        gates["update.step_size"] = torch.ones_like(step[..., :1, :])
    if turns.received is not None:
        writer = _received(writer.to(turns.after.dtype), turns.received, rows).to(key.dtype)
    read_key = quantities.read_key
    if read_key is None and (writer is not key or rule.retention.order == "together"):
        read_key = key
    turned = replace(
        quantities,
        query=_turned(quantities.query, -turns.after, 1),
        key=_turned(writer, -turns.written(rule), rows),
        read_key=None if read_key is None else _turned(read_key, -turns.seen(rule), rows),
        gates=gates,
    )
    read, after = run(rule, turned, state, backend)
    return read, {name: _rotated(x, turns.after[:, -1, ..., :1], -2) for name, x in after.items()}


def with_turned_values(
    rule: Rule, quantities: Quantities, state: MemoryState | None, backend: str, run: Run
) -> tuple[Tensor, MemoryState]:
    """Run a form without turns on values that are turned back, for pairs of value channels; reads turn forth."""
    turns, rows = Turns.of(rule, quantities), quantities.steps
    gates = {**quantities.gates, "retention.gate": turns.log_decay}
    if "retention.gain" in gates:  # alike for both channels of a pair
        gain = gates["retention.gain"]
        gain = _by_row(gain, rows if gain.shape[1] > 1 else 1)
        for name in {"update.step_size", "update.write_size"} & gates.keys():
            gates[name] = gates[name] * gain
    angle = turns.written(rule)[..., 0, :]  # [B or 1, T, H, 1 or V/2]: turns do not vary over keys
    value = _rotated(quantities.value, -_by_row(angle, rows), -1)
    read, after = run(rule, replace(quantities, value=value, gates=gates), state, backend)
    ends = {name: _rotated(x, turns.after[:, -1, :, :1], -1) for name, x in after.items()}
    return _rotated(read, turns.after[..., 0, :], -1), ends


def _turned(x: Tensor, angle: Tensor, rows: int) -> Tensor:
    """Return keys [B, S T, H, K] turned by an angle [B or 1, T, H, 1 or K/2, ..], which does not vary over values."""
    return _rotated(x, _by_row(angle[..., 0], rows), -1)


def _received(x: Tensor, factor: Tensor, rows: int) -> Tensor:
    """Return keys [B, S T, H, K] whose pairs are multiplied by a complex factor [B or 1, T or 1, H, 1 or K/2, 1]."""
    factor = _by_row(factor.squeeze(-1), rows if factor.shape[1] > 1 else 1)
    real, imaginary = x.chunk(2, dim=-1)
    product = torch.complex(real.contiguous(), imaginary.contiguous()) * factor
    return torch.cat([product.real, product.imag], dim=-1)


def _by_row(x: Tensor, rows: int) -> Tensor:
    """Return what each of a token's rows has alike, [B or 1, S T, ..]."""
    return x if rows == 1 else x.repeat_interleave(rows, dim=1)


def _rotated(x: Tensor, angle: Tensor, axis: int) -> Tensor:
    """Return x with channel i and channel i + half of an axis, as a complex number, times e^(i angle)."""
    real, imaginary = x.to(angle.dtype).chunk(2, dim=axis)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=axis).to(x.dtype)
