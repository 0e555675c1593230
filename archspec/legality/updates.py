"""What an update rule, its anchor and a windowed loss can be combined with."""

from __future__ import annotations

from collections.abc import Iterator

from archspec.composition import Finding
from archspec.legality.context import Context, Rule, granularity_of, value_range


def _write_and_erase(context: Context) -> Iterator[Finding]:
    bias, update = context.mixer.bias, context.mixer.update
    if update.write_size is not None and bias.error not in ("value", "residual"):
        yield (
            ("update", "write_size"),
            f"a write strength of its own needs an error that is linear in the value; found bias {bias.kind}: "
            "use l2 or dot, or remove it.",
        )
    if bias.erase_key == "read_key" and (bias.error != "residual" or bias.read_key is None):
        yield ("bias", "erase_key"), "erasing with the read key needs bias l2 and a 'read_key'."


def _anchor(context: Context) -> Iterator[Finding]:
    mixer, anchor = context.mixer, context.mixer.update.anchor
    if anchor is None:
        return
    where = ("update", "anchor")
    if anchor.reduce != "sum" and (mixer.update.kind != "gradient_descent" or mixer.retention.kind != "none"):
        yield (
            (*where, "reduce"),
            "a mean over the chunk's steps is defined for gradient_descent without retention; use 'sum'.",
        )
    if anchor.reduce != "sum" and (anchor.lag or mixer.bias.window is not None):
        yield (*where, "reduce"), "a mean is over the steps of one chunk from its start: without lag and window."
    if anchor.link == "anchor" and not mixer.retention.has_link:
        yield (*where, "link"), f"retention {mixer.retention.kind} has no link to apply at anchors; remove it."
    if anchor.link == "anchor" and getattr(mixer.retention, "form", None) == "proximal":
        yield (*where, "link"), "the proximal form thresholds the weights at every token; use form 'ftrl'."


def _special_updates(context: Context) -> Iterator[Finding]:
    """Rules that are defined for a matrix under l2, one token at a time."""
    mixer, update, bias = context.mixer, context.mixer.update, context.mixer.bias
    if mixer.memory.grows:
        return
    where = ("update",)
    if update.kind in ("implicit", "conjugate_gradient"):
        if not mixer.memory.is_linear or bias.error != "residual":
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
        granularity = granularity_of(mixer, gate)
        if path in ("retention.gate", "update.step_size") and granularity != "head":
            yield tuple(path.split(".")), "both statistics must fade and grow alike; use per head."
        if path == "update.ridge":
            if granularity not in ("head", "key"):
                yield ("update", "ridge"), f"a ridge is on key channels; found per {granularity}."
            if value_range(mixer, gate)[0] < 0:
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
        if granularity_of(mixer, window.weights) != "head":
            yield ("bias", "window", "weights"), "a token's loss has one weight a head."
        if value_range(mixer, window.weights)[0] < 0:
            yield ("bias", "window", "weights"), "must not be negative; use sigmoid or softplus."


RULES: tuple[Rule, ...] = (
    _write_and_erase,
    _anchor,
    _special_updates,
    _windows,
)
