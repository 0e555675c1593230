"""The families' fast forms as functions of a rule: they take and return what ``blocks.recurrence`` does.

Every form turns the rule's quantities into the plain tensors of a kernel and the kernel's state back into the
rule's, so that a sequence may change forms between two stretches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from archspec import kernel_inputs, matrices
from archspec.anchored import anchored
from archspec.averaging import average
from archspec.blocks.form import Form
from archspec.blocks.recurrence import recurrence
from archspec.blocks.rule import MemoryState, Quantities, gate_on_weight, initial_state
from archspec.elementwise import scan
from archspec.families import Per
from archspec.kernels.backend import resolve_backend
from archspec.kernels.maps import linear_maps
from archspec.kernels.online import OnlineState, online_memory
from archspec.kernels.pointwise import gated_map, gated_rms_norm, l2_norm, log_decay, short_convolution
from archspec.kernels.softmax import KvCache, softmax_attention, softmax_attention_step
from archspec.kernels.softmax.cache import AttentionInputs
from archspec.kernels.softmax.sparse import sparse_attention
from archspec.lowering import Decision
from archspec.rule import Rule
from archspec.sequential import sequential


class FusedPieces:
    """``kernels.pointwise`` and ``kernels.maps`` as blocks see them: for tensors on CUDA in bf16, fp16 or fp32."""

    def serves(self, x: Tensor) -> bool:
        """Whether the Triton kernels take tensors like x."""
        return x.numel() > 0 and resolve_backend("pieces", "auto", x) == "triton"

    def convolution(
        self, x: Tensor, weight: Tensor, offset: Tensor | None, activation: str, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return act(conv(x) + offset) and the tokens that the next stretch needs."""
        y, last = short_convolution(x, weight, offset, activation, state, output_final_state=True)
        return y, kernel_inputs.kept(last)

    def norm(
        self, x: Tensor, kind: str, weight: Tensor | None, gate: Tensor | None, activation: str, eps: float
    ) -> Tensor:
        """Return the norm of x over its last axis, gated where there is a gate."""
        return l2_norm(x, eps) if kind == "l2" else gated_rms_norm(x, gate, weight, activation, eps)

    def maps(self, x: Tensor, factors: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, ...]:
        """Return x W + b for every (W, b)."""
        return linear_maps(x, factors)

    def gated_map(self, gate: Tensor, up: Tensor, weight: Tensor, activation: str) -> Tensor:
        """Return (act(gate) up) W."""
        return gated_map(gate, up, weight, activation)

    def log_decay(self, z: Tensor, log_rate: Tensor) -> Tensor:
        """Return -exp(log_rate) softplus(z)."""
        return log_decay(z, log_rate)


def form_of(decision: Decision, backend: str = "auto") -> Form:
    """Return the function that runs a decision; ``backend`` goes to the kernel.

    It runs outside autocast, which would round states and what is added to them. Queries, keys and values come to it in
    one dtype, the narrowest of theirs: some features are wider than the projections that autocast or a model of 16 bits
    makes.
    """
    run = _FORMS[decision.family]

    def form(
        rule: Rule, quantities: Quantities, state: MemoryState | None = None, position: int = 0
    ) -> tuple[Tensor, MemoryState]:
        with kernel_inputs.as_given(quantities.query):
            return run(rule, kernel_inputs.in_one_dtype(quantities), state, position, backend)

    return form


def _recurrence(
    rule: Rule, quantities: Quantities, state: MemoryState | None, position: int, backend: str
) -> tuple[Tensor, MemoryState]:
    return recurrence(rule, quantities, state, position)


def _attention(
    rule: Rule, quantities: Quantities, state: MemoryState | None, position: int, backend: str
) -> tuple[Tensor, MemoryState]:
    """o_t = sum_j softmax_j(s q_t . k_j + G_t - G_j) v_j over the stored tokens."""
    if rule.memory.cache == "statistics":  # type: ignore[attr-defined]
        return average(rule, quantities, state, backend)
    temperature, window = rule.memory.temperature(rule.dims), rule.memory.window  # type: ignore[attr-defined]
    log_decay = kernel_inputs.decay(rule, quantities)
    cache = None
    if state is not None and state["keys"].shape[1]:
        cache = KvCache(state["keys"], state["values"], state.get("log_decay"))
    query, key, value = quantities.query, quantities.key, quantities.value
    memory: Any = rule.memory
    ridge = quantities.gates.get("update.fit.ridge")
    if memory.sparse or memory.top_k is not None or ridge is not None:
        gate = None if log_decay is None else log_decay.expand(*query.shape[:2], -1)
        inputs = AttentionInputs(query, key, value, gate)
        ridge = None if ridge is None else ridge.squeeze(-1).expand(*query.shape[:3], -1)
        chosen = {"top_k": memory.top_k, "ridge": ridge}
        read, kept = sparse_attention(
            inputs, temperature, window, memory.sinks, memory.stride, cache, position, **chosen
        )
    elif kernel_inputs.decodes(quantities):
        gate = log_decay if log_decay is None or log_decay.ndim == 1 else log_decay[:, 0]
        read, kept = softmax_attention_step(query[:, 0], key[:, 0], value[:, 0], cache, gate, temperature, window)
        read = read[:, None]
    else:
        read, found = softmax_attention(
            query, key, value, log_decay, temperature, window, cache, output_final_state=True, backend=backend
        )
        kept = kernel_inputs.kept(found)
    after = {"keys": kept.keys, "values": kept.values}
    if kept.log_decay is not None:
        after["log_decay"] = kept.log_decay.to(quantities.state_dtype)
    return read, after


def _online(
    rule: Rule, quantities: Quantities, state: MemoryState | None, position: int, backend: str
) -> tuple[Tensor, MemoryState]:
    """Gradients at the anchor, steps folded into the coefficient matrix c."""
    start = initial_state(rule, quantities) if state is None else state
    names = list(rule.memory.weights(rule.dims))
    momentum = rule.update.buffers == ("momentum",)
    anchor, decay = rule.update.anchor, rule.retention.decay_gate
    every = FREE_CHUNK if anchor is None else anchor.every
    parameters = {name: tensor.to(quantities.state_dtype) for name, tensor in quantities.parameters.items()}
    shares = None if anchor is None else anchor.shares(parameters)
    summed = "momentum" if momentum else "steps" if shares is not None else ""
    online_state = OnlineState(
        weights={name: start[f"dual.{name}"] for name in names},
        anchor={name: start[f"anchor.{name}" if anchor is not None else f"dual.{name}"] for name in names},
        momentum={name: start[f"{summed}.{name}"] for name in names} if summed else None,
        phase=position % every if anchor is not None else 0,
    )
    read, after = online_memory(
        quantities.query,
        quantities.key,
        rule.memory.target(quantities.value),
        online_state.weights,
        network=lambda linear, x: rule.memory.network(linear, x, parameters),
        error=lambda prediction, value, inputs: rule.bias.gradient(prediction, value, inputs),
        step_size=_on_weights(rule, quantities, "update.step_size", names),
        chunk_size=every,
        log_decay=None if decay is None else _on_weights(rule, quantities, "retention.gate", names),
        momentum=_on_weights(rule, quantities, "update.momentum", names) if momentum else None,
        read_key=quantities.read_key,
        error_inputs=_bias_inputs(quantities),
        order=rule.retention.order,
        reduce="sum" if anchor is None or anchor.reduce == "sum" else "mean",
        shares=shares,
        read=rule.read,
        state=online_state,
        output_final_state=True,
        backend=backend,
    )
    if after is None:
        raise AssertionError("a memory that was asked for its state returned none")
    kept = {f"dual.{name}": tensor for name, tensor in after.weights.items()}
    if anchor is not None:
        kept.update({f"anchor.{name}": tensor for name, tensor in after.anchor.items()})
    if after.momentum is not None:
        kept.update({f"{summed}.{name}": tensor for name, tensor in after.momentum.items()})
    return kernel_inputs.finished(rule, read, quantities), kept


FREE_CHUNK = 64  # any length is exact where gradients do not see the weights; one masked product of this size is cheap


def _on_weights(rule: Rule, quantities: Quantities, path: str, names: list[str]) -> Tensor | Mapping[str, Tensor]:
    """Return a gate as [B, T, H] for all weights, or laid on each weight's own axis."""
    gate = quantities.gates[path]
    shape = quantities.query.shape[:3]
    if gate.shape[-2:] == (1, 1):
        return gate[..., 0, 0].expand(shape)
    per: Per = "state" if min(gate.shape[-2:]) > 1 else "key" if gate.shape[-2] > 1 else "value"
    axes = {name: rule.memory.axis(name, per) for name in names}
    # Weights on the same axis share one tensor: its products are then computed once for all of them.
    laid = {axis: gate_on_weight(gate, axis) for axis in set(axes.values())}
    laid = {axis: tensor.expand(*shape, *tensor.shape[-2:]) for axis, tensor in laid.items()}
    return {name: laid[axis] for name, axis in axes.items()}


def _bias_inputs(quantities: Quantities) -> dict[str, Tensor]:
    """Return the bias's gates by field name, [B, T, H, 1 or V]."""
    shape = quantities.query.shape[:3]
    return {
        path.removeprefix("bias."): gate.squeeze(-2).expand(*shape, -1)
        for path, gate in quantities.gates.items()
        if path.startswith("bias.") and gate.shape[-2] == 1
    }


_FORMS = {
    "linear": matrices.linear,
    "solve": matrices.solve,
    "delta": matrices.delta,
    "momentum_delta": matrices.momentum_delta,
    "scan": scan,
    "anchored": anchored,
    "sequential": sequential,
    "softmax": _attention,
    "online": _online,
    "recurrence": _recurrence,
}
