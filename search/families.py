"""The two families the search adds to the catalogue: tasks to train on and metrics to judge without training.

A new task is one file in ``search/tasks/``, a new metric one file in ``search/metrics/``; both are found by
``archspec.catalog``. Letters: B batch, T time, D model dim, N pairs, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from archspec.component import Component, Count
from archspec.shapes import HeadDims

Split = Literal["train", "validation", "test"]
Direction = Literal["maximize", "minimize"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class ModelOutput(Protocol):
    """What a forward pass returns: logits [B, T, vocab] (``step``: [B, vocab]), the state, and a loss to add."""

    @property
    def logits(self) -> Tensor: ...
    @property
    def state(self) -> Any: ...
    @property
    def auxiliary_loss(self) -> Tensor | None: ...


class MemoryMixer(Protocol):
    """One memory of a model, open to direct writing and reading."""

    @property
    def dims(self) -> HeadDims: ...

    def associate(
        self,
        keys: Float[Tensor, "B N H K"],
        values: Float[Tensor, "B N H V"],
        queries: Float[Tensor, "B M H K"],
    ) -> Float[Tensor, "B M H V"]:
        """Write the pairs in order into a fresh memory, then read every query without writing."""
        ...


class SequenceModel(Protocol):
    """What training and metrics ask of a compiled model (an ``nn.Module``)."""

    def __call__(self, tokens: Int[Tensor, "B T"], state: Any = None) -> ModelOutput: ...
    def step(self, token: Int[Tensor, " B"], state: Any) -> ModelOutput: ...
    def initial_state(self, batch_size: int) -> Any: ...
    def features(self, tokens: Int[Tensor, "B T"]) -> Sequence[Float[Tensor, "B T D"]]: ...
    def memory_states(self, tokens: Int[Tensor, "B T"]) -> Sequence[Float[Tensor, "B n"]]: ...
    def memory_mixers(self) -> Sequence[MemoryMixer]: ...


ModelFactory = Callable[[int], nn.Module]
"""Build a freshly initialised model from a seed. Nothing about the model may be drawn before it is seeded."""


class Batch(NamedTuple):
    """Sequences to train or evaluate on.

    Fields:
        tokens: inputs [B, T], int64.
        targets: what to predict at each position [B, T], int64.
        weights: how much each position counts [B, T], float32; 0 where nothing is asked.
    """

    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    weights: Float[Tensor, "B T"]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def first(self, count: int) -> Batch:
        """Return the first ``count`` sequences, or all when there are fewer."""
        return Batch(*(tensor[:count] for tensor in self))


@dataclass(frozen=True)
class Tally:
    """Sums over the positions asked so far. Adding tallies pools positions, so that no batch weighs more."""

    loss_nats: float = 0.0
    correct: float = 0.0
    weight: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.loss_nats + other.loss_nats, self.correct + other.correct, self.weight + other.weight)


class Task(Component, family="task"):
    """A source of sequences with a score.

    Batches are pure functions of (task, split, seed, index, batch_size): the same arguments give the same bits in
    any process. The three splits never share a random stream, and evaluation always reads seed 0, so that models
    and seeds are compared on the same sequences.

    Class attributes:
        scores: every score's full name (``recall/accuracy``) with its direction; units are in the names.
        primary: the score that chooses steps and learning rates.
    """

    scores: ClassVar[Mapping[str, Direction]] = {}
    primary: ClassVar[str] = ""

    vocab_size: Count
    sequence_length: Count

    @abstractmethod
    def batch(self, split: Split, seed: int, index: int, batch_size: int) -> Batch:
        """Return batch number ``index`` of a split; the last one of a finite split may be smaller."""

    @abstractmethod
    def score(self, tally: Tally) -> dict[str, float]:
        """Return every score named in ``scores`` from the pooled sums."""

    def num_sequences(self, split: Split) -> int | None:
        """Return how many distinct evaluation sequences a split holds, or None when it can draw without end."""
        return None

    def prepare(self, folder: Path) -> Self:
        """Do the work that every process would repeat, keep it in ``folder``, and return the task that reads it."""
        return self

    def identity(self) -> dict[str, Any]:
        """Return what determines the task's data: the key for reusing results, free of paths."""
        return self.dump()

    def loss(self, logits: Float[Tensor, "B T vocab"], batch: Batch) -> Float[Tensor, ""]:
        """Return the mean cross-entropy in nats over the positions that count."""
        return (self._nats(logits, batch) * batch.weights).sum() / batch.weights.sum()

    def tally(self, logits: Float[Tensor, "B T vocab"], batch: Batch) -> Tally:
        """Return the sums of one evaluated batch."""
        correct = (logits.argmax(-1) == batch.targets).float()  # [B, T]
        return Tally(
            float((self._nats(logits, batch) * batch.weights).double().sum()),
            float((correct * batch.weights).double().sum()),
            float(batch.weights.double().sum()),
        )

    def better(self, score: float, than: float | None) -> bool:
        """Say whether one primary score beats another; anything beats None, nothing that is NaN beats."""
        if math.isnan(score) or than is None:
            return than is None and not math.isnan(score)
        return score > than if self.scores[self.primary] == "maximize" else score < than

    @staticmethod
    def _nats(logits: Tensor, batch: Batch) -> Tensor:
        nats = cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), reduction="none")
        return nats.view_as(batch.weights)  # [B, T]


@dataclass
class MetricContext:
    """What a metric may look at: models at initialisation, and what complexity predicts without building any.

    Args:
        make_model: builds the model from a seed.
        vocab_size: number of input symbols the model takes.
        figures: predicted figures by name (``non_embedding_parameters``, ``flops_per_token``, ``state_size`` ...).
        device: where models run; metrics always run in float32.
        seeds: the initialisation seeds; the spread is over them.
    """

    make_model: ModelFactory
    vocab_size: int
    figures: Mapping[str, float] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seeds: tuple[int, ...] = (0, 1, 2)
    _models: dict[int, Any] = field(default_factory=dict, repr=False)

    def model(self, seed: int) -> SequenceModel:
        """Return the model initialised from ``seed``, in float32 and in evaluation mode; built once."""
        if seed not in self._models:
            torch.manual_seed(seed)
            self._models[seed] = self.make_model(seed).to(self.device, torch.float32).eval()
        model: SequenceModel = self._models[seed]
        return model


class Metric(Component, family="metric"):
    """A figure of a model that needs no training.

    Class attributes:
        direction: which way is better, as far as is known.
    """

    direction: ClassVar[Direction] = "maximize"

    @abstractmethod
    def measure(self, context: MetricContext) -> dict[str, float]:
        """Return the metric under its own kind, and whatever else it reports under ``<kind>_<what>``."""


class SeededMetric(Metric):
    """A metric of one initialised model: reported as the mean over the context's seeds, beside its spread."""

    @abstractmethod
    def of_model(self, model: SequenceModel, context: MetricContext) -> float:
        """Return the metric of one model; called without gradients. The inputs must not depend on the seed."""

    def measure(self, context: MetricContext) -> dict[str, float]:
        """Return ``<kind>``, the mean over seeds, and ``<kind>_spread``, their standard deviation (n - 1)."""
        with torch.no_grad():
            values = [self.of_model(context.model(seed), context) for seed in context.seeds]
        spread = stdev(values) if len(values) > 1 else 0.0
        return {self.kind: fmean(values), f"{self.kind}_spread": spread}
