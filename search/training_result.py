"""What a training evaluation found: plain records that survive JSON unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from pydantic import BaseModel, ConfigDict

from archspec.search.intervals import t_interval


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CurvePoint(_Record):
    """One evaluation: tokens seen, mean training loss in nats since the last one, primary validation score."""

    tokens: int
    train_loss: float
    validation: float


class RunResult(_Record):
    """One run of one seed. ``best_step`` counts finished steps; scores are those of the model at that step."""

    seed: int
    learning_rate: float
    curve: tuple[CurvePoint, ...]
    best_step: int
    best_tokens: int
    validation: dict[str, float]
    test: dict[str, float]
    tokens: int
    wall_s: float
    tokens_per_s: float


class SweepPoint(_Record):
    """One rate of the sweep: its best validation score, or the (step, loss, limit) at which it diverged, and why."""

    learning_rate: float
    tokens: int
    validation: float | None
    diverged: tuple[int, float, float] | None = None
    cause: str = ""


class TrainingResult(_Record):
    """A whole training evaluation: the sweep, then one run per seed."""

    task: str
    primary: str
    budget_tokens: int
    device: str
    sweep: tuple[SweepPoint, ...]
    runs: tuple[RunResult, ...]
    wall_s: float

    @property
    def learning_rate(self) -> float:
        """The peak rate that the full runs used."""
        return self.runs[0].learning_rate

    @property
    def validation(self) -> dict[str, float]:
        """Every validation score, averaged over seeds."""
        return _mean([run.validation for run in self.runs])

    @property
    def test(self) -> dict[str, float]:
        """Every test score, averaged over seeds."""
        return _mean([run.test for run in self.runs])

    @property
    def test_interval(self) -> dict[str, tuple[float, float] | None]:
        """The 95% t-interval of every mean test score over seeds; None for a single seed."""
        return {name: t_interval([run.test[name] for run in self.runs]) for name in self.runs[0].test}

    @property
    def tokens(self) -> int:
        """Training tokens spent in all, the sweep included."""
        return sum(run.tokens for run in self.runs) + sum(point.tokens for point in self.sweep)

    @property
    def tokens_per_s(self) -> float:
        """Training tokens per second of training, evaluations excluded, over the full runs."""
        return sum(run.tokens for run in self.runs) / sum(run.tokens / run.tokens_per_s for run in self.runs)


def _mean(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(run[name] for run in scores) for name in scores[0]}
