"""Which combinations mean something: rules as data, each with its reason and what would be legal.

Form (types, unknown keys) is the schema's business; this is about mathematics and shapes. Every rule yields
(path in the document, sentence); all of them are reported together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from archspec import fitting
from archspec.composition import Finding, Mixer, Path
from archspec.errors import nearest
from archspec.families import Gate, Norm, Per, Source, gates_of
from archspec.rule import granularity
from archspec.schema import Cycle, Layout, Loop, MemoryMixer, Spec
from archspec.shapes import HeadDims

NON_NEGATIVE = ("update.step_size", "bias.threshold", "bias.weights")
FRACTIONS = ("retention.gate", "update.momentum")


@dataclass(frozen=True)
class Context:
    """One mixer under examination: its dims are those the memory sees."""

    mixer: MemoryMixer
    projected: HeadDims
    dims: HeadDims


Rule = Callable[[Context], Iterator[Finding]]


def check(spec: Spec) -> list[Finding]:
    """Return everything that is illegal in a spec whose form is right; an empty list means it can run."""
    findings = [*_layout(spec), *_headless_norm(spec.norm, ("norm",))]
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


def _memory_and_update(context: Context) -> Iterator[Finding]:
    mixer = context.mixer
    memory, update = mixer.memory, mixer.update
    if memory.grows and update.parametric:
        yield (
            ("update",),
            f"memory {memory.kind} stores tokens and has no weights for {update.kind} to move; "
            "use 'nonparametric', or memory 'matrix' or 'mlp'.",
        )
    if not memory.grows and not update.parametric:
        yield (
            ("update",),
            f"update {update.kind} reads stored tokens, and memory {memory.kind} stores none; "
            "use memory 'kv', or update 'gradient_descent'.",
        )
    if memory.grows and mixer.bias.kind != "l2":
        yield (
            ("bias",),
            f"reading a memory of tokens *is* regression under l2; found {mixer.bias.kind}: remove 'bias'.",
        )
    gate = mixer.retention.decay_gate
    if memory.grows and mixer.retention.has_link:
        yield ("retention",), "a link acts on weights, and a memory of tokens has none; use 'none' or 'decay'."
    if memory.grows and gate is not None and _granularity(mixer, gate) != "head":
        yield ("retention", "gate"), "a memory of tokens fades per head: its softmax has one weight a token."


def _statistics(context: Context) -> Iterator[Finding]:
    """Running statistics stand for the tokens only where every reader gives these the same scores."""
    mixer, memory = context.mixer, context.mixer.memory
    if getattr(memory, "cache", "tokens") != "statistics":
        return
    where = ("memory", "cache")
    query = mixer.projection("query")
    reads = "a position" if query.position is not None else "the first layer" if query.blend is not None else None
    if query.has_source or reads or mixer.readout.correction is not None:
        found = "the token" if query.has_source else reads or "a key (readout.correction)"
        yield (
            where,
            f"statistics need one query for all tokens, and it reads {found}; use 'tokens', or query 'learned'.",
        )
    if getattr(memory, "window", None) is not None:
        yield where, "what leaves a window cannot be taken out of a sum; remove 'window', or use 'tokens'."
    if mixer.retention.decay_gate is not None:
        yield where, "statistics do not fade; remove the decay, or use 'tokens'."


def _normalizer(context: Context) -> Iterator[Finding]:
    normalizer = getattr(context.mixer.memory, "normalizer", None)
    if normalizer is None:
        return
    if context.mixer.bias.error != "value":
        yield (
            ("memory", "normalizer"),
            f"the sum of written keys is a normaliser only when writing adds keys; found bias "
            f"{context.mixer.bias.kind}: use 'dot', or remove the normalizer.",
        )
    for path, gate in context.mixer.named_gates():
        if path.startswith(("retention.", "update.")) and _granularity(context.mixer, gate) in ("value", "state"):
            yield (
                tuple(path.split(".")),
                "with a normalizer, values and their normaliser must fade and grow alike; use per head or key.",
            )


def _gate_axes(context: Context) -> Iterator[Finding]:
    memory = context.mixer.memory
    for path, gate in context.mixer.named_gates():
        if not path.startswith(("retention.", "update.")) or memory.grows:
            continue
        granularity = _granularity(context.mixer, gate)
        axes = {memory.axis(name, granularity) for name in memory.weights(context.dims)}
        if "illegal" in axes:
            yield (
                tuple(path.split(".")),
                f"per {granularity} has no axis on every weight of memory {memory.kind}; "
                f"legal: {', '.join(_legal_axes(context))}.",
            )
        elif granularity == "key" and "output" in axes and context.dims.key_dim != context.dims.value_dim:
            yield (
                tuple(path.split(".")),
                "per key varies along the output of the last layer too, so key_dim must equal value_dim "
                f"(found {context.dims.key_dim} and {context.dims.value_dim}).",
            )


def _legal_axes(context: Context) -> list[str]:
    memory = context.mixer.memory
    names = list(memory.weights(context.dims))
    grains: tuple[Per, ...] = ("head", "key", "value", "state")
    return [per for per in grains if all(memory.axis(name, per) != "illegal" for name in names)]


def _granularity(mixer: MemoryMixer, gate: Gate) -> Per:
    return granularity(gate, mixer.gates, mixer.retention, mixer.update)


def _range(mixer: MemoryMixer, gate: Gate) -> tuple[float, float]:
    for needed in gate.needs():
        if needed.startswith("gates."):
            ends = gate.derived_range(*_range(mixer, mixer.gates[needed.removeprefix("gates.")]))
            low, high = sorted(gate.scale * end + 0.0 if gate.scale else 0.0 for end in ends)
            return low, high
    return gate.value_range


def _token_step(context: Context) -> Iterator[Finding]:
    for path, gate in fitting.every_gate(context.mixer):
        if "retention.gate" in gate.needs() and context.mixer.retention.decay_gate is None:
            yield tuple(path.split(".")), f"{gate.kind} follows the retention's decay, and nothing decays here."
        if "retention.gate" in gate.needs() and path.startswith("retention.") and path.count(".") > 1:
            yield tuple(path.split(".")), f"{gate.kind} follows the decay that it is part of; use a gate of its own."
        if "retention.gate.token_step" not in gate.needs():
            continue
        decay = context.mixer.retention.decay_gate
        if decay is None or not hasattr(decay, "token_step"):
            yield (
                tuple(path.split(".")),
                f"{gate.kind} is the token step of a decay such as 'ssd'; the retention's gate has none.",
            )


def _gate_ranges(context: Context) -> Iterator[Finding]:
    for path, gate in fitting.every_gate(context.mixer):
        low, high = _range(context.mixer, gate)
        where = tuple(path.split("."))
        if (path in FRACTIONS or path.endswith(".bound")) and not (low >= 0 and high <= 1):
            yield where, f"keeps a fraction in [0, 1], and {gate.kind} ranges over [{low:g}, {high:g}]; use sigmoid."
        if gate.keeps is not None and path != "retention.gate":
            yield where, f"{gate.kind} is a decay, by all tokens so far: write it as the retention's gate."
        if path == "retention.gate" and (high <= 0 <= low or _starts_at_zero(context.mixer, gate)):
            yield where, "a decay of 0 keeps nothing, and its logarithm does not exist; use a positive fraction."
        if (path in NON_NEGATIVE or path.endswith(".step")) and low < 0:
            yield where, f"must not be negative, and {gate.kind} ranges over [{low:g}, {high:g}]; use softplus."


def _starts_at_zero(mixer: MemoryMixer, gate: Gate) -> bool:
    """Whether a gate is exactly zero in its first layer, by itself or by a factor or name of it."""
    inner = [part for name, part in gates_of(gate) if name in gate.factors]
    named = [mixer.gates[need.removeprefix("gates.")] for need in gate.needs() if need.startswith("gates.")]
    return gate.starts_at_zero or any(_starts_at_zero(mixer, part) for part in (*inner, *named))


def _bias_gates(context: Context) -> Iterator[Finding]:
    for path, gate in context.mixer.named_gates():
        if not path.startswith("bias."):
            continue
        granularity = _granularity(context.mixer, gate)
        form = getattr(context.mixer.bias, "form", None)
        if granularity == "value" and form in ("norm", "mixture"):
            yield (
                tuple(path.split(".")),
                f"form {form} compares the threshold with a norm over the channels, so it is one number a head; "
                "use per head, or form 'coordinate'.",
            )
        elif path == "bias.read_key.scale" and granularity not in ("head", "key"):
            yield tuple(path.split(".")), f"a key has key channels; found per {granularity}: use head or key."
        elif granularity not in ("head", "value") and path in ("bias.threshold", "bias.weights"):
            yield tuple(path.split(".")), f"an error has one entry a value channel; found per {granularity}."


def _write_and_erase(context: Context) -> Iterator[Finding]:
    bias, update = context.mixer.bias, context.mixer.update
    if update.write_size is not None and bias.error == "nonlinear":
        yield (
            ("update", "write_size"),
            f"a write strength of its own needs an error that is linear in the value; found bias {bias.kind}: "
            "use l2 or dot, or remove it.",
        )
    if bias.erase_key == "read_key" and (bias.error != "residual" or bias.read_key is None):
        yield ("bias", "erase_key"), "erasing with the read key needs bias l2 and a 'read_key'."


def _memory_shape(context: Context) -> Iterator[Finding]:
    memory, dims = context.mixer.memory, context.dims
    if getattr(memory, "residual", False) and dims.key_dim != dims.value_dim:
        yield (
            ("memory", "residual"),
            f"x + f(x) needs key_dim = value_dim; found {dims.key_dim} and {dims.value_dim}.",
        )


def _anchor(context: Context) -> Iterator[Finding]:
    mixer, anchor = context.mixer, context.mixer.update.anchor
    if anchor is None:
        return
    where = ("update", "anchor")
    if anchor.reduce == "mean" and (mixer.update.kind != "gradient_descent" or mixer.retention.kind != "none"):
        yield (
            (*where, "reduce"),
            "a mean over the chunk's steps is defined for gradient_descent without retention; use 'sum'.",
        )
    if anchor.reduce == "mean" and (anchor.lag or mixer.bias.window is not None):
        yield (*where, "reduce"), "a mean is over the steps of one chunk from its start: without lag and window."
    if anchor.link == "anchor" and not mixer.retention.has_link:
        yield (*where, "link"), f"retention {mixer.retention.kind} has no link to apply at anchors; remove it."
    if anchor.link == "anchor" and getattr(mixer.retention, "form", None) == "proximal":
        yield (*where, "link"), "the proximal form thresholds the weights at every token; use form 'ftrl'."


def _pairs(context: Context) -> Iterator[Finding]:
    """A complex decay acts on pairs of a matrix's channels."""
    mixer, retention, dims = context.mixer, context.mixer.retention, context.dims
    if not retention.turns:
        return
    pairs = getattr(retention, "pairs", "key")
    size = dims.key_dim if pairs == "key" else dims.value_dim
    if size % 2:
        yield ("retention", "pairs"), f"pairs need an even {pairs}_dim; found {size}."
    if mixer.memory.kind != "matrix" or getattr(mixer.memory, "normalizer", None) is not None:
        yield ("retention",), f"{retention.kind} turns pairs of a plain matrix's channels; use memory matrix, or decay."
    if mixer.update.kind == "conjugate_gradient":
        yield ("retention",), "conjugate_gradient solves for real statistics that only fade; use decay."
    if mixer.update.kind == "implicit" and getattr(retention, "discretization", "exact") != "exact":
        message = "the implicit step minimises its objective as it is; a factor on it would not: use exact."
        yield ("retention", "discretization"), message
    if mixer.update.kind == "implicit" and getattr(mixer.update, "diagonal", False):
        yield ("retention",), "the diagonal step treats every state alone, and here states come in pairs; use decay."


def _links(context: Context) -> Iterator[Finding]:
    mixer, retention = context.mixer, context.mixer.retention
    memory, gate = mixer.memory, mixer.retention.decay_gate
    if not retention.has_link or memory.grows:
        return
    if getattr(memory, "normalizer", None) is not None:
        yield ("retention",), f"a sum of keys is no normaliser of weights behind the link {retention.kind}; use decay."
    started = memory.initial(context.dims)
    missing = [name for name in memory.weights(context.dims) if name not in started or started[name].law.is_zero]
    if retention.needs_start and missing:
        remedy = "write 'initial: learned'" if hasattr(memory, "initial_") else "start it from a law, or leave it out"
        yield (
            ("retention",),
            f"{retention.kind} has no value at zero weights, and {', '.join(missing)} of memory {memory.kind} "
            f"starts at zero; {remedy}.",
        )
    over = getattr(retention, "over", None)
    if over is not None and gate is not None:
        granularity = _granularity(mixer, gate)
        if any(memory.axis(name, granularity) in (over, "both") for name in memory.weights(context.dims)):
            yield (
                ("retention", "gate"),
                f"a decay that varies within a slice (per {granularity}, slices over the {over}) is not the printed "
                "rule; use per head, or the other axis.",
            )


def _special_updates(context: Context) -> Iterator[Finding]:
    """Rules that are defined for a matrix under l2, one token at a time."""
    mixer, update, bias = context.mixer, context.mixer.update, context.mixer.bias
    if mixer.memory.grows:
        return
    where = ("update",)
    if update.kind in ("implicit", "conjugate_gradient"):
        if mixer.memory.kind != "matrix" or bias.error != "residual":
            yield where, f"{update.kind} solves linear regression: it needs memory matrix and bias l2."
        if mixer.retention.has_link:
            yield ("retention",), f"{update.kind} solves for the weights themselves; use none or decay."
    if update.kind in ("implicit", "conjugate_gradient", "multi_step", "muon"):
        for name, found in (("write_size", update.write_size), ("window", bias.window)):
            if found is not None and not (update.kind == "muon" and name == "window"):
                place = ("update", name) if name == "write_size" else ("bias", name)
                yield place, f"{update.kind} takes whole steps of one loss; remove {name}."
        if bias.read_key is not None:
            yield ("bias", "read_key"), f"{update.kind} reads and writes with one key; remove it."
    if update.kind in ("implicit", "conjugate_gradient", "multi_step") and update.anchor is not None:
        yield ("update", "anchor"), f"{update.kind} needs the current weights at every step; use 'token'."
    if update.kind == "multi_step" and mixer.retention.order == "together" and mixer.retention.kind != "none":
        yield ("retention", "order"), "with several steps a token the decay comes before or after them all."
    if update.kind == "conjugate_gradient":
        yield from _solving(context)


def _solving(context: Context) -> Iterator[Finding]:
    mixer = context.mixer
    for path, gate in mixer.named_gates():
        granularity = _granularity(mixer, gate)
        if path in ("retention.gate", "update.step_size") and granularity != "head":
            yield tuple(path.split(".")), "both statistics must fade and grow alike; use per head."
        if path == "update.ridge":
            if granularity not in ("head", "key"):
                yield ("update", "ridge"), f"a ridge is on key channels; found per {granularity}."
            if _range(mixer, gate)[0] < 0:
                yield ("update", "ridge"), f"must not be negative, and {gate.kind} can be; use softplus."
    if getattr(mixer.memory, "initial_", "zero") != "zero" or mixer.readout.read != "after":
        yield ("memory",), "the statistics of a regression start at zero and are read after the token."


def _windows(context: Context) -> Iterator[Finding]:
    mixer, window = context.mixer, context.mixer.bias.window
    if window is None:
        return
    if mixer.memory.grows:
        yield ("bias", "window"), "a memory of tokens has its own window: write it under 'memory'."
    if mixer.update.write_size is not None or mixer.bias.erase_key != "key":
        yield ("bias", "window"), "a windowed loss is written with one key and one strength; remove the others."
    if window.weights is not None:
        if _granularity(mixer, window.weights) != "head":
            yield ("bias", "window", "weights"), "a token's loss has one weight a head."
        if _range(mixer, window.weights)[0] < 0:
            yield ("bias", "window", "weights"), "must not be negative; use sigmoid or softplus."


def _readout(context: Context) -> Iterator[Finding]:
    for path, gate in context.mixer.named_gates():
        if path in ("readout.gate", "readout.skip.gate") and _granularity(context.mixer, gate) not in ("head", "value"):
            yield tuple(path.split(".")), f"a read-out has value channels; found per {gate.per}: use head or value."
        if path == "readout.correction" and _granularity(context.mixer, gate) not in ("head", "key"):
            yield tuple(path.split(".")), f"a query has key channels; found per {gate.per}: use head or key."


def _fitting(context: Context) -> Iterator[Finding]:
    yield from fitting.check(context.mixer, context.projected, context.dims)


RULES: tuple[Rule, ...] = (
    _memory_and_update,
    _statistics,
    _normalizer,
    _gate_axes,
    _token_step,
    _gate_ranges,
    _bias_gates,
    _write_and_erase,
    _memory_shape,
    _anchor,
    _links,
    _pairs,
    _special_updates,
    _windows,
    _fitting,
    _readout,
)
