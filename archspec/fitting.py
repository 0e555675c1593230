"""Whether projections, their parts, sources and skips fit the widths that they join."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from archspec.composition import Finding, Path
from archspec.declarations import stream_widths
from archspec.families import Gate, Projection, Source, gate_size, nested_gates
from archspec.rule import granularity
from archspec.schema import MemoryMixer
from archspec.shapes import HeadDims

PROJECTIONS = ("query", "key", "value")


def projection_sources(mixer: MemoryMixer) -> Iterator[tuple[Path, Source]]:
    """Yield every source that is evaluated before the projections exist: theirs, their parts' and their blends'."""
    for field in ("qkv", "qk", *PROJECTIONS):
        projection: Projection | None = getattr(mixer, field)
        if projection is None:
            continue
        yield (field,), projection
        for index, part in enumerate(projection.parts):
            yield (field, "parts", index), part
        if projection.blend is not None:
            gate = projection.blend.gate
            yield (field, "blend", "gate"), gate
            for name, inner in nested_gates(gate):
                yield (field, "blend", "gate", *name.split(".")), inner


def every_gate(mixer: MemoryMixer) -> Iterator[tuple[str, Gate]]:
    """Yield (dotted path, gate) for every gate of the mixer outside its projections, gates inside gates included."""
    for path, gate in mixer.named_gates():
        yield path, gate
        yield from nested_gates(gate, f"{path}.")


def check(mixer: MemoryMixer, projected: HeadDims, dims: HeadDims) -> Iterator[Finding]:
    """Yield what does not fit; ``projected`` are the sizes before feature maps, ``dims`` those the memory sees."""
    widths = stream_widths(mixer, projected)
    for name, stream in mixer.streams.items():
        width = sum(widths[source] for source in stream.from_)
        yield from blocks_divide(stream, width, widths[name], ("streams", name))
    for name in PROJECTIONS:
        projection = mixer.projection(name)  # type: ignore[arg-type]
        yield from _projection(projection, name, projected)
        yield from _parts(mixer, projection, name, projected, widths)
        yield from _blend(mixer, projection, name, projected)
        if not projection.parts:
            size = _size(name, projected) * (projection.heads or projected.num_heads) * _copies(mixer, name)
            yield from _source(projection, widths, size, (name,))
    yield from _features(mixer, projected)
    yield from _several(mixer)
    yield from _gates(mixer, dims, widths)
    yield from _output(mixer, dims)
    skip = mixer.readout.skip
    if skip is not None:
        width, needed = widths[skip.of], dims.num_heads * dims.value_dim
        if width != needed:
            message = f"{skip.of} is {width} wide and the read-out {needed}; they must agree."
            yield ("readout", "skip", "of"), message


def _output(mixer: MemoryMixer, dims: HeadDims) -> Iterator[Finding]:
    width = dims.num_heads * dims.value_dim
    for index, stage in enumerate(mixer.output):
        needed = stage.needs_width(dims.model_dim)
        if needed not in (None, width):
            yield (
                ("output", index),
                f"{stage.kind} takes {needed} channels, and {width} come in; put 'linear' first.",
            )
        width = stage.width(width, dims.model_dim)
    if mixer.output and width != dims.model_dim:
        yield ("output",), f"{width} channels come out and the model has {dims.model_dim}; end with 'linear' or 'glu'."


def _size(name: str, dims: HeadDims) -> int:
    return dims.value_dim if name == "value" else dims.key_dim


def _copies(mixer: MemoryMixer, name: str) -> int:
    return 1 if name == "query" else mixer.update.steps_per_token


def _projection(projection: Projection, name: str, dims: HeadDims) -> Iterator[Finding]:
    if projection.heads is not None and dims.num_heads % projection.heads:
        yield (name, "heads"), f"{projection.heads} groups do not divide num_heads={dims.num_heads}."
    if projection.dim is not None:
        yield (name, "dim"), "a projection is as wide as key_dim and value_dim say; 'dim' belongs to its parts."
    if name == "value" and projection.position is not None:
        yield (name, "position"), "positions act on queries and keys; write it under 'qk'."


def _features(mixer: MemoryMixer, dims: HeadDims) -> Iterator[Finding]:
    found = {}
    for name in PROJECTIONS:
        feature, size = mixer.projection(name).feature, _size(name, dims)  # type: ignore[arg-type]
        found[name] = size if feature is None else feature.output_dim(size)
    if found["value"] != dims.value_dim:
        yield (
            ("value", "feature"),
            f"the feature map changes the value's size from {dims.value_dim} to {found['value']}.",
        )
    if found["query"] != found["key"]:
        yield (
            ("query", "feature"),
            f"queries have {found['query']} channels and keys {found['key']} after their feature maps; "
            "they must agree.",
        )


def _parts(
    mixer: MemoryMixer, projection: Projection, name: str, dims: HeadDims, widths: dict[str, int]
) -> Iterator[Finding]:
    if not projection.parts:
        return
    size, groups = _size(name, dims), projection.heads or dims.num_heads
    sizes = [size if part.dim is None else part.dim.resolve(vars(dims)) for part in projection.parts]
    if sum(sizes) != size:
        yield (name, "parts"), f"the parts are {' + '.join(map(str, sizes))} channels of a head and must be {size}."
    for index, (part, channels) in enumerate(zip(projection.parts, sizes, strict=True)):
        path: Path = (name, "parts", index)
        if part.parts:
            yield (*path, "parts"), "a part has no parts of its own; write them side by side."
            continue
        if part.blend is not None:
            yield (*path, "blend"), "a blend is of the whole projection; write it beside 'parts'."
        if part.feature is not None and part.feature.output_dim(channels) != channels:
            wide = part.feature.output_dim(channels)
            yield (*path, "feature"), f"the feature map changes the part's size from {channels} to {wide}."
        if name == "value" and part.position is not None:
            yield (*path, "position"), "positions act on queries and keys; write it under 'qk'."
        if part.heads is not None and groups % part.heads:
            yield (*path, "heads"), f"{part.heads} groups do not divide the projection's {groups}."
        wide = channels * (part.heads or dims.num_heads) * _copies(mixer, name)
        yield from _source(part, widths, wide, path)


def _source(projection: Projection, widths: dict[str, int], size: int, path: Path) -> Iterator[Finding]:
    """An identity or block-diagonal map must be as wide as what it reads."""
    width = sum(widths[source] for source in projection.from_)
    if projection.has_source and not projection.has_weights and width != size:
        yield path, f"an identity of a source of width {width} cannot be {size} wide; use kind 'linear'."
    yield from blocks_divide(projection, width, size, path)


def blocks_divide(source: Source, width: int, size: int, path: Path) -> Iterator[Finding]:
    """A block-diagonal map of ``width`` to ``size`` channels needs both equal, and blocks that divide them."""
    block = source.block_size
    if block is not None and (width % block or size % block or width != size):
        yield (
            (*path, "block_size"),
            f"blocks of {block} need equal widths that it divides; found {width} in and {size} out.",
        )


def _blend(mixer: MemoryMixer, projection: Projection, name: str, dims: HeadDims) -> Iterator[Finding]:
    if projection.blend is None:
        return
    grouped = projection.heads is not None and projection.heads != dims.num_heads
    if grouped or _copies(mixer, name) > 1:
        yield (name, "blend"), "a blend has one gate a head, and the heads share this projection."
    gate, own = projection.blend.gate, "value" if name == "value" else "key"
    varies = granularity(gate, mixer.gates, mixer.retention, mixer.update)
    if varies not in ("head", own):
        message = f"a {name} has {own} channels; found per {varies}: use head or {own}."
        yield (name, "blend", "gate"), message
    if any(part.keeps is not None for part in (gate, *(inner for _, inner in nested_gates(gate)))):
        yield (name, "blend", "gate"), "a gate by all tokens so far is a decay: write it as the retention's gate."
    if gate.all_needs():
        yield (name, "blend", "gate"), f"{gate.kind} is derived from what comes after the projections; use sigmoid."


def _several(mixer: MemoryMixer) -> Iterator[Finding]:
    """With several steps a token, a token has several keys and values: nothing can read *the* key."""
    if mixer.update.steps_per_token == 1:
        return
    steps, plural = mixer.update.steps_per_token, ("key", "value")
    for path, gate in every_gate(mixer):
        read = {*gate.from_} if gate.has_source else set()
        for name in sorted((read | {*gate.needs()}) & {*plural}):
            yield tuple(path.split(".")), f"a token has {steps} {name}s here; read the input or a stream."
        if "update.step_size" in gate.needs() and mixer.update.step_size.has_source:
            yield tuple(path.split(".")), f"a token has {steps} step sizes here, and {gate.kind} is derived from one."
    skip = mixer.readout.skip
    if skip is not None and skip.of in plural:
        yield ("readout", "skip", "of"), f"a token has {steps} {skip.of}s here; skip the input or a stream."
    if mixer.readout.correction is not None:
        yield ("readout", "correction"), f"a token has {steps} keys here; remove the correction."


def _gates(mixer: MemoryMixer, dims: HeadDims, widths: dict[str, int]) -> Iterator[Finding]:
    blends = [(f"{name}.blend.gate", mixer.projection(name).blend) for name in PROJECTIONS]  # type: ignore[arg-type]
    for path, gate in [*mixer.named_gates(), *((path, blend.gate) for path, blend in blends if blend is not None)]:
        yield from gate_blocks_divide(path, gate, widths, dims)


def gate_blocks_divide(path: str, gate: Gate, widths: Mapping[str, int], dims: HeadDims) -> Iterator[Finding]:
    """The same of a gate's map and of the gates inside it, where the streams that they read are known."""
    for place, part in [(path, gate), *nested_gates(gate, f"{path}.")]:
        if part.has_source and part.block_size is not None and all(source in widths for source in part.from_):
            sizes = gate_size(part.per, dims)
            width = sum(widths[source] for source in part.from_)
            yield from blocks_divide(part, width, dims.num_heads * sizes[0] * sizes[1], tuple(place.split(".")))
