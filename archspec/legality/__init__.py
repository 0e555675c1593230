"""Which combinations mean something: rules as data, each with its reason and what would be legal.

Form (types, unknown keys) is the schema's business; this is about mathematics and shapes. Every rule yields
(path in the document, sentence); all of them are reported together.
"""

from __future__ import annotations

from collections.abc import Iterator

from archspec import fitting
from archspec.composition import Finding, Mixer, Path
from archspec.errors import nearest
from archspec.families import Gate, Norm, Source
from archspec.legality import gates, memories, updates
from archspec.legality.context import Context, Rule
from archspec.schema import Cycle, Layout, Loop, MemoryMixer, Spec


def check(spec: Spec) -> list[Finding]:
    """Return everything that is illegal in a spec whose form is right; an empty list means it can run."""
    findings = [*_layout(spec), *_headless_norm(spec.norm, ("norm",))]
    if spec.output.reads_embedding and spec.input.kind != "tokens":
        message = f"tied to the embedding, it needs input tokens, found {spec.input.kind}; write tied: false."
        findings.append((("output",), message))
    for name, block in spec.blocks.items():
        findings.extend(_headless_norm(block.norm, ("blocks", name, "norm")))
        findings.extend(_mixer(block.mixer, spec.model_dim, ("blocks", name, "mixer")))
    return findings


def _headless_norm(norm: Norm | None, path: Path) -> Iterator[Finding]:
    if norm is not None and norm.per_head:
        yield (*path, "per_head"), "there are no heads here; it belongs to projections and to the read-out."


def _layout(spec: Spec) -> Iterator[Finding]:
    names = list(spec.layout.names())
    for name in sorted(set(names) - set(spec.blocks)):
        known = ", ".join(sorted(spec.blocks))
        yield ("layout",), f"no block {name!r}; known: {known}.{nearest(name, spec.blocks)}"
    if len(names) > spec.MAX_LAYERS:
        yield ("layout",), f"{len(names)} layers; at most {spec.MAX_LAYERS} are allowed."
    yield from _halting(spec.layout, in_cycle=False)


def _halting(layout: Layout, *, in_cycle: bool) -> Iterator[Finding]:
    """A loop that halts needs a choice of passes, and all of them."""
    if isinstance(layout, Loop) and layout.halt is not None:
        if layout.loop == 1:
            yield ("layout",), "a loop of 1 pass has nothing to halt; raise 'loop', or remove 'halt'."
        if in_cycle:
            yield ("layout",), "a cycle may cut a loop before its last pass; use 'repeat' around a loop with 'halt'."
    for part in layout.inner():
        yield from _halting(part, in_cycle=in_cycle or isinstance(layout, Cycle))


def _mixer(mixer: Mixer, model_dim: int, path: Path) -> Iterator[Finding]:
    for name, child in mixer.children().items():
        yield from _mixer(child, model_dim, (*path, *name))
    if not isinstance(mixer, MemoryMixer):
        yield from (((*path, *local), message) for local, message in mixer.findings(model_dim))
        return
    found = list(_references(mixer))
    try:
        projected, dims = mixer.projected_dims(model_dim), mixer.dims(model_dim)
    except ValueError as error:
        found.append(((), f"{error}."))
    else:
        context = Context(mixer, projected, dims)
        # A rule may only look at what exists: references first, sizes and combinations after.
        if not found:
            for rule in RULES:
                found.extend(rule(context))
    for local, message in found:
        yield (*path, *local), message


def _references(mixer: MemoryMixer) -> Iterator[Finding]:
    seen = ["input"]
    for name, stream in mixer.streams.items():
        if name in ("input", *fitting.PROJECTIONS):
            yield ("streams", name), f"{name!r} is taken; choose another name for the stream."
        yield from _known_sources(stream, seen, ("streams", name))
        yield from _headless_norm(stream.norm, ("streams", name, "norm"))
        seen.append(name)
    for place, source in fitting.projection_sources(mixer):
        yield from _known_sources(source, seen, place)
    for name in mixer.gates:
        if Gate.parse_kind_exists(name):
            yield ("gates", name), f"{name!r} is a kind of gate; choose another name."
    for path, gate in fitting.every_gate(mixer):
        yield from _known_sources(gate, [*seen, *fitting.PROJECTIONS], tuple(path.split(".")))
        for needed in gate.needs():
            if needed.startswith("gates.") and needed.removeprefix("gates.") not in mixer.gates:
                name = needed.removeprefix("gates.")
                known = sorted([*Gate.known_kinds(), *mixer.gates])
                yield (
                    tuple(path.split(".")),
                    f"unknown gate {name!r}; known: {', '.join(known)}.{nearest(name, known)}",
                )
    yield from _gate_cycles(mixer)
    skip = mixer.readout.skip
    if skip is not None and skip.of not in (*seen, *fitting.PROJECTIONS):
        known = sorted([*seen, *fitting.PROJECTIONS])
        message = f"unknown stream {skip.of!r}; known: {', '.join(known)}.{nearest(skip.of, known)}"
        yield ("readout", "skip", "of"), message


def _known_sources(source: Source, known: list[str], path: Path) -> Iterator[Finding]:
    for name in source.from_:
        if name not in known:
            message = f"unknown stream {name!r}; known here: {', '.join(sorted(known))}.{nearest(name, known)}"
            yield (*path, "from"), message


def _gate_cycles(mixer: MemoryMixer) -> Iterator[Finding]:
    gates = dict(mixer.named_gates())
    for start in gates:
        trail, queue = [start], list(gates[start].all_needs())
        while queue:
            name = queue.pop().removesuffix(".token_step")
            if name == start:
                yield tuple(start.split(".")), f"the gate depends on itself: {' -> '.join([*trail, start])}."
                break
            if name in gates and name not in trail:
                trail.append(name)
                queue.extend(gates[name].all_needs())


def _fitting(context: Context) -> Iterator[Finding]:
    yield from fitting.check(context.mixer, context.projected, context.dims)


RULES: tuple[Rule, ...] = (*memories.RULES, *gates.RULES, *updates.RULES, _fitting)
