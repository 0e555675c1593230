"""Which pieces around a recurrence have a fused kernel: one rule from the spec, for modules and for ``explain``.

A piece is fused on CUDA in bf16, fp16 and fp32; elsewhere the plain torch form runs.
"""

from __future__ import annotations

from collections.abc import Iterator

from archspec.families import Gate, Norm, Projection, Source
from archspec.schema import MemoryMixer, Readout

MAX_CONV_WIDTH = 8
MAX_NORM_DIM = 8192
"""The limits of ``kernels.pointwise``; written here too because planning needs no tensors."""

CONV_ACTIVATIONS = {"none": "none", "linear": "none", "silu": "silu"}
"""Activations that the convolution's kernel applies itself, by the name it knows them under."""


def convolves(source: Source) -> bool:
    """Whether a source's convolution has a fused kernel."""
    return 0 < source.conv <= MAX_CONV_WIDTH


def norm_kind(norm: Norm, dim: int) -> str | None:
    """Return ``l2`` or ``rms`` when a norm over ``dim`` channels has a fused kernel."""
    return norm.kind if norm.kind in ("l2", "rms") and dim <= MAX_NORM_DIM else None


def readout_gate(readout: Readout, dim: int) -> str | None:
    """Return the activation of a read-out gate that is fused with the norm (over ``dim`` channels) before it."""
    gate, norm = readout.gate, readout.norm
    if gate is None or norm is None or norm_kind(norm, dim) != "rms":
        return None
    between = readout.order.index("gate") - readout.order.index("norm")
    adjacent = between == 1 or (between == 2 and readout.skip is None)
    return gate.kind if adjacent and _plain(gate) else None


def _plain(gate: Gate) -> bool:
    """Whether a gate is silu(z) or sigmoid(z) of a value per channel, and nothing else."""
    if gate.kind not in ("silu", "sigmoid") or gate.per != "value" or gate.scale != 1:
        return False
    return getattr(gate, "temperature", 1.0) == 1 and getattr(gate, "floor", 0.0) == 0


def decays(gate: Gate) -> bool:
    """Whether a decay is -A softplus(z) per head or key channel, whose logarithm has a fused kernel."""
    if gate.kind != "ssd" or gate.scale != 1 or getattr(gate, "step", None) is not None:
        return False
    rate = gate.rate.per  # type: ignore[attr-defined]
    return gate.per in ("head", "key") and rate in ("head", gate.per)


def fused_pieces(mixer: MemoryMixer, model_dim: int) -> tuple[str, ...]:
    """Return what is fused around a memory on CUDA, such as ``short convolution + silu (query, key, value)``."""
    dims = mixer.dims(model_dim)
    found: dict[str, list[str]] = {}
    for name, source, width in _sources(mixer, model_dim):
        if convolves(source):
            activation = CONV_ACTIVATIONS.get(getattr(source, "activation", "none"), "none")
            applied = "" if activation == "none" else f" + {activation}"
            found.setdefault(f"short convolution{applied}", []).append(name)
        norm = getattr(source, "norm", None)
        kind = None if norm is None else norm_kind(norm, width)
        if kind is not None:
            found.setdefault(f"{kind} norm", []).append(name)
    readout = mixer.readout
    if readout.norm is not None:
        width = dims.value_dim * (dims.num_heads if readout.norm.over == "model" else 1)
        kind, gate = norm_kind(readout.norm, width), readout_gate(readout, width)
        opened = "" if gate is None else f" x {gate} gate"
        if kind is not None:
            found.setdefault(f"{kind} norm{opened}", []).append("read-out")
    decay = mixer.retention.decay_gate
    if decay is not None and decays(decay):
        found["log decay"] = ["retention.gate"]
    return tuple(f"{piece} ({', '.join(names)})" for piece, names in found.items())


def _sources(mixer: MemoryMixer, model_dim: int) -> Iterator[tuple[str, Source, int]]:
    """Yield the name, choice and head width of every stream and projection, parts of projections included."""
    dims = mixer.projected_dims(model_dim)
    for name, stream in mixer.streams.items():
        yield name, stream, model_dim
    for name in ("query", "key", "value"):
        projection: Projection = mixer.projection(name)  # type: ignore[arg-type]
        width = dims.value_dim if name == "value" else dims.key_dim
        yield name, projection, width
        for index, part in enumerate(projection.parts):
            yield f"{name}.{index}", part, width
