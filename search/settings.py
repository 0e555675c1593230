"""What a search file says besides its space: tasks, recipe, constraints, objectives, ladder, baselines, sampler.

study: quickstart
seed: 0
space: {extends: gated_deltanet, model_dim: {choice: [48, 64]}}     # see ``space``
variables: {head_dim: {choice: [16, 32]}}
fit: {vary: blocks.main.feed_forward.expansion, metric: non_embedding_parameters, target: 90_000}
context: 256
tasks: {recall: {kind: recall, vocab_size: 64}, text: {kind: text, sequence_length: 128}}
training: {learning_rates: [4e-3], batch_size: 16}
constraints: {non_embedding_parameters: {max: 100_000}, state_bytes: {max: 200_000, at_length: 256}}
objectives:
  - {metric: recall/accuracy, reference: 0.0}
  - {metric: state_bytes, at_length: 2048, reference: 1_000_000}
ladder:
  - {rung: training_free, candidates: 48, promote: {count: 8, by: [recall_at_init, memory_capacity], random: 4}}
  - {rung: short_train, tokens: 200_000}
baselines: [transformer]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from archspec.component import Count, Flag, Integer, Number, Positive, StrictModel, Text
from archspec.search.families import Task
from archspec.search.names import Direction
from archspec.search.recipe import Recipe
from archspec.search.resources import Resources
from archspec.search.rungs import Promote as Promote
from archspec.search.rungs import Rung as Rung

KnownPoint = Literal["base"] | dict[str, Any]
StateDtype = Literal["float32", "bfloat16", "float16", "float64"]
FigureName = Literal["parameters", "non_embedding_parameters", "flops_per_token"]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _folder_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        raise PydanticCustomError(
            "study",
            "found {found}; required: a folder's name of letters, digits, dots, dashes and underscores.",
            {"found": repr(value)},
        )
    return value


class Fit(StrictModel):
    """Solve one value of every candidate so that a figure meets a target: search at equal size.

    Args:
        vary: document path of the value, or several that get the same value.
        metric: the figure; ``target`` what it should be; ``tolerance`` the relative error allowed.
        multiple_of: a whole number is solved in steps of this (a width that heads must divide).
    """

    vary: Annotated[tuple[Text, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    metric: FigureName = "non_embedding_parameters"
    target: Positive
    tolerance: Positive = 0.02
    multiple_of: Count = 1


class Bounds(StrictModel):
    """An interval that a figure must lie in."""

    min: Number | None = None
    max: Number | None = None

    @model_validator(mode="after")
    def _is_an_interval(self) -> Self:
        if self.min is None and self.max is None:
            raise PydanticCustomError("bounds", "says neither 'min' nor 'max'.")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise PydanticCustomError(
                "bounds", "min {low} is above max {high}.", {"low": f"{self.min:g}", "high": f"{self.max:g}"}
            )
        return self


class StateBounds(Bounds):
    """Bounds on the decoding state of one sequence after ``at_length`` tokens (default: ``context``)."""

    at_length: Count | None = None
    dtype: StateDtype = "float32"


class Constraints(StrictModel):
    """What a candidate must satisfy before anything of it is built.

    Args:
        families: the rule families its mixers may be lowered to.
        layers: number of layers.
    """

    parameters: Bounds | None = None
    non_embedding_parameters: Bounds | None = None
    flops_per_token: Bounds | None = None
    state_bytes: StateBounds | None = None
    layers: Bounds | None = None
    families: tuple[Text, ...] | None = None


class ObjectiveSetting(StrictModel):
    """One axis of the front.

    Args:
        metric: ``<task>/<score>``, a predicted figure (``state_bytes``, ...), a measured cost
            (``decode_ms_per_token``, ...) or a training-free metric.
        direction: which way is better; known for everything but a metric of unknown sign.
        reference: the hypervolume's reference point on this axis.
        at_length, dtype: what ``state_bytes`` is for.
    """

    metric: Text
    direction: Direction | None = None
    reference: Number | None = None
    at_length: Count | None = None
    dtype: StateDtype | None = None


class Baseline(StrictModel):
    """A known architecture that runs first, beside the candidates.

    Args:
        spec: a shipped name, a file or a mapping.
        name: what it is called; default: the spec's name.
        resize: solve its width for the base's number of non-embedding parameters.
        budget: non-embedding parameters to aim at; default: ``fit.target``, else those of the space's first draw.
    """

    spec: Text | dict[str, Any]
    name: Text | None = None
    resize: Flag = True
    budget: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"spec": value} if isinstance(value, str) else value


class Sampler(StrictModel):
    """Who proposes: one of Optuna's samplers by name (``tpe``, ``nsga2``, ``gp``, ``qmc``), or the search's own.

    ``random`` draws uniformly, ``qmc`` takes a quasi-random (scrambled Sobol) sequence, ``evolution`` crosses and
    mutates the best finished trials.

    Args:
        startup: trials before ``tpe``, ``gp`` and ``evolution`` leave random sampling; ``tpe`` and ``gp`` count
            finished ones, ``evolution`` proposed ones.
        population: size of a generation of ``nsga2``; how many of the best are parents in ``evolution``.
    """

    kind: Literal["tpe", "random", "qmc", "nsga2", "gp", "evolution"] = "tpe"
    startup: Count = 10
    population: Annotated[Count, Field(ge=2)] = 50

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


class Recheck(StrictModel):
    """Score the front's members again, on seeds that the search has not used, before the front is called final.

    Args:
        seeds: runs per task; at least two, since one says nothing about its spread.

    A bare number is ``seeds``.
    """

    seeds: Annotated[Count, Field(ge=2)]

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"seeds": value} if isinstance(value, int) and not isinstance(value, bool) else value


class CostSetting(StrictModel):
    """How the trained candidates are timed; sizes default to the first task's and the recipe's."""

    measure: Flag = True
    batch_size: Count | None = None
    sequence_length: Count | None = None
    repeats: Annotated[Count, Field(ge=3)] = 5
    limit_s: Positive = 1.0


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    if not parts.scheme or "://" not in url:
        raise PydanticCustomError(
            "storage", "found {found}; required: a database's URL, such as postgresql://user@host/name.", {"found": url}
        )
    if parts.password:
        raise PydanticCustomError(
            "storage",
            "the URL holds a password, which the run's folder would keep in plain text; leave it out, and set "
            "PGPASSWORD or write ~/.pgpass.",
            {},
        )
    return url


class StorageSetting(StrictModel):
    """Where the study is kept.

    Args:
        url: a database's, as SQLAlchemy writes it, without a password: ``postgresql://user@host/name``,
            ``sqlite:////absolute/path.db``.
    """

    url: Annotated[Text, AfterValidator(_without_password)]


class Settings(StrictModel):
    """A search file without its space.

    Args:
        study: name of the run's folder; letters, digits, dots, dashes and underscores.
        context: tokens at which ``state_bytes`` and FLOPs are predicted where nothing else is said.
        soft_constraints: bounds on objectives' metrics once they are measured. A trial outside keeps its scores, but
            the sampler is told by how much it is outside, and it stands on no front.
        cache: a folder of results shared across studies, or ``user`` for the user's cache directory; see ``shared``.
        known: points of the space that are proposed first, whoever samples: ``base`` (every node at its first option
            or lower end), or a mapping from parameter to value over the base. ``evolution`` starts from the base
            unless told otherwise.
        repair: how often a draw that breaks a rule or a constraint is tried again with one value changed, before the
            sampler is asked for another.
        recheck: whether, and on how many fresh seeds, the front's members are scored again at the end.
        trials: distinct feasible draws in all; default: one round of the ladder.
        asynchronous: promote each candidate as soon as it finishes a rung, and draw another whenever a worker is
            free, instead of climbing in rounds; see ``ladder``.
        timeout_s: seconds after which a run stops, to be continued by the same command.
        evaluation_timeout_s: seconds after which one evaluation is recorded as failed.
        workers: worker processes; default: one per core, or per GPU.
        device: where candidates run, ``cpu`` or ``cuda``.
        keep_weights: keep the trained weights of every trained candidate.
        storage: a database for the Optuna study; default: a journal in the run's folder.
        resources: what one trial takes of a machine; default: one core, or one GPU.
    """

    study: Annotated[Text, AfterValidator(_folder_name)]
    seed: Annotated[Integer, Field(ge=0)] = 0
    space: Any
    variables: Any = None
    fit: Fit | None = None
    context: Count = 2048
    tasks: dict[Text, Task] = Field(min_length=1)
    training: Recipe = Field(default_factory=Recipe)
    constraints: Constraints = Field(default_factory=Constraints)
    objectives: tuple[ObjectiveSetting, ...]
    ladder: tuple[Rung, ...]
    baselines: tuple[Baseline, ...] = ()
    sampler: Annotated[Sampler, BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value)] = (
        Field(default_factory=Sampler)
    )
    soft_constraints: dict[Text, Bounds] = Field(default_factory=dict)
    cache: Text | None = None
    known: tuple[KnownPoint, ...] = ()
    repair: Annotated[Integer, Field(ge=0)] = 0
    cost: CostSetting = Field(default_factory=CostSetting)
    recheck: Recheck | None = None
    trials: Count | None = None
    asynchronous: Flag = False
    timeout_s: Positive | None = None
    evaluation_timeout_s: Positive | None = None
    workers: Count | None = None
    device: Text = "cpu"
    keep_weights: Flag = True
    storage: Annotated[
        StorageSetting | None, BeforeValidator(lambda value: {"url": value} if isinstance(value, str) else value)
    ] = None
    resources: Resources | None = None

    def tokens_of(self, rung: Rung, task: str) -> int:
        """Return the training tokens of a task on a rung."""
        tokens = rung.tokens or 0
        return tokens[task] if isinstance(tokens, dict) else tokens

    @property
    def candidates(self) -> int:
        """Distinct feasible draws of one round of the ladder."""
        return self.ladder[0].candidates or self.trials or 1

    @property
    def score_directions(self) -> dict[str, Direction]:
        """``<task>/<score>`` -> direction, for every task by the name it has here."""
        return {
            score_name(name, score): direction
            for name, task in self.tasks.items()
            for score, direction in task.scores.items()
        }

    @property
    def primary_scores(self) -> tuple[str, ...]:
        """Each task's primary score."""
        return tuple(score_name(name, task.primary) for name, task in self.tasks.items())

    @property
    def vocab_size(self) -> int:
        """The largest vocabulary of the tasks."""
        return max(task.vocab_size for task in self.tasks.values())


def score_name(task_name: str, score: str) -> str:
    """Return a score's name in this search: the task's own name for it, under the name the task has here."""
    return f"{task_name}/{score.partition('/')[2] or score}"


def directions_of(rung: Rung) -> Mapping[str, Direction]:
    """Return kind -> direction of a rung's training-free metrics."""
    return {metric.kind: metric.direction for metric in rung.metrics or ()}
