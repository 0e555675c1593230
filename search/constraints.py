"""What is predicted of a candidate before anything is built, and which hard constraints it breaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from archspec import complexity, lowering
from archspec.complexity import Complexity
from archspec.lowering import Plan
from archspec.schema import Spec
from archspec.search.names import Objective
from archspec.search.settings import Bounds, Settings, StateBounds


@dataclass(frozen=True)
class Forecast:
    """A candidate's predicted figures and the way it would run.

    Fields:
        figures: name -> value; ``state_bytes`` at the file's context, and one entry per objective that says a length.
        plan: family, form and kernel of every mixer.
    """

    figures: dict[str, float]
    plan: Plan


@dataclass(frozen=True)
class Violation:
    """A constraint that is broken: its name, by how much (relative to the bound), and a sentence."""

    constraint: str
    excess: float
    reason: str


def forecast(spec: Spec, settings: Settings, objectives: tuple[Objective, ...] = ()) -> Forecast:
    """Return the predicted figures and plan of a legal spec."""
    predicted = complexity.predict(spec, settings.vocab_size, settings.context)
    figures: dict[str, float] = {
        "parameters": predicted.parameters,
        "non_embedding_parameters": predicted.non_embedding_parameters,
        "flops_per_token": predicted.flops_per_token,
        "state_bytes": predicted.state_bytes(settings.context),
        "state_size": predicted.state_bytes(settings.context, "float32") // 4,
        "layers": len(list(spec.layout.names())),
    }
    for objective in objectives:
        if objective.metric == "state_bytes" and objective.at_length is not None:
            figures[objective.name] = predicted.state_bytes(objective.at_length, objective.dtype or "float32")
    bounds = settings.constraints.state_bytes
    if bounds is not None:
        figures[state_bound_name(bounds, settings)] = _bounded_state(predicted, bounds, settings)
    return Forecast(figures, lowering.plan(spec, settings.device.partition(":")[0]))


def violations(found: Forecast, settings: Settings) -> Iterator[Violation]:
    """Yield every constraint that a candidate breaks."""
    limits = settings.constraints
    for name in ("parameters", "non_embedding_parameters", "flops_per_token", "layers"):
        yield from _outside(name, found.figures[name], getattr(limits, name))
    if limits.state_bytes is not None:
        name = state_bound_name(limits.state_bytes, settings)
        yield from _outside("state_bytes", found.figures[name], limits.state_bytes)
    foreign = [family for family in found.plan.families() if limits.families and family not in limits.families]
    if foreign:
        yield Violation(
            "families",
            float(len(foreign)),
            f"a mixer is lowered to {', '.join(foreign)}; allowed: {', '.join(limits.families or ())}",
        )


def state_bound_name(bounds: StateBounds, settings: Settings) -> str:
    """Return the figure that a bound on the state is about."""
    return f"state_bytes@{bounds.at_length or settings.context}:{bounds.dtype}"


def _bounded_state(predicted: Complexity, bounds: StateBounds, settings: Settings) -> int:
    return predicted.state_bytes(bounds.at_length or settings.context, bounds.dtype)


def _outside(name: str, value: float, bounds: Bounds | None) -> Iterator[Violation]:
    if bounds is None:
        return
    if bounds.max is not None and value > bounds.max:
        excess = (value - bounds.max) / max(1.0, abs(bounds.max))
        yield Violation(name, excess, f"{name} is {value:,.0f}, over the maximum {bounds.max:,.0f}")
    if bounds.min is not None and value < bounds.min:
        excess = (bounds.min - value) / max(1.0, abs(bounds.min))
        yield Violation(name, excess, f"{name} is {value:,.0f}, under the minimum {bounds.min:,.0f}")
