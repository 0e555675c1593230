"""What a memory can be combined with: updates, biases, retentions and their links."""

from __future__ import annotations

from collections.abc import Iterator

from archspec.composition import Finding
from archspec.legality.context import Context, Rule, granularity_of, value_range


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
    if memory.grows and gate is not None and granularity_of(mixer, gate) != "head":
        yield ("retention", "gate"), "a memory of tokens fades per head: its softmax has one weight a token."


def _statistics(context: Context) -> Iterator[Finding]:
    """Running statistics stand for the tokens only where every reader gives these the same scores."""
    mixer, memory = context.mixer, context.mixer.memory
    if getattr(memory, "cache", "tokens") != "statistics":
        return
    where = ("memory", "cache")
    query = mixer.projection("query")
    placed = query.position is not None and not query.position.on_scores
    reads = "a position" if placed else "the first layer" if query.blend is not None else None
    if query.has_source or reads or mixer.readout.correction is not None:
        found = "the token" if query.has_source else reads or "a key (readout.correction)"
        yield (
            where,
            f"statistics need one query for all tokens, and it reads {found}; use 'tokens', or query 'learned'.",
        )
    for place in (("memory", "top_k"), ("update", "fit")):
        if getattr(getattr(mixer, place[0]), place[1], None) is not None:
            yield place, "statistics hold no token to weigh again for a query; remove it, or use cache 'tokens'."
    if getattr(memory, "window", None) is not None:
        yield where, "what leaves a window cannot be taken out of a sum; remove 'window', or use 'tokens'."
    faded = query.position is not None and query.position.on_scores
    if mixer.retention.decay_gate is not None or faded:
        yield where, f"statistics do not fade; remove the {'position' if faded else 'decay'}, or use 'tokens'."


def _score_positions(context: Context) -> Iterator[Finding]:
    """A position on scores is of queries and keys together, and of a memory that has scores."""
    mixer = context.mixer
    projections = {name: mixer.projection(name) for name in ("query", "key")}  # type: ignore[arg-type]
    found = {
        name: projection.position
        for name, projection in projections.items()
        if projection.position is not None and projection.position.on_scores
    }
    for name, projection in projections.items():
        for index, part in enumerate(projection.parts):
            if part.position is not None and part.position.on_scores:
                where = (name, "parts", index, "position")
                yield where, f"{part.position.kind} acts on scores, of whole queries and keys; write it beside 'parts'."
    for name, position in found.items():
        if not mixer.memory.grows:
            yield (
                (name, "position"),
                f"{position.kind} acts on the scores of stored tokens, and memory {mixer.memory.kind} has none; "
                f"write retention {{kind: decay, gate: {position.kind}}}.",
            )
        elif len(found) == 1:
            yield (
                (name, "position"),
                f"{position.kind} acts on scores, of queries and keys: write it under 'qk'.",
            )


def _keyless(context: Context) -> Iterator[Finding]:
    """Without keys there is nothing to project to them."""
    mixer = context.mixer
    if not mixer.memory.keyless:
        return
    for name in mixer.departures(("qk", "query", "key", "key_dim")):
        yield (name,), f"memory {mixer.memory.kind} is written and read as a whole: remove {name!r}, or use 'matrix'."


def _stored(context: Context) -> Iterator[Finding]:
    """What a memory of tokens can be read by."""
    mixer = context.mixer
    if mixer.memory.grows and mixer.readout.read == "before":
        yield ("readout", "read"), "the first token would read a memory of no tokens; use 'after'."
    for path, gate in mixer.named_gates():
        if path != "update.fit.ridge":
            continue
        where, (low, high) = tuple(path.split(".")), value_range(mixer, gate)
        if granularity_of(mixer, gate) not in ("head", "key"):
            yield where, f"a ridge is on key channels; found per {granularity_of(mixer, gate)}: use head or key."
        if low < 0 or high <= 0:
            yield where, f"must be positive, and {gate.kind} ranges over [{low:g}, {high:g}]; use softplus."


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
        if path.startswith(("retention.", "update.")) and granularity_of(context.mixer, gate) in ("value", "state"):
            yield (
                tuple(path.split(".")),
                "with a normalizer, values and their normaliser must fade and grow alike; use per head or key.",
            )


def _memory_shape(context: Context) -> Iterator[Finding]:
    memory, dims = context.mixer.memory, context.dims
    if getattr(memory, "residual", False) and dims.key_dim != dims.value_dim:
        yield (
            ("memory", "residual"),
            f"x + f(x) needs key_dim = value_dim; found {dims.key_dim} and {dims.value_dim}.",
        )


def _pairs(context: Context) -> Iterator[Finding]:
    """A complex decay acts on pairs of a matrix's channels."""
    mixer, retention, dims = context.mixer, context.mixer.retention, context.dims
    if not retention.turns:
        return
    pairs = getattr(retention, "pairs", "key")
    size = dims.key_dim if pairs == "key" else dims.value_dim
    if size % 2:
        yield ("retention", "pairs"), f"pairs need an even {pairs}_dim; found {size}."
    if not mixer.memory.is_linear or getattr(mixer.memory, "normalizer", None) is not None:
        yield ("retention",), f"{retention.kind} turns pairs of a plain matrix's channels; use memory matrix, or decay."
    if mixer.update.kind == "conjugate_gradient":
        yield ("retention",), "conjugate_gradient solves for real statistics that only fade; use decay."
    if mixer.update.kind == "implicit" and getattr(retention, "gain", None) is not None:
        yield ("retention", "gain"), "the implicit step minimises its objective as it is; a factor on it would not."
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
        granularity = granularity_of(mixer, gate)
        if any(memory.axis(name, granularity) in (over, "both") for name in memory.weights(context.dims)):
            yield (
                ("retention", "gate"),
                f"a decay that varies within a slice (per {granularity}, slices over the {over}) is not the printed "
                "rule; use per head, or the other axis.",
            )


RULES: tuple[Rule, ...] = (
    _memory_and_update,
    _statistics,
    _score_positions,
    _keyless,
    _stored,
    _normalizer,
    _memory_shape,
    _pairs,
    _links,
)
