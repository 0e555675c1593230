"""The training loop: deterministic, honest about its splits, explicit about divergence."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import archspec
from archspec.blocks.declared import Declared
from archspec.errors import UnsupportedError
from archspec.initial import FAN_IN, Parameter
from archspec.search.families import Batch, Direction, Split, Tally, Task
from archspec.search.intervals import t_interval, t_quantile
from archspec.search.passes import Passes
from archspec.search.recipe import Recipe, decays
from archspec.search.tasks.recall import Recall
from archspec.search.training import Progress, TrialDiverged, build_model, evaluate, train, train_model
from archspec.search.training_result import RunResult, TrainingResult

TASK = Recall(vocab_size=16, sequence_length=8, num_kv_pairs=2, random_non_queries=False)
QUICK = Recipe(learning_rates=(1e-2,), batch_size=8, eval_tokens=256, test_tokens=512)
BUDGET = 8 * 8 * 40  # 40 steps


@dataclass
class Output:
    logits: Tensor
    auxiliary_loss: Tensor | None = None
    state: None = None


class Tiny(nn.Module):
    """A GRU between a tied embedding; ``auxiliary`` pulls the GRU's weights to zero."""

    def __init__(self, vocab_size: int = 16, dim: int = 16, auxiliary: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.gru = nn.GRU(dim, dim, batch_first=True)
        self.norm = nn.RMSNorm(dim)
        self.auxiliary = auxiliary

    @property
    def recurrent(self) -> Tensor:
        return self.gru.all_weights[0][1]

    def forward(self, tokens: Tensor, state: None = None) -> Output:
        hidden, _ = self.gru(self.embedding(tokens))
        auxiliary = self.auxiliary * self.recurrent.square().sum() if self.auxiliary else None
        return Output(self.norm(hidden.float()) @ self.embedding.weight.T, auxiliary)


def make(seed: int) -> nn.Module:
    return Tiny()


def comparable(result: TrainingResult) -> TrainingResult:
    """Return the result without its measured times."""
    runs = tuple(run.model_copy(update={"wall_s": 1.0, "tokens_per_s": 1.0}) for run in result.runs)
    return result.model_copy(update={"runs": runs, "wall_s": 1.0})


def test_two_runs_are_bit_identical() -> None:
    recipe = QUICK.model_copy(update={"seeds": 2, "learning_rates": (3e-3, 1e-2)})
    first, second = (comparable(train(make, TASK, recipe, BUDGET, 5)) for _ in range(2))
    assert first == second
    assert first.runs[0].curve != first.runs[1].curve
    models = [build_model(make, 5, torch.device("cpu")) for _ in range(2)]
    for model in models:
        train_model(model, TASK, QUICK, 1e-2, BUDGET, 5)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_models_are_seeded_before_they_are_built() -> None:
    torch.manual_seed(123)
    one = build_model(make, 7, torch.device("cpu"))
    torch.manual_seed(321)
    other = build_model(make, 7, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_training_learns() -> None:
    task = Recall(vocab_size=8, sequence_length=4, num_kv_pairs=1, random_non_queries=False)
    recipe = QUICK.model_copy(update={"batch_size": 32})
    result = train(lambda seed: Tiny(8, 24), task, recipe, 32 * 4 * 300, 0)
    assert result.test["recall/accuracy"] > 0.95  # one pair: a GRU has only to keep the value; chance is 1/4
    assert result.runs[0].curve[-1].train_loss < 0.5 < result.runs[0].curve[0].train_loss


def test_result_accounts_for_every_token_and_survives_json() -> None:
    seen: list[Progress] = []
    recipe = QUICK.model_copy(update={"seeds": 2, "learning_rates": (1e-3, 1e-2), "sweep_fraction": 0.25})
    result = train(make, TASK, recipe, BUDGET, 0, "cpu", seen.append)
    assert [point.learning_rate for point in result.sweep] == [1e-3, 1e-2]
    assert [point.tokens for point in result.sweep] == [BUDGET // 4] * 2
    assert [run.seed for run in result.runs] == [0, 1]
    assert [point.tokens for point in result.runs[0].curve] == [BUDGET // 10 * n for n in range(1, 11)]
    assert result.tokens == 2 * BUDGET + 2 * (BUDGET // 4)
    assert {step.phase for step in seen} == {"sweep", "train"}
    assert len([step for step in seen if step.phase == "train"]) == 20
    assert TrainingResult.model_validate_json(result.model_dump_json()) == result
    scores = [run.test["recall/accuracy"] for run in result.runs]
    assert result.test["recall/accuracy"] == pytest.approx(sum(scores) / 2)
    low, high = result.test_interval["recall/accuracy"] or (0, 0)
    assert low <= result.test["recall/accuracy"] <= high
    best = max(result.sweep, key=lambda point: point.validation or 0)
    assert result.learning_rate == best.learning_rate


class Scripted(Task):
    """Recall whose validation scores follow a script. Not registered: it has no kind."""

    scores: ClassVar[dict[str, Direction]] = {"scripted/loss": "minimize"}
    primary: ClassVar[str] = "scripted/loss"
    script: ClassVar[list[float]] = []
    splits_read: ClassVar[list[Split]] = []

    vocab_size: int = 16
    sequence_length: int = 8

    def batch(self, split: Split, seed: int, index: int, batch_size: int) -> Batch:
        self.splits_read.append(split)
        return TASK.batch(split, seed, index, batch_size)

    def score(self, tally: Tally) -> dict[str, float]:
        return {"scripted/loss": self.script.pop(0) if self.splits_read[-1] == "validation" else tally.loss_nats}


def test_the_best_step_on_validation_is_the_one_tested() -> None:
    Scripted.script[:] = [3.0, 1.0, 2.0, 1.0]
    Scripted.splits_read.clear()
    model = build_model(make, 0, torch.device("cpu"))
    recipe = QUICK.model_copy(update={"eval_every_tokens": 64 * 5})
    run = train_model(model, Scripted(), recipe, 1e-2, 64 * 20, 0)
    assert (run.best_step, run.best_tokens, run.validation) == (10, 640, {"scripted/loss": 1.0})
    assert run.test == evaluate(model, Scripted(), recipe, "test")  # the model is left at its best step
    assert Scripted.splits_read.index("test") > max(
        place for place, split in enumerate(Scripted.splits_read) if split in ("train", "validation")
    )


def test_divergence_names_the_step() -> None:
    recipe = QUICK.model_copy(update={"learning_rates": (1e3,), "warmup": 0.0})
    with pytest.raises(TrialDiverged, match="training diverged at step") as caught:
        train(make, TASK, recipe, BUDGET, 0)
    error = caught.value
    assert 0 < error.step < 40
    assert error.tokens == (error.step + 1) * 64
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert copy.step == error.step


class Poisoned(nn.Module):
    """Logits that turn to NaN at one forward pass."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16, 16))
        self.at, self.passes = at, 0

    def forward(self, tokens: Tensor, state: None = None) -> Output:
        self.passes += 1
        return Output(self.weight[tokens] * (math.nan if self.passes > self.at else 1.0))


@pytest.mark.parametrize("step", [0, 3])
def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(step: int) -> None:
    with pytest.raises(TrialDiverged, match=rf"at step {step} .* loss nan nats") as caught:
        train_model(Poisoned(step), TASK, QUICK, 1e-3, 64 * 300, 0)
    assert caught.value.step == step


def test_a_sweep_survives_rates_that_diverge() -> None:
    recipe = QUICK.model_copy(update={"learning_rates": (1e3, 1e-2), "sweep_fraction": 0.5, "warmup": 0.0})
    result = train(make, TASK, recipe, BUDGET, 0)
    assert result.learning_rate == 1e-2
    assert result.sweep[0].validation is None
    assert result.sweep[0].diverged is not None
    with pytest.raises(TrialDiverged, match="at peak learning rate 1000;"):
        train(make, TASK, recipe.model_copy(update={"learning_rates": (1e3, 1e4)}), BUDGET, 0)


def test_the_auxiliary_loss_is_minimised_too() -> None:
    norms = []
    for auxiliary in (0.0, 10.0):
        model = Tiny(auxiliary=auxiliary)
        train_model(model, TASK, QUICK, 1e-2, BUDGET, 0)
        norms.append(float(model.recurrent.detach().square().sum()))
    assert norms[1] < 0.5 * norms[0]


def test_learning_rate_rises_linearly_and_falls_by_a_cosine_to_the_floor() -> None:
    recipe = Recipe(warmup=0.1, floor=0.1)
    rates = [recipe.learning_rate_at(step, 101, 2.0) for step in range(101)]
    assert rates[:11] == pytest.approx([2.0 * (step + 1) / 11 for step in range(11)])
    assert rates[11] == 2.0
    assert rates[100] == pytest.approx(0.2)
    middle = 11 + 89 // 2
    expected = 2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * (middle - 11) / 89)) / 2)
    assert rates[middle] == pytest.approx(expected)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_weight_decay_spares_vectors_norms_and_gates() -> None:
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    assert decays("block.linear.weight", matrix)
    assert not decays("block.linear.bias", vector)
    assert not decays("block.gate.weight", matrix)
    assert not decays("norm.weight", matrix)
    groups = Recipe(weight_decay=0.3).optimizer(Tiny()).param_groups
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    assert sum(len(group["params"]) for group in groups) == len(list(Tiny().parameters()))


def test_weight_decay_follows_declarations() -> None:
    model = Declared()
    shapes = {"gate": (2, 3), "free": (2, 5)}
    model.declare({name: Parameter(shape, FAN_IN, decayed=name == "gate") for name, shape in shapes.items()})
    groups = Recipe(weight_decay=0.3).optimizer(model).param_groups
    found = {tuple(group["params"][0].shape): group["weight_decay"] for group in groups}
    assert found == {(2, 3): 0.3, (2, 5): 0.0}


def test_bf16_computes_in_bf16_and_keeps_fp32_parameters() -> None:
    kinds: list[torch.dtype] = []

    class Watched(Tiny):
        def forward(self, tokens: Tensor, state: None = None) -> Output:
            output = super().forward(tokens)
            kinds.append(output.logits.dtype)
            return output

    model = Watched()
    recipe = QUICK.model_copy(update={"precision": "bf16"})
    result = train_model(model, TASK, recipe, 1e-2, 64 * 4, 0)
    assert set(kinds) == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert math.isfinite(result.test["recall/loss_nats"])
    assert not QUICK.autocast(torch.device("cpu"))._enabled


def test_evaluation_reads_each_sequence_once() -> None:
    sizes: list[int] = []

    class Finite(Recall):
        def num_sequences(self, split: Split) -> int | None:
            return 21

        def tally(self, logits: Tensor, batch: Batch) -> Tally:
            sizes.append(len(batch.tokens))
            return super().tally(logits, batch)

    task = Finite(**TASK.model_dump())
    evaluate(Tiny(), task, QUICK, "test")
    assert sizes == [8, 8, 5]
    sizes.clear()
    evaluate(Tiny(), task, QUICK.model_copy(update={"eval_tokens": 80}), "validation")
    assert sizes == [8, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rates": []}, "learning_rates"),
        ({"learning_rates": [0.0]}, "greater than 0"),
        ({"betas": [0.9, 1.0]}, "betas=.* both must be at least 0 and below 1"),
        ({"warmup": 1.0}, "warmup"),
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"batch_size": "8"}, "batch_size"),
    ],
)
def test_recipes_are_strict(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(fields)


@pytest.mark.parametrize(
    ("level", "degrees", "expected"),
    # Abramowitz and Stegun, table 26.10.
    [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 3, 3.182), (0.95, 4, 2.776), (0.99, 9, 3.250), (0.9, 30, 1.697)],
)
def test_t_quantiles_agree_with_the_table(level: float, degrees: int, expected: float) -> None:
    assert t_quantile(level, degrees) == pytest.approx(expected, abs=5e-4)  # the table has three decimals


def test_t_interval_is_the_textbook_one() -> None:
    assert t_interval([1.0]) is None
    low, high = t_interval([1.0, 2.0, 3.0]) or (0, 0)
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-5)
    with pytest.raises(ValueError, match="required: 0 < level < 1"):
        t_quantile(1.0, 3)


@pytest.mark.gpu
def test_training_on_a_gpu_learns_in_bf16() -> None:
    task = Recall(vocab_size=8, sequence_length=4, num_kv_pairs=1, random_non_queries=False)
    recipe = QUICK.model_copy(update={"batch_size": 32})
    result = train(lambda seed: Tiny(8, 24), task, recipe, 32 * 4 * 300, 0, "cuda")
    assert result.test["recall/accuracy"] > 0.95
    assert result.device == torch.cuda.get_device_name()


@pytest.mark.gpu
def test_a_graph_on_a_gpu_trains_as_the_host_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> tuple[bool, RunResult]:
        torch.manual_seed(0)
        model = archspec.compile("deltanet", vocab_size=16, device="cuda")
        captured = Passes(model, TASK, QUICK, TASK.batch("train", 0, 0, QUICK.batch_size)).graph is not None
        return captured, train_model(model, TASK, QUICK, 1e-3, BUDGET, 0)

    captured, graphed = trained()

    def refuse(*_: object) -> NoReturn:
        raise UnsupportedError("no graphs here")

    monkeypatch.setattr("archspec.search.passes.TrainingGraph", refuse)
    by_hand, launched = trained()
    assert (captured, by_hand) == (True, False)
    assert [point.train_loss for point in graphed.curve] == pytest.approx([p.train_loss for p in launched.curve], 1e-3)
