"""The read-out after something is combined: a norm and a gate, in the order given. No torch.

A mixer that is no memory of its own has no query to correct and no value to skip, so of a memory's read-out
(``schema.Readout``) these two stages are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from archspec.composition import Finding
from archspec.declarations import accumulated_by, gate_parameters
from archspec.errors import nearest
from archspec.initial import Parameter
from archspec.kept import Kept
from archspec.schema import Readout
from archspec.shapes import HeadDims


def readout_parameters(readout: Readout, widths: Mapping[str, int], dims: HeadDims) -> dict[str, Parameter]:
    """Declare what norm and gate learn, for H heads of V channels and the streams the gate may read."""
    found: dict[str, Parameter] = {}
    norm = readout.norm
    if norm is not None:
        width = dims.value_dim * (dims.num_heads if norm.over == "model" else 1)
        found.update({f"readout.norm.{name}": p for name, p in norm.parameters_of(dims.num_heads, width).items()})
    if readout.gate is not None:
        gate = gate_parameters(readout.gate, widths, dims)
        found.update({f"readout.gate.{name}": p for name, p in gate.items()})
    return found


def readout_kept(readout: Readout, dims: HeadDims) -> Kept:
    """Return what the gate keeps between tokens."""
    return Kept(memory=0 if readout.gate is None else accumulated_by(readout.gate, dims, dims))


def readout_findings(readout: Readout, streams: list[str], home: str) -> Iterator[Finding]:
    """Yield what is illegal; ``home`` says where the stages of a memory's read-out belong instead."""
    for name, default in (("correction", None), ("skip", None), ("read", "after")):
        if getattr(readout, name) != default:
            yield ("readout", name), f"{name} belongs to a memory; {home}."
    gate = readout.gate
    if gate is None:
        return
    if gate.all_needs():
        yield ("readout", "gate"), "there is no quantity of a memory to derive it from; use a gate such as 'silu'."
    for name in gate.from_ if gate.has_source else ():
        if name not in streams:
            known = ", ".join(sorted(streams))
            yield ("readout", "gate", "from"), f"unknown stream {name!r}; known here: {known}.{nearest(name, streams)}"
    if gate.granularity not in ("head", "value"):
        yield ("readout", "gate"), f"a read-out has value channels; found per {gate.granularity}: use head or value."
