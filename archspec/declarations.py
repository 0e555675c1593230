"""What a mixer learns, declared: from here modules make their parameters and ``complexity`` counts them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from archspec.families import Gate, Projection, Source, StreamFields, gate_size, gates_of, seen_dims
from archspec.initial import FAN_IN, Initial, Parameter
from archspec.schema import MemoryMixer
from archspec.shapes import HeadDims

STEPPED_GATES = ("update.step_size", "update.write_size")
"""Gates that a rule of several steps a token has once for each of them."""


def source_parameters(
    source: Source, d_in: int, d_out: int, sizes: Mapping[str, int], *, has_weights: bool
) -> dict[str, Parameter]:
    """Declare what a source learns, for ``d_in`` channels in and ``d_out`` out."""
    found: dict[str, Parameter] = {}
    if source.shift == "lerp":
        found["shift_mix"] = Parameter((d_in,), Initial(uniform=(0.0, 1.0)))
    if has_weights:
        law = source.init or FAN_IN
        if source.rank is not None:
            rank = source.rank.resolve(sizes)
            found["down"] = Parameter((d_in, rank), FAN_IN, decayed=True)
            found["up"] = Parameter((rank, d_out), law, decayed=True)
        elif source.block_size is not None:
            size = source.block_size
            found["weight"] = Parameter((d_in // size, size, size), law, decayed=True)
        else:
            found["weight"] = Parameter((d_in, d_out), law, decayed=True)
        if source.offset is not None:
            found["offset"] = Parameter((d_out,), source.offset)
    if source.conv:
        bound = source.conv**-0.5
        found["conv"] = Parameter((d_out, source.conv), Initial(uniform=(-bound, bound)), decayed=True)
        if source.conv_offset is not None:
            found["conv_offset"] = Parameter((d_out,), source.conv_offset)
    return found


def stream_widths(mixer: MemoryMixer, dims: HeadDims) -> dict[str, int]:
    """Return the width of every stream and projection that can be read inside a mixer.

    ``dims`` are the sizes before feature maps; gates read queries and keys after them, as the memory does.
    """
    seen = mixer.dims(dims.model_dim)
    widths = {
        "input": dims.model_dim,
        "query": dims.num_heads * seen.key_dim,
        "key": dims.num_heads * seen.key_dim,
        "value": dims.num_heads * dims.value_dim,
    }
    for name, stream in mixer.streams.items():
        widths[name] = stream_width(stream, sum(widths[source] for source in stream.from_), dims)
    return widths


def stream_width(stream: StreamFields, source: int, dims: HeadDims) -> int:
    """Return a stream's width: its ``dim``, or its source's width for an identity, or the model's."""
    if not stream.has_weights:
        return source
    if stream.dim is None:
        return dims.model_dim
    return stream.dim.resolve(
        {
            "model_dim": dims.model_dim,
            "num_heads": dims.num_heads,
            "key_dim": dims.key_dim,
            "value_dim": dims.value_dim,
        }
    )


def mixer_parameters(mixer: MemoryMixer, model_dim: int) -> dict[str, Parameter]:
    """Return every parameter of a mixer by a path of its own; the sizes are those of the compiled module."""
    projected, dims = mixer.projected_dims(model_dim), mixer.dims(model_dim)
    widths = stream_widths(mixer, projected)
    steps = mixer.update.steps_per_token
    found: dict[str, Parameter] = {}
    for name, stream in mixer.streams.items():
        d_in = sum(widths[source] for source in stream.from_)
        own = source_parameters(stream, d_in, widths[name], vars(projected), has_weights=stream.has_weights)
        _add(found, f"streams.{name}", own)
        if stream.norm is not None:
            _add(found, f"streams.{name}.norm", stream.norm.parameters(widths[name]))
    for name in ("query", "key", "value"):
        dim = projected.value_dim if name == "value" else projected.key_dim
        copies = 1 if name == "query" else steps
        _add(found, name, _projection(mixer.projection(name), widths, projected, dim, copies))  # type: ignore[arg-type]
    for name, gate in mixer.named_gates():
        copies = steps if name in STEPPED_GATES and gate.has_source else 1
        sizes = mixer.retention.gate_dims(dims) if name.startswith("retention.") else dims
        _add(found, name, gate_parameters(gate, widths, replace(sizes, num_heads=dims.num_heads * copies), dims))
    anchor = mixer.update.anchor
    shares = {} if anchor is None else anchor.parameters
    _add(found, "memory", {**mixer.memory.initial(dims), **mixer.memory.parameters(dims), **shares})
    read_key, norm = mixer.bias.read_key, mixer.readout.norm
    if read_key is not None and read_key.norm is not None:
        _add(found, "read_key_norm", read_key.norm.parameters_of(dims.num_heads, dims.key_dim))
    if norm is not None:
        width = dims.value_dim if norm.over == "head" else dims.num_heads * dims.value_dim
        _add(found, "norm", norm.parameters_of(dims.num_heads, width))
    width = dims.num_heads * dims.value_dim
    if not mixer.stages:
        found["output"] = Parameter((width, model_dim), FAN_IN, decayed=True)
    for index, stage in enumerate(mixer.stages):
        _add(found, f"output_stages.{index}", stage.parameters(width, model_dim))
        width = stage.width(width, model_dim)
    if mixer.prefix:
        found["prefix"] = Parameter((mixer.prefix, model_dim), Initial(normal=0.02))
    return found


def looked_up_parameters(mixer: MemoryMixer, model_dim: int) -> dict[str, Parameter]:
    """Return what a look-up uses of a mixer's parameters besides its weights: streams, query, read-out, output."""
    gates = dict(mixer.named_gates())
    used = [path for path in gates if path.startswith("readout.")]
    for path in used:
        used.extend(needed for needed in gates[path].all_needs() if needed in gates and needed not in used)
    prefixes = ("streams.", "query.", "norm.", "output", *(f"{path}." for path in used))
    return {name: p for name, p in mixer_parameters(mixer, model_dim).items() if name.startswith(prefixes)}


def num_buffered(parameters: Mapping[str, Parameter]) -> int:
    """Return the scalars that sources keep between tokens: convolutions their last inputs, shifts the last token."""
    buffered = 0
    for name, parameter in parameters.items():
        field = name.rpartition(".")[2]
        if field == "conv":
            channels, width = parameter.shape
            buffered += channels * (width - 1)
        elif field == "shift_mix":
            buffered += parameter.shape[0]
    return buffered


def num_accumulated(mixer: MemoryMixer, dims: HeadDims) -> int:
    """Return the scalars that a mixer's gates keep between tokens, those inside other gates included."""
    pairs = mixer.retention.gate_dims(dims)  # a retention of complex numbers has half as many
    return sum(
        accumulated_by(gate, pairs if path.startswith("retention.") else dims, dims)
        for path, gate in mixer.named_gates()
    )


def accumulated_by(gate: Gate, seen: HeadDims, head: HeadDims) -> int:
    """Return the scalars that one gate and those inside it keep between tokens.

    Args:
        seen: sizes of what the gate varies over.
        head: sizes of the head.
    """
    seen = seen_dims(gate, seen, head)
    rows, columns = gate_size(gate.per, seen)
    own = seen.num_heads * rows * columns if gate.keeps is not None else 0
    return own + sum(accumulated_by(inner, seen, head) for _, inner in gates_of(gate))


def gate_parameters(
    gate: Gate, widths: Mapping[str, int], dims: HeadDims, head: HeadDims | None = None
) -> dict[str, Parameter]:
    """Return what one gate learns: its source's map, its own parameters, and the gates inside it.

    Args:
        head: sizes of the head, where ``dims`` are others.
    """
    head = head or dims
    dims = seen_dims(gate, dims, head)
    found = dict(gate.parameters(dims))
    if gate.has_source:
        rows, columns = gate_size(gate.per, dims)
        d_in = sum(widths[source] for source in gate.from_)
        own = source_parameters(gate, d_in, dims.num_heads * rows * columns, vars(dims), has_weights=True)
        _add(found, "source", own)
    for name, inner in gates_of(gate):
        _add(found, name, gate_parameters(inner, widths, dims, head))
    return found


def _projection(
    projection: Projection, widths: Mapping[str, int], dims: HeadDims, dim: int, copies: int = 1
) -> dict[str, Parameter]:
    found: dict[str, Parameter] = {}
    groups = (projection.heads or dims.num_heads) * copies
    for index, part in enumerate(projection.parts):
        size = part.dim.resolve(vars(dims)) if part.dim is not None else dim
        _add(found, f"parts.{index}", _projection(part, widths, dims, size, copies))
    found.update(projection.own_parameters(groups, dim))
    if not projection.parts and projection.has_source:
        d_in = sum(widths[source] for source in projection.from_)
        own = source_parameters(projection, d_in, groups * dim, vars(dims), has_weights=projection.has_weights)
        found.update(own)
    if projection.norm is not None:
        _add(found, "norm", projection.norm.parameters_of(groups, dim))
    if projection.feature is not None:
        _add(found, "feature", projection.feature.parameters(groups, dim))
    if projection.blend is not None:
        _add(found, "blend", gate_parameters(projection.blend.gate, widths, dims))
    return found


def _add(found: dict[str, Parameter], prefix: str, more: Mapping[str, Parameter]) -> None:
    found.update({f"{prefix}.{name}": parameter for name, parameter in more.items()})
