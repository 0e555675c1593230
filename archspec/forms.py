"""The families' fast forms as functions of a rule: they take and return what ``blocks.recurrence`` does.

Every form turns the rule's quantities into the plain tensors of a kernel and the kernel's state back into the
rule's, so that a sequence may change forms between two stretches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from archspec.anchored import anchored
from archspec.averaging import average
from archspec.blocks.mixer import Form
from archspec.blocks.recurrence import recurrence
from archspec.blocks.rule import MemoryState, Quantities, gate_on_weight, initial_state
from archspec.elementwise import scan
from archspec.families import Gate, Per
from archspec.kernels.backend import resolve_backend
from archspec.kernels.delta import delta_rule, delta_rule_step
from archspec.kernels.linear import linear_attention, linear_attention_step
from archspec.kernels.momentum_delta import MomentumDeltaState, momentum_delta_rule, momentum_delta_rule_step
from archspec.kernels.online import OnlineState, online_memory
from archspec.kernels.pointwise import gated_product, gated_rms_norm, l2_norm, log_decay, short_convolution
from archspec.kernels.softmax import KvCache, softmax_attention, softmax_attention_step
from archspec.kernels.softmax.cache import AttentionInputs
from archspec.kernels.softmax.sparse import sparse_attention
from archspec.lowering import Decision, gradient_is_fixed
from archspec.rule import Rule

Final = TypeVar("Final", Tensor, KvCache, MomentumDeltaState)


class FusedPieces:
    """``kernels.pointwise`` as blocks see it: for tensors on CUDA in bf16, fp16 or fp32."""

    def serves(self, x: Tensor) -> bool:
        """Whether the Triton kernels take tensors like x."""
        return x.numel() > 0 and resolve_backend("pieces", "auto", x) == "triton"

    def convolution(
        self, x: Tensor, weight: Tensor, offset: Tensor | None, activation: str, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return act(conv(x) + offset) and the tokens that the next stretch needs."""
        y, last = short_convolution(x, weight, offset, activation, state, output_final_state=True)
        return y, _kept(last)

    def norm(
        self, x: Tensor, kind: str, weight: Tensor | None, gate: Tensor | None, activation: str, eps: float
    ) -> Tensor:
        """Return the norm of x over its last axis, gated where there is a gate."""
        return l2_norm(x, eps) if kind == "l2" else gated_rms_norm(x, gate, weight, activation, eps)

    def gated_product(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """Return act(gate) up."""
        return gated_product(gate, up, activation)

    def log_decay(self, z: Tensor, log_rate: Tensor) -> Tensor:
        """Return -exp(log_rate) softplus(z)."""
        return log_decay(z, log_rate)


def form_of(decision: Decision, backend: str = "auto") -> Form:
    """Return the function that runs a decision; ``backend`` goes to the kernel."""
    if decision.family == "recurrence":
        return recurrence
    run = _FORMS[decision.family]

    def form(
        rule: Rule, quantities: Quantities, state: MemoryState | None = None, position: int = 0
    ) -> tuple[Tensor, MemoryState]:
        return run(rule, quantities, state, position, backend)

    return form


def _linear(
    rule: Rule, quantities: Quantities, state: MemoryState | None, position: int, backend: str
) -> tuple[Tensor, MemoryState]:
    """S_t = Diag(alpha) S_{t-1} + (w k) v^T: strengths are folded into the key, or into the value when per value."""
    start = initial_state(rule, quantities) if state is None else state
    key, value = quantities.key, rule.memory.target(quantities.value)
    log_decay = _decay(rule, quantities)
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
    scale = _kernel_scale(rule, quantities, backend)
    if steps > 1:
        # Every row of a token has the decay after it in its key already: its state decays on the first.
        query, log_decay = _spread(query, log_decay, steps, "decay_first")
    if _decodes(quantities) and steps == 1:
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
            initial_state=_given(rule, quantities, state, start),
            output_final_state=True,
            backend=backend,
        )
        read, dual = read[:, steps - 1 :: steps], _kept(final)
    return read if scale else _finished(rule, read, quantities), {"dual.w": dual}


def _delta(
    rule: Rule, quantities: Quantities, state: MemoryState | None, position: int, backend: str
) -> tuple[Tensor, MemoryState]:
    """S_t = A S_{t-1} - b e (p^T S) + w k v^T, with the rule's order of decay and step."""
    start = initial_state(rule, quantities) if state is None else state
    key = quantities.key
    beta = _strength(_delta_step(rule, quantities), key)
    write = quantities.gates.get("update.write_size")
    options: dict[str, Any] = {
        "write_beta": None if write is None else _strength(write, key),
        "read_key": quantities.read_key,
        "erase_key": quantities.read_key if rule.bias.erase_key == "read_key" else None,
    }
    log_decay = _decay(rule, quantities)
    query = quantities.query
    if quantities.steps > 1:
        query, log_decay = _spread(query, log_decay, quantities.steps, rule.retention.order)
    scale = _kernel_scale(rule, quantities, backend)
    if _decodes(quantities) and (quantities.steps == 1 or query.is_cuda):
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
            initial_state=_given(rule, quantities, state, start),
            output_final_state=True,
            backend=backend,
            order=rule.retention.order,
            **options,
        )
        dual = _kept(final)
    read = read[:, quantities.steps - 1 :: quantities.steps]
    return read if scale else _finished(rule, read, quantities), {"dual.w": dual}


def _momentum_delta(
    rule: Rule, quantities: Quantities, state: MemoryState | None, position: int, backend: str
) -> tuple[Tensor, MemoryState]:
    """P_t = mu P_{t-1} - b e (p^T S*) + w k v^T and S_t = a S_{t-1} + P_t, with the rule's order of decay and step."""
    start = initial_state(rule, quantities) if state is None else state
    key, write = quantities.key, quantities.gates.get("update.write_size")
    before = MomentumDeltaState(start["dual.w"], start["momentum.w"])
    log_decay = _decay(rule, quantities)
    tokens: dict[str, Tensor | None] = {
        "q": quantities.query,
        "k": key,
        "v": quantities.value,
        "step": _strength(quantities.gates["update.step_size"], key),
        "momentum": _strength(quantities.gates["update.momentum"], key),
        "g": None if log_decay is None else log_decay.expand(*key.shape[:2], -1),
        "write_step": None if write is None else _strength(write, key),
        "read_key": quantities.read_key,
        "erase_key": quantities.read_key if rule.bias.erase_key == "read_key" else None,
    }
    if _decodes(quantities):
        one: dict[str, Any] = {name: None if x is None else x[:, 0] for name, x in tokens.items()}
        read, after = momentum_delta_rule_step(**one, state=before, scale=1.0, order=rule.retention.order)
        read = read[:, None]
    else:
        whole: dict[str, Any] = {**tokens, "initial_state": before, "output_final_state": True, "backend": backend}
        read, final = momentum_delta_rule(**whole, scale=1.0, order=rule.retention.order)
        after = _kept(final)
    return _finished(rule, read, quantities), {"dual.w": after.weights, "momentum.w": after.momentum}


def _delta_step(rule: Rule, quantities: Quantities) -> Tensor:
    """Return the step size; the implicit rule's is eta / (1 + eta k . k)."""
    step = quantities.gates["update.step_size"]
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


def _solve(
    rule: Rule, quantities: Quantities, state: MemoryState | None, position: int, backend: str
) -> tuple[Tensor, MemoryState]:
    """(H_t + ridge)^-1 q_t for all t at once: H_t x_t is linear attention of x with values b k; then read S_t."""
    start = initial_state(rule, quantities) if state is None else state
    dtype = quantities.state_dtype
    query, key, value = (x.to(dtype) for x in (quantities.query, quantities.key, quantities.value))
    strength = quantities.gates["update.step_size"].squeeze(-1)  # [B, T, H, 1]
    ridge = quantities.gates["update.ridge"].squeeze(-1).expand(query.shape)
    log_decay = _decay(rule, quantities)

    def attend(x: Tensor, written: Tensor, name: str) -> tuple[Tensor, Tensor]:
        read, final = linear_attention(x, key, strength * written, log_decay, 1.0, start[name], True, None, backend)
        return read, _kept(final)

    def times_covariance(x: Tensor) -> Tensor:
        return attend(x, key, "covariance.w")[0] + ridge * x

    solution = rule.update.solve(times_covariance, query, ridge)  # type: ignore[attr-defined]
    _, covariance = attend(query, key, "covariance.w")
    read, dual = attend(solution, value, "dual.w")
    return _finished(rule, read, quantities), {"dual.w": dual, "covariance.w": covariance}


def _given(rule: Rule, quantities: Quantities, state: MemoryState | None, start: MemoryState) -> Tensor | None:
    """Return the start state, or None when it is the zero that kernels assume."""
    return start["dual.w"] if state is not None or quantities.start else None


def _decodes(quantities: Quantities) -> bool:
    return quantities.query.shape[1] == 1


def _is_one(gate: Gate) -> bool:
    return gate.kind == "constant" and getattr(gate, "value_", None) == 1 and gate.scale == 1


def _decay(rule: Rule, quantities: Quantities) -> Tensor | None:
    """Return log(alpha) as kernels take it: [H] constant, [B, T, H] per head, [B, T, H, K] per key channel."""
    gate = rule.retention.decay_gate
    if gate is None:
        return None
    log_alpha = quantities.gates["retention.gate"]
    batch, length = quantities.query.shape[:2]
    if rule.granularity(gate) == "head":
        narrow = log_alpha[..., 0, 0]
        return narrow[0, 0] if narrow.shape[:2] == (1, 1) else narrow.expand(batch, length, -1)
    return log_alpha[..., 0].expand(batch, length, -1, -1)


def _strength(gate: Tensor, key: Tensor) -> Tensor:
    """Return a strength [B, T, H] or, when it varies per key channel, [B, T, H, K]."""
    batch, length = key.shape[:2]
    narrow = gate[..., 0]
    if narrow.shape[-1] == 1:
        return narrow[..., 0].expand(batch, length, -1)
    return narrow.expand(batch, length, -1, -1)


def _kernel_scale(rule: Rule, quantities: Quantities, backend: str) -> float | None:
    """Return the read-out's factor where the kernel applies it and nothing else remains to be done to the read-out.

    On the CPU and in fp64 ``_finished`` applies it, as the recurrence does.
    """
    memory = rule.memory
    if memory.kind != "matrix" or getattr(memory, "normalizer", None) is not None or backend not in ("auto", "triton"):
        return None
    if resolve_backend("pieces", "auto", quantities.query) != "triton":
        return None
    scale = getattr(memory, "scale", None)
    return float(rule.dims.key_dim**-0.5 if scale is None else scale) or None


def _finished(rule: Rule, read: Tensor, quantities: Quantities) -> Tensor:
    """Scale and normalise in the state's precision, return the queries' dtype."""
    return rule.memory.finish(read.to(quantities.state_dtype), rule.dims).to(quantities.query.dtype)


def _kept(final: Final | None) -> Final:
    if final is None:
        raise AssertionError("a kernel that was asked for its final state returned none")
    return final


def _attention(
    rule: Rule, quantities: Quantities, state: MemoryState | None, position: int, backend: str
) -> tuple[Tensor, MemoryState]:
    """o_t = sum_j softmax_j(s q_t . k_j + G_t - G_j) v_j over the stored tokens."""
    if rule.memory.cache == "statistics":  # type: ignore[attr-defined]
        return average(rule, quantities, state, backend)
    temperature, window = rule.memory.temperature(rule.dims), rule.memory.window  # type: ignore[attr-defined]
    log_decay = _decay(rule, quantities)
    cache = None
    if state is not None and state["keys"].shape[1]:
        cache = KvCache(state["keys"], state["values"], state.get("log_decay"))
    query, key, value = quantities.query, quantities.key, quantities.value
    memory: Any = rule.memory
    if memory.sparse:
        gate = None if log_decay is None else log_decay.expand(*query.shape[:2], -1)
        inputs = AttentionInputs(query, key, value, gate)
        read, kept = sparse_attention(inputs, temperature, window, memory.sinks, memory.stride, cache, position)
    elif _decodes(quantities):
        gate = log_decay if log_decay is None or log_decay.ndim == 1 else log_decay[:, 0]
        read, kept = softmax_attention_step(query[:, 0], key[:, 0], value[:, 0], cache, gate, temperature, window)
        read = read[:, None]
    else:
        read, found = softmax_attention(
            query, key, value, log_decay, temperature, window, cache, output_final_state=True, backend=backend
        )
        kept = _kept(found)
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
    # Without an anchor the gradient is the token's own, unless it does not see the weights at all.
    every = anchor.every if anchor is not None else FREE_CHUNK if gradient_is_fixed(rule) else 1
    parameters = {name: tensor.to(quantities.state_dtype) for name, tensor in quantities.parameters.items()}
    online_state = OnlineState(
        weights={name: start[f"dual.{name}"] for name in names},
        anchor={name: start[f"anchor.{name}" if anchor is not None else f"dual.{name}"] for name in names},
        momentum={name: start[f"momentum.{name}"] for name in names} if momentum else None,
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
        reduce="sum" if anchor is None else anchor.reduce,
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
        kept.update({f"momentum.{name}": tensor for name, tensor in after.momentum.items()})
    return _finished(rule, read, quantities), kept


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
    "linear": _linear,
    "solve": _solve,
    "delta": _delta,
    "momentum_delta": _momentum_delta,
    "scan": scan,
    "anchored": anchored,
    "softmax": _attention,
    "online": _online,
}
