"""The normal form of an architecture and its hash: equal architectures get equal hashes.

Two specs merge only if their parameters correspond one to one (shapes and initial law) *and* their outputs and
states agree for all values and lengths. What merges: short forms, presets, extends, defaults, resolved sizes,
repeats and cycles, block names, constant gates along any axis, and what ``equivalence`` merges. What tempts but
does not (an lp of p = 2 with smoothing, decay orders on a matrix under l2, a loop and a repeat, ...) hashes apart.

Not part of an architecture: its name, its source, the vocabulary (it comes from the task).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from archspec.component import Component
from archspec.composition import Mixer
from archspec.ends import Head, Input
from archspec.equivalence import simplified
from archspec.families import Dim, FeedForward, Gate, Retention
from archspec.program import Embed, Inject, Ponder, Remember, RunLayer, unroll
from archspec.schema import Block, MemoryMixer, Spec

SOURCE_FIELDS = ("from_", "shift", "rank", "hidden", "block_size", "offset", "init", "conv", "conv_offset")


def canonical(spec: Spec) -> dict[str, Any]:
    """Return the normal form of a spec as plain data."""
    program = unroll(spec.layout)
    forms = {name: _block(block, spec) for name, block in spec.blocks.items() if name in program.blocks}
    distinct: list[Any] = []
    for name in program.blocks:
        if forms[name] not in distinct:
            distinct.append(forms[name])
    steps: list[Any] = []
    for step in program.instructions:
        if isinstance(step, RunLayer):
            steps.append(["layer", step.index, distinct.index(forms[program.blocks[step.index]])])
        elif isinstance(step, Remember | Inject):
            steps.append([type(step).__name__.lower(), step.loop])
        elif isinstance(step, Embed):
            steps.append(["embed", step.number, *(["positions"] if step.positions else [])])
        elif isinstance(step, Ponder):
            steps.append(["ponder", step.loop, step.first, step.last, step.halt.model_dump(mode="json")])
    injected = any(isinstance(step, Inject) for step in program.instructions)
    return {
        "model_dim": spec.model_dim,
        "input": _end(spec.input, spec.input.idle()),
        "output": _end(spec.output),
        "norm": _plain(spec.norm),
        "blocks": distinct,
        "layers": steps if injected else [step for step in steps if step[0] != "remember"],
    }


def _end(end: Input | Head, idle: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return an input or output without the sizes that come from the task."""
    found = {name: _plain(getattr(end, name)) for name in type(end).model_fields}
    return {"kind": end.kind, **{name: x for name, x in found.items() if name not in (*idle, *end.from_task)}}


def architecture_hash(spec: Spec) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the normal form."""
    text = json.dumps(canonical(spec), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _block(block: Block, spec: Spec) -> dict[str, Any]:
    feed_forward = block.feed_forward
    return {
        "mixer": _mixer(block.mixer, spec.model_dim),
        "feed_forward": None if feed_forward is None else _feed_forward(feed_forward, spec.model_dim),
        "norm": _plain(block.norm or spec.norm),
        "placement": block.placement,
    }


def _feed_forward(feed_forward: FeedForward, model_dim: int) -> dict[str, Any]:
    found = feed_forward.dump()
    del found["expansion"], found["multiple_of"]
    return {**found, "hidden_dim": feed_forward.hidden_dim(model_dim)}


def _mixer(mixer: Mixer, model_dim: int) -> dict[str, Any]:
    if not isinstance(mixer, MemoryMixer):
        fields = {name: _plain(getattr(mixer, name), {"model_dim": model_dim}) for name in type(mixer).model_fields}
        return mixer.normal_form({"kind": mixer.kind, **fields})
    mixer = simplified(mixer, model_dim)
    dims = mixer.projected_dims(model_dim)
    sizes = vars(dims)
    found = {
        "kind": "memory",
        **{"prefix": mixer.prefix, "num_heads": dims.num_heads, "key_dim": dims.key_dim, "value_dim": dims.value_dim},
    }
    for name in ("query", "key", "value"):
        projection = mixer.projection(name)  # type: ignore[arg-type]
        heads = projection.heads or dims.num_heads
        found[name] = _plain(projection.model_copy(update={"heads": heads}), sizes)
    for name in ("streams", "gates"):
        found[name] = {key: _plain(value, sizes) for key, value in getattr(mixer, name).items()}
    for name in ("memory", "bias", "retention", "update", "readout", "stages"):
        found[name] = _plain(getattr(mixer, name), sizes)
    return found


def _plain(value: Any, sizes: Mapping[str, int] | None = None) -> Any:
    """Return a component or part as plain data: sizes resolved, inactive fields left out."""
    if isinstance(value, Dim):
        return value.resolve(sizes) if sizes is not None else value.model_dump(mode="json")
    if isinstance(value, Gate):
        value = _plain_gate(value)
    if isinstance(value, Mixer) and sizes is not None:
        return _mixer(value, sizes["model_dim"])
    if isinstance(value, tuple | list):
        return [_plain(item, sizes) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item, sizes) for name, item in value.items()}
    if not hasattr(value, "model_fields_set"):
        return value
    fields = {
        name: _plain(getattr(value, name), sizes)
        for name in type(value).model_fields
        if not (isinstance(value, Gate) and not value.has_source and name in SOURCE_FIELDS and name != "init")
    }
    if not fields.get("rank", True):
        fields.pop("hidden", None)
    if not fields.get("conv", True):
        fields.pop("conv_offset", None)
    if isinstance(value, Retention) and value.decay_gate is None and not value.has_link:
        fields.pop("order", None)
    return {"kind": value.kind, **fields} if isinstance(value, Component) else fields


def _plain_gate(gate: Gate) -> Gate:
    """A constant is one number whatever it varies over, and its scale is part of it."""
    if gate.kind != "constant":
        return gate
    value = getattr(gate, "value_", None)
    update: dict[str, Any] = {"per": "head"}
    if value is not None:
        update.update({"value_": value * gate.scale, "scale": 1.0})
    return gate.model_copy(update=update)
