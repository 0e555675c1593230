"""What every rule of legality looks at: one mixer, with the sizes of its heads and what its gates can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from archspec.composition import Finding
from archspec.families import Gate, Per
from archspec.rule import granularity
from archspec.schema import MemoryMixer
from archspec.shapes import HeadDims


@dataclass(frozen=True)
class Context:
    """One mixer under examination: ``dims`` are those the memory sees, ``projected`` those before feature maps."""

    mixer: MemoryMixer
    projected: HeadDims
    dims: HeadDims


Rule = Callable[[Context], Iterator[Finding]]


def granularity_of(mixer: MemoryMixer, gate: Gate) -> Per:
    """Return what a gate of a mixer varies over."""
    return granularity(gate, mixer.gates, mixer.retention, mixer.update)


def value_range(mixer: MemoryMixer, gate: Gate) -> tuple[float, float]:
    """Return the interval that a gate's value lies in, also of one that refers to another."""
    for needed in gate.needs():
        if needed.startswith("gates."):
            ends = gate.derived_range(*value_range(mixer, mixer.gates[needed.removeprefix("gates.")]))
            low, high = sorted(gate.scale * end + 0.0 if gate.scale else 0.0 for end in ends)
            return low, high
    return gate.value_range
