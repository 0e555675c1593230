"""The training loop: sweep the learning rate, train every seed, report on test.

Budgets are nested. With several learning rates, each is tried with ``sweep_fraction`` of the budget, and the
best on validation gets the full budget with every seed. Within a run the step that is best on validation is kept,
and only that one is scored on test. Nothing is ever chosen on test.

On a CPU with one thread a run is a pure function of (model, task, recipe, budget, seed): two runs agree bit by bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from archspec.errors import ArchspecError
from archspec.search.checkpoint import Checkpoint
from archspec.search.families import Batch, ModelFactory, Split, Tally, Task
from archspec.search.gradients import Gradients
from archspec.search.passes import Passes
from archspec.search.recipe import Recipe
from archspec.search.training_result import CurvePoint, RunResult, SweepPoint, TrainingResult

EVALUATION_SEED = 0
PROBE_STEPS = 3
CHECK_EVERY_STEPS = 10  # reading a loss waits for the device, so losses are read in groups


class TrialDiverged(ArchspecError):  # noqa: N818 - named for what happened to the trial
    """A training run whose loss left the range in which it could still have learnt.

    Args:
        step: the first step, from 0, whose loss was out of range.
        tokens: training tokens seen by then.
        loss: that loss in nats.
        limit: the largest loss allowed.
        learning_rate: the run's peak rate.
        cause: where it began, when gradients overflowed before the loss did.
    """

    def __init__(
        self, step: int, tokens: int, loss: float, limit: float, learning_rate: float, cause: str = ""
    ) -> None:
        self.step, self.tokens, self.loss, self.limit, self.learning_rate = step, tokens, loss, limit, learning_rate
        self.cause = cause
        advice = f"{cause}; bound what that part computes, or lower" if cause else "lower"
        super().__init__(
            f"training diverged at step {step} ({tokens} tokens): loss {loss:.4g} nats, at most {limit:.4g} allowed, "
            f"at peak learning rate {learning_rate:g}; {advice} learning_rates or clip_norm"
        )

    def __reduce__(self) -> tuple[type[TrialDiverged], tuple[int, int, float, float, float, str]]:
        return type(self), (self.step, self.tokens, self.loss, self.limit, self.learning_rate, self.cause)


@dataclass(frozen=True)
class Progress:
    """Where a training evaluation stands; ``validation`` is the primary score just measured."""

    phase: Literal["sweep", "train"]
    seed: int
    learning_rate: float
    tokens: int
    budget_tokens: int
    train_loss: float
    validation: float


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Checkpoints:
    """Where a seed's run continues from, and who is given its state for a longer run; None: a fresh run, nobody."""

    load: Callable[[int], Checkpoint] | None = None
    save: Callable[[int, Checkpoint], None] | None = None


def train(
    model_factory: ModelFactory,
    task: Task,
    recipe: Recipe,
    budget_tokens: int,
    seed: int,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
    checkpoints: Checkpoints | None = None,
) -> TrainingResult:
    """Sweep the learning rates if there are several, then train with every seed.

    Args:
        model_factory: builds the model from a seed; the generator is seeded before it is called.
        task: where batches and scores come from.
        recipe: see ``Recipe``.
        budget_tokens: training tokens of one full run, rounded up to whole steps.
        seed: the first seed; also that of the sweep.
        device: where to train.
        on_progress: called after every evaluation.
        checkpoints: where runs continue from, at the rate they have had, and what is left for longer ones.

    Raises:
        TrialDiverged: when a full run diverges, or every rate of the sweep does.
    """
    started = time.perf_counter()
    device = torch.device(device)
    sweep = []
    checkpoints = checkpoints or Checkpoints()
    continued = {each: checkpoints.load(each) for each in range(seed, seed + recipe.seeds)} if checkpoints.load else {}
    if not continued and len(recipe.learning_rates) > 1:
        sweep_tokens = math.ceil(recipe.sweep_fraction * budget_tokens)
        for rate in recipe.learning_rates:
            report = _reporter(on_progress, "sweep", seed, rate, sweep_tokens)
            sweep.append(_try_rate(model_factory, task, recipe, rate, sweep_tokens, seed, device, report))
    learning_rate = _best_rate(sweep, task) if sweep else recipe.learning_rates[0]
    learning_rate = continued[seed].learning_rate if continued else learning_rate
    runs = []
    for run_seed in range(seed, seed + recipe.seeds):
        model = build_model(model_factory, run_seed, device)
        report = _reporter(on_progress, "train", run_seed, learning_rate, budget_tokens)
        save = partial(checkpoints.save, run_seed) if checkpoints.save is not None else None
        start = continued.get(run_seed)
        runs.append(train_model(model, task, recipe, learning_rate, budget_tokens, run_seed, report, start, save))
    return TrainingResult(
        task=task.kind,
        primary=task.primary,
        budget_tokens=budget_tokens,
        device=device_name(device),
        sweep=tuple(sweep),
        runs=tuple(runs),
        wall_s=time.perf_counter() - started,
    )


def build_model(model_factory: ModelFactory, seed: int, device: torch.device) -> nn.Module:
    """Seed torch, then build: parameters depend on the seed alone, and are drawn on the CPU on every machine."""
    torch.manual_seed(seed)
    return model_factory(seed).to(device)


def train_model(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    learning_rate: float,
    budget_tokens: int,
    seed: int,
    report: Callable[[CurvePoint], None] | None = None,
    start: Checkpoint | None = None,
    save: Callable[[Checkpoint], None] | None = None,
) -> RunResult:
    """Train one model in place, once; it is left with the weights of its best step.

    From a checkpoint, steps before it are not taken again, and the best step is among those evaluated after it.
    ``save`` is given the state before the learning rate begins to fall (``constant`` schedule only).

    Raises:
        TrialDiverged: on a loss that is not finite or out of range.
    """
    started = time.perf_counter()
    run = _Run(model, task, recipe, learning_rate, budget_tokens, seed)
    tokens_per_step = recipe.batch_size * task.sequence_length
    every = math.ceil(run.num_steps / 10)
    if recipe.eval_every_tokens is not None:
        every = max(1, recipe.eval_every_tokens // tokens_per_step)
    curve: list[CurvePoint] = []
    begun = 0 if start is None else start.step
    if start is not None:
        start.restore(model, run.optimizer)
    keeping = recipe.decay_start(run.num_steps) if save is not None else None
    for first in range(0, run.num_steps, every):
        last = min(first + every, run.num_steps)
        if last <= begun:
            continue
        first = max(first, begun)
        if save is not None and keeping is not None and first <= keeping < last:
            before = run.advance(range(first, keeping)) if keeping > first else 0.0
            save(Checkpoint.take(keeping, learning_rate, model, run.optimizer))
            after = run.advance(range(keeping, last))
            train_loss = (before * (keeping - first) + after * (last - keeping)) / (last - first)
        else:
            train_loss = run.advance(range(first, last))
        scores = evaluate(model, task, recipe, "validation")
        run.keep_if_best(last, train_loss, scores)
        primary = scores[task.primary]
        curve.append(CurvePoint(tokens=last * tokens_per_step, train_loss=train_loss, validation=primary))
        if report is not None:
            report(curve[-1])
    model.load_state_dict(run.best_weights)
    return RunResult(
        seed=seed,
        learning_rate=learning_rate,
        curve=tuple(curve),
        best_step=run.best_step,
        best_tokens=run.best_step * tokens_per_step,
        validation=run.best_scores,
        test=evaluate(model, task, recipe, "test"),
        tokens=run.num_steps * tokens_per_step,
        wall_s=time.perf_counter() - started,
        tokens_per_s=(run.num_steps - begun) * tokens_per_step / run.training_s,
    )


def tokens_in(
    seconds: float, model_factory: ModelFactory, task: Task, recipe: Recipe, device: torch.device | str
) -> int:
    """Return the training tokens that fit into ``seconds`` at the speed of a few steps, after as many to warm up."""
    probed = {"learning_rates": recipe.learning_rates[:1], "seeds": 1, "eval_tokens": 1, "test_tokens": 1}
    probe = recipe.model_copy(update=probed)
    tokens_per_step = recipe.batch_size * task.sequence_length
    for _ in range(2):
        model = build_model(model_factory, 0, torch.device(device))
        run = train_model(model, task, probe, probe.learning_rates[0], PROBE_STEPS * tokens_per_step, 0)
    return max(tokens_per_step, int(seconds * run.tokens_per_s))


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, recipe: Recipe, split: Split) -> dict[str, float]:
    """Return the task's scores on the first sequences of a split: always the same ones, each read once."""
    device = next(model.parameters()).device
    tokens = recipe.eval_tokens if split == "validation" else (recipe.test_tokens or 4 * recipe.eval_tokens)
    wanted = max(1, tokens // task.sequence_length)
    available = task.num_sequences(split)
    wanted = wanted if available is None else min(wanted, available)
    was_training = model.training
    model.eval()
    tally = Tally()
    for index in range(math.ceil(wanted / recipe.batch_size)):
        batch = task.batch(split, EVALUATION_SEED, index, recipe.batch_size)
        batch = batch.first(wanted - index * recipe.batch_size).to(device)
        with recipe.autocast(device):
            logits = model(batch.tokens).logits
        tally = tally + task.tally(logits, batch)
    model.train(was_training)
    return task.score(tally)


def device_name(device: torch.device) -> str:
    """Return the device in words: the GPU's name, or the CPU with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


class _Run:
    """The moving parts of one run: optimizer, loss watch, and the best weights so far."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        recipe: Recipe,
        learning_rate: float,
        budget_tokens: int,
        seed: int,
    ) -> None:
        self.model, self.task, self.recipe, self.seed = model, task, recipe, seed
        self.learning_rate = learning_rate
        self.num_steps = recipe.num_steps(budget_tokens, task.sequence_length)
        self.tokens_per_step = recipe.batch_size * task.sequence_length
        self.passes = Passes(model.train(), task, recipe, self._batch(0))
        self.optimizer = recipe.optimizer(model)
        self.gradients = Gradients(model, remembered=CHECK_EVERY_STEPS + 1)
        self.training_s = 0.0
        self.limit = recipe.divergence_multiple * math.log(task.vocab_size)
        self.best_step = 0
        self.best_scores: dict[str, float] = {}
        self.best_weights: dict[str, Tensor] = {}
        torch.manual_seed(seed)  # whatever the model draws while training follows the run's seed

    def advance(self, steps: range) -> float:
        """Take the steps and return their mean loss in nats."""
        started = time.perf_counter()
        self.model.train()
        total, unread = 0.0, list[Tensor]()
        for step in steps:
            unread.append(self._step(step))
            if len(unread) == CHECK_EVERY_STEPS or step == steps[-1]:
                total += self._read(unread, step + 1 - len(unread))
                unread = []
        self.training_s += time.perf_counter() - started
        return total / len(steps)

    def keep_if_best(self, step: int, train_loss: float, scores: dict[str, float]) -> None:
        """Remember the weights if they are the best on validation so far."""
        score = scores[self.task.primary]
        if not math.isfinite(score):
            raise self._diverged(step - 1, train_loss)
        if self.task.better(score, than=self.best_scores.get(self.task.primary)):
            self.best_step, self.best_scores = step, scores
            self.best_weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def _step(self, step: int) -> Tensor:
        rate = self.recipe.learning_rate_at(step, self.num_steps, self.learning_rate, self.tokens_per_step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.passes(self._batch(step))
        self.gradients.clip(step, self.recipe.clip_norm)
        self.optimizer.step()
        return loss

    def _batch(self, step: int) -> Batch:
        return self.task.batch("train", self.seed, step, self.recipe.batch_size)

    def _read(self, losses: Sequence[Tensor], first_step: int) -> float:
        """Return the sum of the losses; the first one out of range ends the run."""
        values = torch.stack(list(losses)).tolist()
        if first_step == 0 and math.isfinite(values[0]):
            self.limit = max(self.limit, self.recipe.divergence_multiple * values[0])
        for step, value in enumerate(values, first_step):
            if not math.isfinite(value) or value > self.limit:
                raise self._diverged(step, value)
        return math.fsum(values)

    def _diverged(self, step: int, loss: float) -> TrialDiverged:
        tokens = (step + 1) * self.recipe.batch_size * self.task.sequence_length
        # A loss that is not finite makes all gradients so: those of the step before tell more. A score taken after
        # the step itself is lost by the step's own gradients.
        last = step if math.isfinite(loss) else step - 1
        place = self.gradients.overflow(last)
        cause = f"at step {last} the gradient was no longer finite, first of {place}" if place else ""
        return TrialDiverged(step, tokens, loss, self.limit, self.learning_rate, cause)


def _try_rate(
    model_factory: ModelFactory,
    task: Task,
    recipe: Recipe,
    rate: float,
    budget_tokens: int,
    seed: int,
    device: torch.device,
    report: Callable[[CurvePoint], None] | None,
) -> SweepPoint:
    try:
        model = build_model(model_factory, seed, device)
        run = train_model(model, task, recipe, rate, budget_tokens, seed, report)
    except TrialDiverged as diverged:
        return SweepPoint(
            learning_rate=rate,
            tokens=diverged.tokens,
            validation=None,
            diverged=(diverged.step, diverged.loss, diverged.limit),
            cause=diverged.cause,
        )
    return SweepPoint(learning_rate=rate, tokens=run.tokens, validation=run.validation[task.primary])


def _best_rate(sweep: Sequence[SweepPoint], task: Task) -> float:
    best: SweepPoint | None = None
    for point in sweep:
        if point.validation is not None and task.better(
            point.validation, than=best.validation if best is not None else None
        ):
            best = point
    if best is not None:
        return best.learning_rate
    lowest = min(sweep, key=lambda point: point.learning_rate)
    step, loss, limit = lowest.diverged or (0, math.nan, math.nan)
    raise TrialDiverged(step, lowest.tokens, loss, limit, lowest.learning_rate, lowest.cause)


def _reporter(
    on_progress: OnProgress | None,
    phase: Literal["sweep", "train"],
    seed: int,
    learning_rate: float,
    budget_tokens: int,
) -> Callable[[CurvePoint], None] | None:
    if on_progress is None:
        return None

    def report(point: CurvePoint) -> None:
        on_progress(
            Progress(phase, seed, learning_rate, point.tokens, budget_tokens, point.train_loss, point.validation)
        )

    return report
