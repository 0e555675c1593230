"""The four choices of every mixer of a spec, read from its plain mapping, so that no torch module is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from archspec.search.trial import Trial

# What tells two components of one kind apart at a glance; everything else is in the spec itself.
_TELLING = ("depth", "window", "top_k", "p", "q", "steps", "iterations")


@dataclass(frozen=True)
class Coordinates:
    """Where one mixer lies on the four axes, and in how many layers it stands.

    Args:
        where: the mixer's path, such as ``blocks.main.mixer``.
        num_layers: layers of the unrolled layout that apply it.
    """

    where: str
    num_layers: int
    memory: str
    bias: str
    retention: str
    update: str

    def line(self) -> str:
        """Return ``2x matrix / l2 / decay(ssd) / gradient_descent``."""
        return f"{self.num_layers}x {self.memory} / {self.bias} / {self.retention} / {self.update}"


def coordinates(spec: Mapping[str, Any]) -> list[Coordinates]:
    """Return the coordinates of the mixers that the layout uses, in the order of the blocks; short forms allowed."""
    layers = Counter(_names(spec.get("layout")))
    found = []
    for name, block in spec.get("blocks", {}).items():
        mixer = block.get("mixer") if isinstance(block, Mapping) else None
        if layers[name]:
            found += [_of(mixer, where, layers[name]) for where, mixer in _mixers(mixer, f"blocks.{name}.mixer")]
    return found


def mixers_of(trial: Trial) -> list[Coordinates]:
    """Return a trial's coordinates as the search noted them, or from its spec where an older search did not."""
    return [Coordinates(**item) for item in trial.mixers] if trial.mixers else coordinates(trial.spec)


def _of(mixer: Mapping[str, Any], where: str, num_layers: int) -> Coordinates:
    if "update" not in mixer:  # a cell lies outside the four axes
        return Coordinates(where, num_layers, str(mixer.get("kind")), "-", "-", "-")
    parts = {name: _named(mixer.get(name, default)) for name, default in (("memory", ""), ("bias", "l2"))}
    retention = _with_gate(mixer.get("retention") or "none")
    return Coordinates(where, num_layers, **parts, retention=retention, update=_anchored(mixer["update"]))


def _named(component: Any) -> str:
    if not isinstance(component, Mapping):
        return str(component)
    told = [f"{key}={component[key]}" for key in _TELLING if component.get(key) is not None]
    return " ".join([str(component.get("kind", "")), *told])


def _with_gate(retention: Any) -> str:
    gate = retention.get("gate") if isinstance(retention, Mapping) else None
    if gate is None:
        return _named(retention)
    kind = gate.get("kind") if isinstance(gate, Mapping) else gate
    grain = f"/{gate['per']}" if isinstance(gate, Mapping) and gate.get("per", "head") != "head" else ""
    return f"{_named(retention)}({kind}{grain})"


def _anchored(update: Any) -> str:
    anchor = update.get("anchor") if isinstance(update, Mapping) else None
    every = anchor.get("every") if isinstance(anchor, Mapping) else anchor
    return _named(update) + (f"@{every}" if every not in (None, "token") else "")


def _mixers(mixer: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the mixers that hold a memory, and cells; those that combine others are looked into."""
    if isinstance(mixer, Mapping):
        if ("memory" in mixer and "update" in mixer) or mixer.get("kind") == "cell":
            yield where, mixer
            return
        for name, inner in mixer.items():
            yield from _mixers(inner, f"{where}.{name}")
    elif isinstance(mixer, list):
        for index, inner in enumerate(mixer):
            yield from _mixers(inner, f"{where}.{index}")


def _names(layout: Any) -> list[str]:
    """Return the blocks' names in order of application."""
    if isinstance(layout, str):
        return [layout]
    if isinstance(layout, list):
        return [name for part in layout for name in _names(part)]
    if not isinstance(layout, Mapping):
        return []
    if layout.get("kind") == "block":
        return [layout["name"]]
    once = _names(layout.get("of"))
    if "cycle" in layout:
        return [once[index % len(once)] for index in range(int(layout["cycle"]))] if once else []
    return once * int(layout.get("repeat") or layout.get("loop") or 1)
