"""From a spec to a plan: for each mixer the rule family, the form and the kernel that run it, with the reasons.

The families are tried in the order of ``FAMILIES``; each says why it cannot take a rule, or takes it. No legal rule
is without a way to run: the last family is the token-by-token recurrence itself.

| family | state update | form |
|---|---|---|
| softmax | the tokens themselves | tiled attention |
| linear | S = Diag(a) S + k v^T | chunkwise, one masked product a chunk |
| delta | S = (I - b k k^T) Diag(a) S + b k v^T | chunkwise, one triangular solve a chunk (WY) |
| momentum_delta | the same under momentum, S_t = a S_{t-1} + P_t | chunkwise, one triangular solve a chunk |
| scan | S = a o S + x, entry by entry | associative scan |
| solve | H and S as linear attention, o = S^T H^-1 q | conjugate gradients over chunks |
| online | gradients at the anchor of each chunk | chunkwise, by the coefficient matrix c |
| anchored | the same, whatever makes the weights of their steps | chunkwise, the weights of a chunk side by side |
| sequential | gradients at weights that the token before has moved | one recorded step a token |
| recurrence | anything | token by token |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from archspec.composition import inside
from archspec.loading import dotted
from archspec.rule import Rule
from archspec.schema import MemoryMixer, Spec

MAX_TRITON_DIM = 256


@dataclass(frozen=True)
class Rejection:
    """A family that cannot run a rule, and why."""

    family: str
    reason: str


@dataclass(frozen=True)
class Decision:
    """How one mixer runs.

    Args:
        family: the rule family.
        form: how a stretch of tokens is computed (``chunkwise``, ``attention``, ``recurrence``).
        kernel: what computes it on the device asked about (``triton``, ``torch``).
        reason: why this family.
        rejected: the families tried before it.
    """

    family: str
    form: str
    kernel: str
    reason: str
    rejected: tuple[Rejection, ...]

    @property
    def name(self) -> str:
        """``family/form/kernel``."""
        return f"{self.family}/{self.form}/{self.kernel}"


@dataclass(frozen=True)
class Family:
    """One lowering family: when it refuses, why it is chosen, and which kernel serves it.

    Args:
        refuse: the reason why a rule is not of this family, or None when it is.
        reason: why a rule of this family runs this way.
        kernel: the kernel for a rule on a device type.
    """

    name: str
    form: str
    refuse: Callable[[Rule], str | None]
    reason: Callable[[Rule], str]
    kernel: Callable[[Rule, str], str]


def decide(rule: Rule, device: str = "cpu", backend: str = "auto") -> Decision:
    """Return how a rule runs on a type of device (``cpu``, ``cuda``).

    Args:
        backend: ``auto``; ``chunked`` for torch forms everywhere; ``reference`` for the recurrence.
    """
    rejected: list[Rejection] = []
    for family in FAMILIES:
        refusal = family.refuse(rule)
        if refusal is None and backend == "reference" and family.name != "recurrence":
            refusal = "backend 'reference' asks for the token-by-token recurrence"
        if refusal is None:
            kernel = "torch" if backend == "chunked" else family.kernel(rule, device)
            return Decision(family.name, family.form, kernel, family.reason(rule), tuple(rejected))
        rejected.append(Rejection(family.name, refusal))
    raise AssertionError("the recurrence takes every rule")


@dataclass(frozen=True)
class Plan:
    """The decisions for every mixer of a spec that has a recurrence, in the order of its blocks.

    Args:
        decisions: (path of the mixer in the document, decision).
        layers: for each layer in order of application, the paths of its mixers.
    """

    decisions: dict[str, Decision]
    layers: tuple[tuple[str, ...], ...]

    def summary(self) -> str:
        """Return a line such as ``3x delta/chunkwise/torch, 1x softmax/attention/torch``."""
        counts = Counter(self.decisions[path].name for layer in self.layers for path in layer)
        return ", ".join(f"{count}x {name}" for name, count in counts.items())

    def kernels(self) -> list[str]:
        """Return the distinct ``family/form/kernel`` names, sorted."""
        return sorted({decision.name for decision in self.decisions.values()})

    def families(self) -> list[str]:
        """Return the distinct families, sorted."""
        return sorted({decision.family for decision in self.decisions.values()})


def plan(spec: Spec, device: str = "cpu", backend: str = "auto") -> Plan:
    """Return how every mixer of a spec runs on a type of device."""
    decisions: dict[str, Decision] = {}
    by_block: dict[str, tuple[str, ...]] = {}
    for name, block in spec.blocks.items():
        found: dict[str, Decision] = {}
        for steps, mixer in inside(block.mixer, ("blocks", name, "mixer")):
            own = mixer.lowered()
            if isinstance(mixer, MemoryMixer):
                found[dotted(steps)] = decide(Rule.of(mixer, spec.model_dim), device, backend)
            elif own is not None:
                found[dotted(steps)] = Decision(own.family, own.form, "torch", own.reason, ())
        decisions.update(found)
        by_block[name] = tuple(found)
    used = tuple(by_block[name] for name in spec.layout.names())
    alive = {path for layer in used for path in layer}
    return Plan({path: decision for path, decision in decisions.items() if path in alive}, used)


def _first(*refusals: str | None) -> str | None:
    return next((refusal for refusal in refusals if refusal is not None), None)


def _not_softmax(rule: Rule) -> str | None:
    if not rule.memory.grows:
        return f"memory {rule.memory.kind} stores weights, not tokens"
    return _reads_after(rule)


def _reads_after(rule: Rule) -> str | None:
    return None if rule.read == "after" else "the query reads before its own token is written"


def _is_matrix(rule: Rule) -> str | None:
    return None if rule.memory.kind == "matrix" else f"memory {rule.memory.kind} is not a matrix"


def _plain_descent(rule: Rule) -> str | None:
    if rule.update.kind != "gradient_descent":
        return f"update {rule.update.kind} is not one plain gradient step a token"
    if rule.update.anchor is not None:
        return f"gradients are taken every {rule.update.anchor.every} tokens"
    return None


def _no_link(rule: Rule) -> str | None:
    if rule.retention.turns:
        return f"retention {rule.retention.kind} turns pairs of states"
    return f"retention {rule.retention.kind} has a nonlinear link" if rule.retention.has_link else None


def _no_window(rule: Rule) -> str | None:
    return "the loss sums over a window of tokens" if rule.bias.window is not None else None


def _axes(rule: Rule, *, decays: tuple[str, ...], steps: tuple[str, ...]) -> str | None:
    gate = rule.retention.decay_gate
    if gate is not None and rule.granularity(gate) not in decays:
        return f"the decay varies per {rule.granularity(gate)}, not per {' or '.join(decays)}"
    for name in ("step_size", "write_size"):
        size = getattr(rule.update, name)
        if size is not None and rule.granularity(size) not in steps:
            return f"{name} varies per {rule.granularity(size)}, not per {' or '.join(steps)}"
    return None


def _not_linear(rule: Rule) -> str | None:
    error = rule.bias.error
    return _first(
        _is_matrix(rule),
        None if error == "value" else f"bias {rule.bias.kind} has an error that depends on the prediction",
        None if rule.update.kind == "multi_step" else _plain_descent(rule),
        _no_link(rule),
        _no_window(rule),
        _axes(rule, decays=("head", "key"), steps=("head", "key", "value")),
        _reads_after(rule),
    )


def _residual(rule: Rule) -> str | None:
    return None if rule.bias.error == "residual" else f"bias {rule.bias.kind} has an error that is not M(k) - v"


def _not_delta(rule: Rule) -> str | None:
    return _first(
        _is_matrix(rule),
        _residual(rule),
        _delta_steps(rule),
        _no_link(rule),
        _no_window(rule),
        _axes(rule, decays=("head", "key"), steps=("head", "key")),
        _reads_after(rule),
    )


def _delta_steps(rule: Rule) -> str | None:
    """Several steps are more tokens of the same rule, and an implicit step is an explicit one of another size."""
    update = rule.update
    if update.kind == "multi_step":
        return None
    if update.kind == "implicit":
        if getattr(update, "diagonal", False):
            return "the diagonal implicit step decays every state by itself"
        return None
    return _plain_descent(rule)


def _not_momentum_delta(rule: Rule) -> str | None:
    update = rule.update
    momentum = getattr(update, "momentum", None)
    if update.kind != "momentum" or momentum is None:
        return f"update {update.kind} has no momentum"
    if rule.granularity(momentum) != "head":
        return f"momentum varies per {rule.granularity(momentum)}, not per head"
    return _first(
        _is_matrix(rule),
        _residual(rule),
        f"gradients are taken every {update.anchor.every} tokens" if update.anchor is not None else None,
        _no_link(rule),
        _no_window(rule),
        _axes(rule, decays=("head",), steps=("head", "key")),
        _reads_after(rule),
    )


def _not_scan(rule: Rule) -> str | None:
    return _first(
        _is_matrix(rule),
        _mixing_step(rule),
        None if rule.retention.turns else _no_link(rule),
        _no_window(rule),
        _reads_after(rule),
    )


def _mixing_step(rule: Rule) -> str | None:
    """Whether a step mixes the entries of the weights: one on a given direction, or a diagonal one, does not."""
    update, decays = rule.update, rule.retention.decay_gate is not None
    if update.kind == "implicit" and getattr(update, "diagonal", False):
        if rule.retention.turns:
            return _no_link(rule)
        if decays and rule.retention.order == "together":
            return "the step is taken from undecayed weights, so that a state's factor may change sign"
        return None
    if rule.bias.error != "value":
        return f"bias {rule.bias.kind} has an error that mixes the states"
    return _plain_descent(rule)


def _not_solve(rule: Rule) -> str | None:
    return None if rule.update.solves else f"update {rule.update.kind} does not solve for the weights"


def gradient_is_fixed(rule: Rule) -> bool:
    """Whether dl/dW does not depend on W, so that any anchor gives the same function."""
    return rule.memory.kind == "matrix" and rule.bias.error == "value"


def _not_online(rule: Rule) -> str | None:
    update, anchor = rule.update, rule.update.anchor
    if rule.memory.grows:
        return f"memory {rule.memory.kind} stores tokens, not weights"
    if update.kind not in ("gradient_descent", "momentum"):
        return f"update {update.kind} is not linear in the gradients"
    if anchor is None and not gradient_is_fixed(rule):
        return "every token's gradient is taken at the weights that the token before it left"
    decay = rule.retention.decay_gate
    if decay is not None and rule.granularity(decay) == "state":
        return "the decay varies per state, along both axes of a weight"
    return _first(
        _no_link(rule),
        _no_window(rule),
        "the anchor lags one token behind" if anchor is not None and anchor.lag else None,
        "the write has a strength of its own" if update.write_size is not None else None,
    )


def _softmax_reason(rule: Rule) -> str:
    if getattr(rule.memory, "cache", "tokens") == "statistics":
        return "every reader gives the tokens the same scores: a running average"
    return "tokens are stored and read by a softmax"


def _not_anchored(rule: Rule) -> str | None:
    update, anchor = rule.update, rule.update.anchor
    if rule.memory.grows:
        return f"memory {rule.memory.kind} stores tokens, not weights"
    if update.kind not in ("gradient_descent", "momentum", "muon"):
        return f"update {update.kind} needs the weights between its steps"
    if anchor is None and not gradient_is_fixed(rule):
        return "every token's gradient is taken at the weights that the token before it left"
    if anchor is not None and anchor.reduce == "mean":
        return "the steps since the anchor are averaged"
    return f"retention {rule.retention.kind} turns pairs of states" if rule.retention.turns else None


def _not_sequential(rule: Rule) -> str | None:
    if rule.memory.grows:
        return f"memory {rule.memory.kind} stores tokens, not weights"
    return f"update {rule.update.kind} solves for the weights" if rule.update.solves else None


def _sequential_reason(rule: Rule) -> str:
    return "every token's gradient sees the weights that the one before has moved: one recorded step a token"


def _anchored_reason(rule: Rule) -> str:
    anchor = rule.update.anchor
    shared = "that do not see the weights" if anchor is None else f"of {anchor.every} tokens that share an anchor"
    return f"gradients {shared} are one batch; links, windows and steps act on the weights of all of them"


def _linear_reason(rule: Rule) -> str:
    decay = rule.retention.decay_gate
    grain = f"decays per {rule.granularity(decay)}" if decay is not None else "does not decay"
    return f"a matrix that adds k v^T and {grain}: chunks are independent given their start states"


def _online_reason(rule: Rule) -> str:
    anchor = rule.update.anchor
    if anchor is not None:
        return f"gradients of {anchor.every} tokens at their anchor are one batch; c folds decay and momentum"
    return "the gradient does not depend on the weights, so chunks of any length are exact"


def _triton_linear(rule: Rule, device: str) -> str:
    fits = max(rule.dims.key_dim, rule.dims.value_dim + 1) <= MAX_TRITON_DIM and rule.dims.key_dim >= 1
    return "triton" if device == "cuda" and fits else "torch"


def _triton_delta(rule: Rule, device: str) -> str:
    """Name what serves a delta rule: the kernel has one key and one strength a token, and decays first."""
    update = rule.update
    other = (
        update.write_size is not None
        or rule.bias.read_key is not None
        or rule.retention.order != "decay_first"
        or rule.granularity(update.step_size) == "key"
    )
    fits = max(rule.dims.key_dim, rule.dims.value_dim) <= MAX_TRITON_DIM
    return "triton" if device == "cuda" and fits and not other else "torch"


def _torch(rule: Rule, device: str) -> str:
    return "torch"


FAMILIES: tuple[Family, ...] = (
    Family("softmax", "attention", _not_softmax, _softmax_reason, _torch),
    Family("linear", "chunkwise", _not_linear, _linear_reason, _triton_linear),
    Family(
        "delta",
        "chunkwise",
        _not_delta,
        lambda rule: "a matrix under l2: the steps of a chunk solve one triangular system",
        _triton_delta,
    ),
    Family(
        "momentum_delta",
        "chunkwise",
        _not_momentum_delta,
        lambda rule: "a matrix under l2 with momentum: the errors of a chunk solve one triangular system",
        _torch,
    ),
    Family(
        "solve",
        "chunkwise",
        _not_solve,
        lambda rule: "conjugate gradients for all queries at once; H x is linear attention of x",
        _triton_linear,
    ),
    Family("online", "chunkwise", _not_online, _online_reason, _torch),
    Family(
        "scan",
        "scan",
        _not_scan,
        lambda rule: "every entry of the matrix decays and grows by itself: one associative scan",
        _torch,
    ),
    Family("anchored", "chunkwise", _not_anchored, _anchored_reason, _torch),
    Family("sequential", "step", _not_sequential, _sequential_reason, _torch),
    Family("recurrence", "recurrence", lambda rule: None, lambda rule: "no faster form computes this function", _torch),
)
