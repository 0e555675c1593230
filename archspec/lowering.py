"""From a spec to a plan: for each mixer the rule family, the form and the kernel that run it, with the reasons.

The families are tried in the order of ``FAMILIES``; each says why it cannot take a rule, or takes it. No legal rule
is without a way to run: the last family is the token-by-token recurrence itself.

| family | state update | form |
|---|---|---|
| softmax | the tokens themselves | tiled attention |
| linear | S = Diag(a) S + k v^T | chunkwise, one masked product a chunk |
| delta | S = (I - b k k^T) Diag(a) S + b k v^T | chunkwise, one triangular solve a chunk (WY) |
|  | ... summed over a window of tokens; with gates per value; with turning pairs | the same, in another layout |
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
from archspec.families import gates_of
from archspec.loading import dotted
from archspec.refusals import (
    not_anchored,
    not_delta,
    not_linear,
    not_momentum_delta,
    not_online,
    not_scan,
    not_sequential,
    not_softmax,
    not_solve,
)
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


def _softmax_reason(rule: Rule) -> str:
    if getattr(rule.memory, "cache", "tokens") == "statistics":
        return "every reader gives the tokens the same scores: a running average"
    return "tokens are stored and read by a softmax"


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


def _delta_reason(rule: Rule) -> str:
    if rule.bias.window is not None:
        return "a matrix under l2: the windows of a chunk's tokens solve one system, triangular in blocks of a token"
    return "a matrix under l2: the steps of a chunk solve one triangular system"


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
        or rule.bias.window is not None
        or rule.bias.read_key is not None
        or rule.retention.order != "decay_first"
        or getattr(rule.retention, "gain", None) is not None
        or getattr(rule.retention, "discretization", "exact") != "exact"
        or not {rule.granularity(gate) for _, gate in gates_of(rule.retention)} <= {"head", "key"}
        or rule.granularity(update.step_size) != "head"
        or (rule.bias.error == "weighted" and rule.granularity(rule.bias.weights) != "head")  # type: ignore[attr-defined]
    )
    fits = max(rule.dims.key_dim, rule.dims.value_dim) <= MAX_TRITON_DIM
    return "triton" if device == "cuda" and fits and not other else "torch"


def _torch(rule: Rule, device: str) -> str:
    return "torch"


FAMILIES: tuple[Family, ...] = (
    Family("softmax", "attention", not_softmax, _softmax_reason, _torch),
    Family("linear", "chunkwise", not_linear, _linear_reason, _triton_linear),
    Family("delta", "chunkwise", not_delta, _delta_reason, _triton_delta),
    Family(
        "momentum_delta",
        "chunkwise",
        not_momentum_delta,
        lambda rule: "a matrix under l2 with momentum: the errors of a chunk solve one triangular system",
        _torch,
    ),
    Family(
        "solve",
        "chunkwise",
        not_solve,
        lambda rule: "conjugate gradients for all queries at once; H x is linear attention of x",
        _triton_linear,
    ),
    Family("online", "chunkwise", not_online, _online_reason, _torch),
    Family(
        "scan",
        "scan",
        not_scan,
        lambda rule: "every entry of the matrix decays and grows by itself: one associative scan",
        _torch,
    ),
    Family("anchored", "chunkwise", not_anchored, _anchored_reason, _torch),
    Family("sequential", "step", not_sequential, _sequential_reason, _torch),
    Family("recurrence", "recurrence", lambda rule: None, lambda rule: "no faster form computes this function", _torch),
)
