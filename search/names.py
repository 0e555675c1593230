"""Names shared by search files, records and reports: figures, and objectives with their directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Direction = Literal["maximize", "minimize"]

# Predicted without building the model; the direction is the one a user wants unless told otherwise.
FIGURES: dict[str, Direction] = {
    "parameters": "minimize",
    "non_embedding_parameters": "minimize",
    "flops_per_token": "minimize",
    "state_bytes": "minimize",
}

# Measured on the compiled module; see ``cost``.
COSTS: dict[str, Direction] = {
    "train_step_ms": "minimize",
    "prefill_ms": "minimize",
    "decode_ms_per_token": "minimize",
    "peak_memory_bytes": "minimize",
}


@dataclass(frozen=True)
class Objective:
    """One axis of the Pareto front.

    Fields:
        name: unique among the objectives; the metric's own name unless it stands for several lengths.
        metric: ``<task>/<score>``, a predicted figure, a measured cost or a training-free metric.
        direction: which way is better.
        reference: the hypervolume's reference point on this axis, fixed in the search file; None without one.
        at_length, dtype: the sequence length and number type that ``state_bytes`` is for.
    """

    name: str
    metric: str
    direction: Direction
    reference: float | None = None
    at_length: int | None = None
    dtype: str | None = None

    @classmethod
    def from_dict(cls, item: Mapping[str, Any]) -> Objective:
        """Return the objective of a plain mapping."""
        return cls(**item)

    def as_dict(self) -> dict[str, Any]:
        """Return the plain mapping."""
        return asdict(self)

    def loss(self, value: float) -> float:
        """Return the value oriented so that less is better."""
        return value if self.direction == "minimize" else -value
