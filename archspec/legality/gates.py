"""What gates may vary over, and which values they may take, by where they stand."""

from __future__ import annotations

from collections.abc import Iterator

from archspec import fitting
from archspec.composition import Finding
from archspec.families import Gate, Per, gates_of, nested_gates
from archspec.legality.context import Context, Rule, granularity_of, value_range
from archspec.schema import MemoryMixer

NON_NEGATIVE = ("update.step_size", "bias.threshold", "bias.weights")
FRACTIONS = ("retention.gate", "update.momentum")


def _gate_axes(context: Context) -> Iterator[Finding]:
    memory = context.mixer.memory
    for path, gate in context.mixer.named_gates():
        if not path.startswith(("retention.", "update.")) or memory.grows:
            continue
        granularity = granularity_of(context.mixer, gate)
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


def _token_step(context: Context) -> Iterator[Finding]:
    for path, gate in fitting.every_gate(context.mixer):
        if "retention.gate" in gate.needs() and context.mixer.retention.decay_gate is None:
            yield tuple(path.split(".")), f"{gate.kind} follows the retention's decay, and nothing decays here."
        if "retention.gate" in gate.needs() and path.startswith("retention.gate."):
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
        low, high = value_range(context.mixer, gate)
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
        granularity = granularity_of(context.mixer, gate)
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


def _derived_key(context: Context) -> Iterator[Finding]:
    """A key made of the decay comes after it: the decay is there, fits the key's channels and reads no projection."""
    mixer, dims = context.mixer, context.dims
    for name in fitting.PROJECTIONS:
        projection = mixer.projection(name)  # type: ignore[arg-type]
        for index, part in enumerate(projection.parts):
            if part.derived is not None:
                yield (name, "parts", index), f"{part.kind} is of whole keys; write it as the key's kind."
        if projection.derived is None:
            continue
        where, gate = (name,), mixer.retention.decay_gate
        if name != "key":
            yield where, f"{projection.kind} is what the decay leaves for a key; write it under 'key'."
        elif gate is None:
            yield where, f"{projection.kind} is what the decay leaves for a key, and nothing decays here."
        elif granularity_of(mixer, gate) not in ("head", "key"):
            found = granularity_of(mixer, gate)
            yield where, f"a key has key channels, and the decay it is made of varies per {found}; use head or key."
        elif projection.heads not in (None, dims.num_heads) or dims.key_dim != context.projected.key_dim:
            yield where, "a key made of the decay has its channels, in every head; remove 'heads' or the feature map."
        elif mixer.update.steps_per_token > 1:
            yield where, f"a token has {mixer.update.steps_per_token} keys here, and one decay; use kind 'linear'."
        elif read := sorted(_read_by("retention.gate", mixer) & {*fitting.PROJECTIONS}):
            yield where, f"the decay it is made of reads the {read[0]}; let the decay read the input or a stream."


def _read_by(path: str, mixer: MemoryMixer) -> set[str]:
    """Return every stream and projection that a gate reads, by itself or through gates that it is derived from."""
    gates, found, queue, seen = dict(mixer.named_gates()), set[str](), [path], set[str]()
    while queue:
        place = queue.pop().removesuffix(".token_step")
        if place in seen or place not in gates:
            found |= {place} - seen
            continue
        seen.add(place)
        for gate in (gates[place], *(inner for _, inner in nested_gates(gates[place]))):
            queue += [*gate.needs(), *(gate.from_ if gate.has_source else ())]
    return found


def _readout(context: Context) -> Iterator[Finding]:
    for path, gate in context.mixer.named_gates():
        if path in ("readout.gate", "readout.skip.gate") and granularity_of(context.mixer, gate) not in (
            "head",
            "value",
        ):
            yield tuple(path.split(".")), f"a read-out has value channels; found per {gate.per}: use head or value."
        if path == "readout.correction" and granularity_of(context.mixer, gate) not in ("head", "key"):
            yield tuple(path.split(".")), f"a query has key channels; found per {gate.per}: use head or key."


def _summed(context: Context) -> Iterator[Finding]:
    """What scales the key in a sum over its channels stays on them."""
    for path, gate in fitting.every_gate(context.mixer):
        strength = getattr(gate, "strength", None)
        if not gate.sums_channels or strength is None:
            continue
        found = granularity_of(context.mixer, strength)
        if found not in ("head", "key"):
            place = (*path.split("."), "strength")
            yield place, f"it scales a key, which has key channels; found per {found}: use head or key."


RULES: tuple[Rule, ...] = (
    _gate_axes,
    _token_step,
    _gate_ranges,
    _bias_gates,
    _derived_key,
    _readout,
    _summed,
)
