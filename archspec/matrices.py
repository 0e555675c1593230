"""The forms of a matrix whose steps are linear in it: linear, delta, momentum_delta and solve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from archspec import kernel_inputs, layouts
from archspec.blocks.rule import MemoryState, Quantities, initial_state
from archspec.families import Gate
from archspec.kernels.delta import (
    column_delta_rule,
    delta_rule,
    delta_rule_step,
    joint_delta_rule,
    windowed_delta_rule,
)
from archspec.kernels.linear import linear_attention, linear_attention_step
from archspec.kernels.momentum_delta import MomentumDeltaState, momentum_delta_rule, momentum_delta_rule_step
from archspec.rule import Rule
from archspec.windows import window_rows, window_tokens

OF_COLUMNS = ("retention.gate", "update.step_size", "update.write_size")
"""Gates that make columns of a matrix rules of their own where they vary over value channels."""


def linear(
    rule: Rule, quantities: Quantities, state: MemoryState | None, position: int, backend: str
) -> tuple[Tensor, MemoryState]:
    """S_t = Diag(alpha) S_{t-1} + (w k) v^T: strengths are folded into the key, or into the value when per value."""
    start = initial_state(rule, quantities) if state is None else state
    key, value = quantities.key, rule.memory.target(quantities.value)
    log_decay = kernel_inputs.decay(rule, quantities)
    strength_gate = rule.update.step_size if rule.update.write_size is None else rule.update.write_size
    name = "step_size" if rule.update.write_size is None else "write_size"
    strength = quantities.gates[f"update.{name}"]
    if quantities.routed or not _is_one(strength_gate):
        if rule.granularity(strength_gate) == "value":
            value = value * strength.squeeze(-2).to(value.dtype)
        else:
            key = key * strength.squeeze(-1).to(key.dtype)
    query, steps = quantities.query, quantities.steps
    if rule.retention.order == "step_first" and log_decay is not None:
        fresh = log_decay.exp().to(key.dtype)
        if steps > 1 and fresh.ndim > 1:
            fresh = fresh.repeat_interleave(steps, dim=1)
        key = key * (fresh if log_decay.ndim == 4 else fresh[..., None])
    scale = kernel_inputs.kernel_scale(rule, quantities, backend)
    if steps > 1:
        # Every row of a token has the decay after it in its key already: its state decays on the first.
        query, log_decay = _spread(query, log_decay, steps, "decay_first")
    if kernel_inputs.decodes(quantities) and steps == 1:
        read, dual = linear_attention_step(
            quantities.query,
            key,
            value,
            start["dual.w"],
            log_decay,
            scale=scale or 1.0,
            inplace=quantities.inplace and state is not None,
            backend=backend,
        )
    else:
        read, final = linear_attention(
            query,
            key,
            value,
            log_decay,
            scale=scale or 1.0,
            initial_state=kernel_inputs.given(rule, quantities, state, start),
            output_final_state=True,
            backend=backend,
        )
        read, dual = read[:, steps - 1 :: steps], kernel_inputs.kept(final)
    return read if scale else kernel_inputs.finished(rule, read, quantities), {"dual.w": dual}


def delta(
    rule: Rule, quantities: Quantities, state: MemoryState | None, position: int, backend: str
) -> tuple[Tensor, MemoryState]:
    """S_t = A S_{t-1} - b e (p^T S) + w k v^T, with the rule's order of decay and step; A may turn pairs."""
    quantities = replace(quantities, gates={**quantities.gates, "update.step_size": _step_size(rule, quantities)})
    return layouts.reading_before(rule, quantities, state, backend, _turned_delta)


def _turned_delta(
    rule: Rule, quantities: Quantities, state: MemoryState | None, backend: str
) -> tuple[Tensor, MemoryState]:
    if not rule.retention.turns:
        return _delta(rule, quantities, state, backend)
    of_keys = getattr(rule.retention, "pairs", "key") == "key"
    turned = layouts.with_turned_keys if of_keys else layouts.with_turned_values
    return turned(rule, quantities, state, backend, _delta)


def _delta(rule: Rule, quantities: Quantities, state: MemoryState | None, backend: str) -> tuple[Tensor, MemoryState]:
    start = initial_state(rule, quantities) if state is None else state
    if rule.bias.window is not None:
        return _windowed_delta(rule, quantities, start, backend)
    if any(gate.shape[-1] > 1 for path, gate in quantities.gates.items() if path in OF_COLUMNS):
        return _column_delta(rule, quantities, start, backend)
    key = quantities.key
    beta = kernel_inputs.strength(quantities.gates["update.step_size"], key)
    write = quantities.gates.get("update.write_size")
    options: dict[str, Any] = {
        "write_beta": None if write is None else kernel_inputs.strength(write, key),
        "read_key": quantities.read_key,
        "erase_key": quantities.read_key if rule.bias.erase_key == "read_key" else None,
    }
    log_decay = kernel_inputs.decay(rule, quantities)
    query = quantities.query
    if quantities.steps > 1:
        query, log_decay = _spread(query, log_decay, quantities.steps, rule.retention.order)
    scale = kernel_inputs.kernel_scale(rule, quantities, backend)
    if kernel_inputs.decodes(quantities) and (quantities.steps == 1 or query.is_cuda):
        if log_decay is not None and log_decay.ndim == 1:
            log_decay = log_decay.expand(*key.shape[:2], -1)
        read, dual = delta_rule_step(
            query,
            key,
            quantities.value,
            beta,
            start["dual.w"],
            log_decay,
            scale=scale or 1.0,
            order=rule.retention.order,
            inplace=quantities.inplace and state is not None,
            backend=backend,
            **options,
        )
    else:
        read, final = delta_rule(
            query,
            key,
            quantities.value,
            beta,
            log_decay,
            scale=scale or 1.0,
            initial_state=kernel_inputs.given(rule, quantities, state, start),
            output_final_state=True,
            backend=backend,
            order=rule.retention.order,
            **options,
        )
        dual = kernel_inputs.kept(final)
    read = read[:, quantities.steps - 1 :: quantities.steps]
    return read if scale else kernel_inputs.finished(rule, read, quantities), {"dual.w": dual}


def _column_delta(rule: Rule, quantities: Quantities, start: MemoryState, backend: str) -> tuple[Tensor, MemoryState]:
    """The delta rule with gates of value channels: every column of the matrix decays and steps by itself."""
    query, steps, rows = quantities.query, quantities.steps, quantities.key.shape[:2]
    gates = {path: quantities.gates[path].squeeze(-2) for path in OF_COLUMNS if path in quantities.gates}
    decay, write = gates.get("retention.gate"), gates.get("update.write_size")  # [.., H, 1 or V]
    decay = None if decay is None else decay.expand(*query.shape[:2], -1, -1)
    if steps > 1:
        query, decay = _spread(query, decay, steps, rule.retention.order)
    read, final = column_delta_rule(
        query,
        quantities.key,
        quantities.value,
        gates["update.step_size"].expand(*rows, -1, -1),
        decay,
        scale=1.0,
        initial_state=start["dual.w"],
        output_final_state=True,
        backend=backend,
        write_beta=None if write is None else write.expand(*rows, -1, -1),
        read_key=quantities.read_key,
        order=rule.retention.order,
    )
    read = kernel_inputs.finished(rule, read[:, steps - 1 :: steps], quantities)
    return read, {"dual.w": kernel_inputs.kept(final)}


def _windowed_delta(rule: Rule, quantities: Quantities, start: MemoryState, backend: str) -> tuple[Tensor, MemoryState]:
    """S_t = A S - eta sum over a token's window of w_i k_i (p_i^T S - v_i)^T: its rows take one step together."""
    dtype, shape = quantities.state_dtype, quantities.query.shape[:2]
    step, decay = quantities.gates["update.step_size"].to(dtype)[..., 0], kernel_inputs.decay(rule, quantities)
    options: dict[str, Any] = {
        "scale": 1.0,
        "initial_state": start["dual.w"],
        "output_final_state": True,
        "backend": backend,
        "order": rule.retention.order,
    }
    if step.shape[-1] == 1 and (decay is None or decay.ndim < 4):
        seen, after = window_tokens(rule, quantities, start)
        read, final = windowed_delta_rule(
            quantities.query.to(dtype),
            seen["key"],
            seen["value"],
            _row_weights(seen).squeeze(-1),
            step[..., 0].expand(*shape, -1),
            None if decay is None else decay.expand(*shape, -1),
            read_key=seen.get("read_key"),
            **options,
        )
    else:  # strengths and decays of key channels tell the keys of a window apart
        rows, after = window_rows(rule, quantities, start)
        laid = {name: x.movedim(0, 1) for name, x in rows.items()}  # [B, T, H, R, d]
        beta = step[..., None, :] * _row_weights(laid)
        beta = beta.squeeze(-1) if beta.shape[-1] == 1 else beta
        read, final = joint_delta_rule(
            quantities.query.to(dtype),
            laid["key"],
            laid["value"],
            beta,
            decay,
            read_key=laid.get("read_key"),
            **options,
        )
    return kernel_inputs.finished(rule, read, quantities), {"dual.w": kernel_inputs.kept(final), **after}


def _row_weights(rows: Mapping[str, Tensor]) -> Tensor:
    """Return what the errors of a window weigh [.., 1]: its own gate, and the loss's where it has one."""
    weights = rows["bias.window.weights"]
    return weights * rows["bias.weights"] if "bias.weights" in rows else weights


def momentum_delta(
    rule: Rule, quantities: Quantities, state: MemoryState | None, position: int, backend: str
) -> tuple[Tensor, MemoryState]:
    """P_t = mu P_{t-1} - b e (p^T S*) + w k v^T and S_t = a S_{t-1} + P_t, with the rule's order of decay and step."""
    quantities = replace(quantities, gates={**quantities.gates, "update.step_size": _step_size(rule, quantities)})
    return layouts.reading_before(rule, quantities, state, backend, _momentum_delta)


def _momentum_delta(
    rule: Rule, quantities: Quantities, state: MemoryState | None, backend: str
) -> tuple[Tensor, MemoryState]:
    start = initial_state(rule, quantities) if state is None else state
    key, write = quantities.key, quantities.gates.get("update.write_size")
    before = MomentumDeltaState(start["dual.w"], start["momentum.w"])
    log_decay = kernel_inputs.decay(rule, quantities)
    tokens: dict[str, Tensor | None] = {
        "q": quantities.query,
        "k": key,
        "v": quantities.value,
        "step": kernel_inputs.strength(quantities.gates["update.step_size"], key),
        "momentum": kernel_inputs.strength(quantities.gates["update.momentum"], key),
        "g": None if log_decay is None else log_decay.expand(*key.shape[:2], -1),
        "write_step": None if write is None else kernel_inputs.strength(write, key),
        "read_key": quantities.read_key,
        "erase_key": quantities.read_key if rule.bias.erase_key == "read_key" else None,
    }
    if kernel_inputs.decodes(quantities):
        one: dict[str, Any] = {name: None if x is None else x[:, 0] for name, x in tokens.items()}
        read, after = momentum_delta_rule_step(**one, state=before, scale=1.0, order=rule.retention.order)
        read = read[:, None]
    else:
        whole: dict[str, Any] = {**tokens, "initial_state": before, "output_final_state": True, "backend": backend}
        read, final = momentum_delta_rule(**whole, scale=1.0, order=rule.retention.order)
        after = kernel_inputs.kept(final)
    return kernel_inputs.finished(rule, read, quantities), {"dual.w": after.weights, "momentum.w": after.momentum}


def _step_size(rule: Rule, quantities: Quantities) -> Tensor:
    """Return the step size on the axes of a matrix, times what weighs the error without a window.

    The implicit rule's is eta / (1 + eta k . k).
    """
    step = quantities.gates["update.step_size"]
    if rule.bias.error == "weighted" and rule.bias.window is None:
        weights, steps = quantities.gates["bias.weights"], quantities.steps
        step = step * (weights.repeat_interleave(steps, dim=1) if steps > 1 and weights.shape[1] > 1 else weights)
    if rule.update.kind != "implicit":
        return step
    square = quantities.key.to(step.dtype).square().sum(-1)[..., None, None]
    return step / (1 + step * square)


def _spread(query: Tensor, log_decay: Tensor | None, steps: int, order: str) -> tuple[Tensor, Tensor | None]:
    """Lay queries and decays on the rows of several steps a token: decay on its first, read on its last.

    Decaying after the steps (``step_first``) puts the decay on the last one.
    """
    batch, length = query.shape[:2]
    wide = query.new_zeros(batch, length, steps, *query.shape[2:])
    wide[:, :, -1] = query
    if log_decay is not None:
        if log_decay.ndim == 1:
            log_decay = log_decay.expand(batch, length, -1)
        row = 0 if order == "decay_first" else steps - 1
        decays = log_decay.new_zeros(batch, length, steps, *log_decay.shape[2:])
        decays[:, :, row] = log_decay
        log_decay = decays.flatten(1, 2)
    return wide.flatten(1, 2), log_decay


def solve(
    rule: Rule, quantities: Quantities, state: MemoryState | None, position: int, backend: str
) -> tuple[Tensor, MemoryState]:
    """(H_t + ridge)^-1 q_t for all t at once: H_t x_t is linear attention of x with values b k; then read S_t."""
    start = initial_state(rule, quantities) if state is None else state
    dtype = quantities.state_dtype
    query, key, value = (x.to(dtype) for x in (quantities.query, quantities.key, quantities.value))
    strength = quantities.gates["update.step_size"].squeeze(-1)  # [B, T, H, 1]
    ridge = quantities.gates["update.ridge"].squeeze(-1).expand(query.shape)
    log_decay = kernel_inputs.decay(rule, quantities)

    def attend(x: Tensor, written: Tensor, name: str) -> tuple[Tensor, Tensor]:
        read, final = linear_attention(x, key, strength * written, log_decay, 1.0, start[name], True, None, backend)
        return read, kernel_inputs.kept(final)

    def times_covariance(x: Tensor) -> Tensor:
        return attend(x, key, "covariance.w")[0] + ridge * x

    solution = rule.update.solve(times_covariance, query, ridge)  # type: ignore[attr-defined]
    _, covariance = attend(query, key, "covariance.w")
    read, dual = attend(solution, value, "dual.w")
    return kernel_inputs.finished(rule, read, quantities), {"dual.w": dual, "covariance.w": covariance}


def _is_one(gate: Gate) -> bool:
    return gate.kind == "constant" and getattr(gate, "value_", None) == 1 and gate.scale == 1
