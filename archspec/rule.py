"""One layer's rule: the four choices of a mixer with the sizes of its heads. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from archspec.equivalence import simplified
from archspec.families import Bias, Gate, Memory, Per, Retention, Update, gates_of, joint_granularity
from archspec.schema import MemoryMixer
from archspec.shapes import HeadDims


@dataclass(frozen=True)
class Rule:
    """The four choices of one mixer with the sizes of its heads.

    Args:
        read: whether the query reads the weights ``after`` or ``before`` its own token's update.
        gates: the gates that others refer to by name.
    """

    memory: Memory
    bias: Bias
    retention: Retention
    update: Update
    dims: HeadDims
    read: Literal["after", "before"] = "after"
    gates: Mapping[str, Gate] = field(default_factory=dict)

    @classmethod
    def of(cls, mixer: MemoryMixer, model_dim: int) -> Rule:
        """Return the rule of a mixer inside a model of width ``model_dim``, in its simplest equal form."""
        mixer = simplified(mixer, model_dim)
        choices = (mixer.memory, mixer.bias, mixer.retention, mixer.update)
        return cls(*choices, mixer.dims(model_dim), mixer.readout.read, mixer.gates)

    @property
    def links_at_anchors(self) -> bool:
        """Whether a nonlinear link applies at anchors only, so that the weights run linearly in between."""
        anchor = self.update.anchor
        return anchor is not None and anchor.link == "anchor" and self.retention.has_link

    def granularity(self, gate: Gate) -> Per:
        """Return what a gate varies over, also for one that refers to another."""
        return granularity(gate, self.gates, self.retention, self.update)


def granularity(gate: Gate, gates: Mapping[str, Gate], retention: Retention, update: Update) -> Per:
    """Return what a gate varies over: its own granularity, or that of what it is derived from, and of gates inside."""

    def of(other: Gate) -> Per:
        return granularity(other, gates, retention, update)

    if gate.sums_channels:
        return "head"
    derived = []
    for needed in gate.needs():
        if needed.startswith("gates.") and needed.removeprefix("gates.") in gates:
            derived.append(of(gates[needed.removeprefix("gates.")]))
        elif needed == "retention.gate.token_step" and retention.decay_gate is not None:
            step = getattr(retention.decay_gate, "step", None)
            derived.append(retention.decay_gate.per if step is None else of(step))
        elif needed == "retention.gate" and retention.decay_gate is not None:
            derived.append(of(retention.decay_gate))
        elif needed == "update.step_size":
            derived.append(of(update.step_size))
    own = derived or [gate.granularity]
    return joint_granularity(*own, *(of(inner) for _, inner in gates_of(gate)))
