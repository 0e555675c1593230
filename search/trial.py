"""One architecture of a run, as its events and result files describe it. Imports neither torch nor optuna."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from archspec.errors import RunError
from archspec.yamltext import parse

State = Literal["rejected", "proposed", "evaluated", "trained", "failed"]
Origin = Literal["baseline", "sampled"]
PromotedBy = Literal["rank", "random"]


@dataclass
class Trial:
    """One architecture of a run.

    Fields:
        number: unique in the run, from 0, in the order of proposal; baselines come first.
        name: the baseline's name, or ``<study>-<number>``.
        origin: a named baseline or a draw from the space.
        state: ``rejected`` (never built; ``rule`` and ``reason`` say why), ``proposed`` (nothing measured yet),
            ``evaluated`` (training-free metrics known), ``trained`` (final scores known), ``failed`` (``reason``).
        promoted_by: how it came to the last rung it reached: by its rank, by lot (on every rung), or not at all.
        round: which pass over the ladder it belongs to; -1 for baselines.
        how: how its point was come by: ``known``, ``repair``, ``unseen``, ``chance`` or ``sampler``; see ``proposals``.
        excess: how far a rejected one is outside each constraint.
        coordinates: the values drawn, by the place in the search file where they are drawn.
        training_free: metric -> {mean, spread}, over initialisation seeds.
        scores: final score -> {mean, spread, interval, n} on the test split; n runs of different seeds.
        validation: the same on the validation split: what promotion and the sampler go by.
        rechecked: final score -> the same as ``scores``, from fresh seeds at the end; for front members, if asked.
        recheck_failed: why re-scoring failed; empty where it did not.
        low_fidelity: rung index -> score -> the same as ``validation``, for rungs below the last.
        cost: measured figure -> {median, p20, p80, ...}.
        figures: predicted without building: parameters, state_bytes, flops_per_token, ...
        families, kernels: rule families of its mixers, and distinct family/form names.
        mixers: where each mixer lies on the four axes, as ``report.coordinates`` has it; empty from older searches.
        note: what a reader must know, such as how a baseline was resized.
        started, finished: when its first evaluation was submitted and its last one ended; seconds of the epoch.
        wall_s: seconds spent on its evaluations.
        files: stage -> result file, relative to the run.
    """

    number: int
    name: str = ""
    hash: str = ""
    origin: Origin = "sampled"
    round: int = 0
    state: State = "proposed"
    rule: str = ""
    reason: str = ""
    promoted_by: PromotedBy | None = None
    how: str = ""
    excess: dict[str, float] = field(default_factory=dict)
    coordinates: dict[str, Any] = field(default_factory=dict)
    training_free: dict[str, dict[str, float]] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    validation: dict[str, dict[str, Any]] = field(default_factory=dict)
    rechecked: dict[str, dict[str, Any]] = field(default_factory=dict)
    recheck_failed: str = ""
    low_fidelity: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    families: list[str] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    mixers: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""
    started: float | None = None
    finished: float | None = None
    wall_s: float = 0.0
    files: dict[str, str] = field(default_factory=dict)
    folder: Path = field(default_factory=Path, repr=False)

    @property
    def parameters(self) -> int | None:
        """All parameters, embeddings for the largest vocabulary of the tasks included."""
        return _whole(self.figures.get("parameters"))

    @property
    def non_embedding_parameters(self) -> int | None:
        """Parameters without embeddings."""
        return _whole(self.figures.get("non_embedding_parameters"))

    @property
    def state_bytes(self) -> int | None:
        """Bytes of decoding state at the search file's ``context`` length, one sequence."""
        return _whole(self.figures.get("state_bytes"))

    @property
    def flops_per_token(self) -> float | None:
        """Forward FLOPs per token."""
        return self.figures.get("flops_per_token")

    def value(self, name: str) -> float | None:
        """Return a score, figure, measured cost or training-free metric by name; None when it is not known."""
        found: Any = None
        if name in self.scores:
            found = self.scores[name]["mean"]
        elif name in self.figures:
            found = self.figures[name]
        elif isinstance(self.cost.get(name), Mapping):
            found = self.cost[name]["median"]
        elif name in self.training_free:
            found = self.training_free[name]["mean"]
        return None if found is None else float(found)

    def spec_file(self) -> str:
        """The text of the spec as the search wrote it; empty where there is no such file."""
        path = self.folder / "specs" / f"{self.hash}.yaml"
        return path.read_text(encoding="utf-8") if self.state != "rejected" and path.is_file() else ""

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The whole spec as a plain mapping; empty for a rejected trial."""
        for stage in self.files:
            return dict(self.result(stage)["spec"])
        path = self.folder / "specs" / f"{self.hash}.yaml"
        if self.state == "rejected" or not path.is_file():
            return {}
        return dict(parse(path.read_bytes(), str(path)))

    @cached_property
    def curves(self) -> dict[str, list[dict[str, float]]]:
        """Task -> [{tokens, train_loss, score}], score on validation, from the last rung; the first seed's run."""
        stages = [stage for stage in self.files if "/train/" in stage]
        found = {}
        for stage in stages:  # later rungs overwrite earlier ones
            result = self.result(stage)
            if result["status"] == "ok":
                found[stage.split("/train/")[1]] = list(result["value"]["curve"])
        return found

    @cached_property
    def plan(self) -> list[dict[str, Any]]:
        """One entry per distinct mixer: {where, family, form, kernel, reason}."""
        for stage in self.files:
            return list(self.result(stage).get("plan", []))
        return []

    @property
    def weights(self) -> dict[str, Path]:
        """Task -> file of the trained weights, for those that were kept."""
        found = {}
        for stage, file in self.files.items():
            path = (self.folder / file).with_suffix(".safetensors")
            if "/train/" in stage and path.is_file():
                found[stage.split("/train/")[1]] = path
        return found

    def result(self, stage: str) -> dict[str, Any]:
        """Return the whole result file of a stage.

        Raises:
            RunError: when it is gone or cannot be read.
        """
        path = self.folder / self.files[stage]
        try:
            return dict(json.loads(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path}: a finished result cannot be read ({error}); restore it or start a new study"
            ) from error


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
