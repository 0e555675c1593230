"""A run folder as the driver writes it, event by event, with known figures; for the tests of reports and commands.

The trials lie on known points: trial n has recall accuracy, bits per byte and state bytes from ``figures_of(n)``, so
that the front, its knee and its hypervolume can be told by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from archspec.search.eventlog import EVENTS, EventLog

OBJECTIVES = [
    {"name": "recall/accuracy", "metric": "recall/accuracy", "direction": "maximize", "reference": 0.0},
    {"name": "text/bits_per_byte", "metric": "text/bits_per_byte", "direction": "minimize", "reference": 8.0},
    {
        "name": "state_bytes",
        "metric": "state_bytes",
        "direction": "minimize",
        "reference": 1048576.0,
        "at_length": 2048,
        "dtype": "float32",
    },
]
TASKS = {
    "recall": {"kind": "recall", "primary": "recall/accuracy", "scores": {"recall/accuracy": "maximize"}},
    "text": {"kind": "text", "primary": "text/bits_per_byte", "scores": {"text/bits_per_byte": "minimize"}},
}
METRICS = {"recall_at_init": "maximize", "memory_capacity": "maximize", "hidden_covariance": "maximize"}
RUNGS = [
    {"rung": "training_free", "tokens": None, "promote": {"count": 8, "random": 4}},
    {"rung": "short_train", "tokens": 200_000, "promote": None},
]
BASELINES = ("transformer", "gated_deltanet", "titans")
FAMILIES = (["delta"], ["linear"], ["online"], ["delta", "softmax"], ["softmax"], ["recurrence"])
KERNELS = {
    "delta": "a matrix under l2: the steps of a chunk solve one triangular system",
    "linear": "a matrix that adds k v^T and decays per head: chunks are independent given their start states",
    "online": "gradients of 16 tokens at their anchor are one batch; c folds decay and momentum",
    "softmax": "tokens are stored and read by a softmax",
    "recurrence": "no faster form computes this function",
}
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Return a function that writes a run of so many accepted trials (every fifth trained) and returns its folder."""

    def make(count: int = 40, *, names: dict[int, str] | None = None, status: str | None = "finished") -> Path:
        folder = tmp_path / "runs" / "quick"
        return RunWriter(folder, names or {}).write(count, status)

    return make


def mixer_of(family: str) -> dict[str, Any]:
    """Return a mixer of a rule family, in the language's short forms."""
    common: dict[str, Any] = {"num_heads": 2, "key_dim": 16, "value_dim": 16, "qk": {"norm": "l2"}}
    if family == "softmax":
        return {**common, "memory": "kv", "update": "nonparametric"}
    if family == "online":
        update = {"kind": "momentum", "momentum": "sigmoid", "step_size": "sigmoid", "anchor": 16}
        return {**common, "memory": {"kind": "mlp", "depth": 2}, "retention": {"kind": "decay", "gate": "sigmoid"},
                "update": update}  # fmt: skip
    bias = {"linear": "dot", "recurrence": {"kind": "lp", "p": 3}}.get(family, "l2")
    retention = {"kind": "decay", "gate": "gdn"}
    return {**common, "memory": "matrix", "bias": bias, "retention": retention, "update": "gradient_descent"}


def spec_of(name: str, families: list[str]) -> dict[str, Any]:
    """Return a spec with one block for each family, twice over."""
    blocks = {
        family: {"mixer": mixer_of(family), "feed_forward": {"kind": "swiglu", "expansion": 2.67, "multiple_of": 8}}
        for family in families
    }
    layout = {"repeat": 2, "of": list(blocks)}
    return {"name": name, "model_dim": 64, "blocks": blocks, "layout": layout}


def figures_of(number: int) -> dict[str, float]:
    """Return the scores and sizes that trial ``number`` gets: a quality that grows with state, and a wobble."""
    state_bytes = 4096 * 2 ** (number * 7 % 8)
    wobble = ((number * 37) % 101) / 101 - 0.5
    return {
        "recall/accuracy": round(0.25 + 0.09 * (number * 7 % 8) + 0.1 * wobble, 4),
        "text/bits_per_byte": round(4.4 - 0.08 * (number * 7 % 8) + 0.2 * ((number * 53 % 97) / 97 - 0.5), 4),
        "state_bytes": float(state_bytes),
        "parameters": float(88_000 + (number * 911) % 12_000),
        "non_embedding_parameters": float(80_000 + (number * 911) % 12_000),
        "flops_per_token": float(176_000 + (number * 1822) % 24_000),
    }


class RunWriter:
    """Writes events and result files in the driver's order."""

    def __init__(self, folder: Path, names: dict[int, str]) -> None:
        (folder / "results").mkdir(parents=True)
        self.folder, self.names = folder, names
        self.log = EventLog(folder / EVENTS)

    def write(self, count: int, status: str | None) -> Path:
        self.log.append("opened", format=1, study="quick", seed=0, objectives=OBJECTIVES, tasks=TASKS, metrics=METRICS,
                        rungs=RUNGS)  # fmt: skip
        command = "archspec search specs/searches/quickstart.yaml --study quick"
        self.log.append("started", command=command, workers=2, device="cpu", trials=count)
        environment = {"python": "3.11.7", "packages": {"torch": "2.13.0", "optuna": "5.0.0"}, "device": "cpu"}
        (self.folder / "environment.json").write_text(json.dumps({**environment, "threads": 2}))
        for number in range(count):
            self.propose(number)
            self.training_free(number)
        trained = [number for number in range(count) if number < len(BASELINES) or number % 5 == 0]
        chosen = [number for number in trained if number >= len(BASELINES)]
        self.log.append("promoted", round=0, rung=0, rank=chosen[::2], random=chosen[1::2])
        for number in trained:
            self.train(number)
        self.reject(count, "constraint state_bytes", "state_bytes is 2097152, over the maximum of 1048576")
        self.reject(count + 1, "constraint state_bytes", "state_bytes is 2097152, over the maximum of 1048576")
        self.reject(count + 2, "duplicate", "the same architecture as trial 7")
        if status is not None:
            self.log.append("concluded", hypervolume=None, correlations=correlations())
            self.log.append("stopped", reason=status)
        self.log.close()
        return self.folder

    def families(self, number: int) -> list[str]:
        return [["softmax"], ["delta"], ["online"]][number] if number < 3 else FAMILIES[number % len(FAMILIES)]

    def name(self, number: int) -> str:
        return self.names.get(number, BASELINES[number] if number < len(BASELINES) else f"quick-{number}")

    def propose(self, number: int) -> None:
        families = self.families(number)
        sizes = {key: value for key, value in figures_of(number).items() if "/" not in key}
        self.log.append(
            "proposed", trial=number, name=self.name(number), hash=f"{number * 2654435761 % 2**64:016x}",
            origin="baseline" if number < len(BASELINES) else "sampled", round=-1 if number < len(BASELINES) else 0,
            coordinates={} if number < 3 else {"model_dim": 64, "blocks.main.mixer.bias": "l2"}, figures=sizes,
            families=families, kernels=[f"{family}/chunkwise" for family in families],
            note="model_dim 256 became 64 to fit the base's 90,000 parameters" if number < 3 else "",
        )  # fmt: skip

    def training_free(self, number: int) -> None:
        quality = figures_of(number)["recall/accuracy"]
        metrics = {
            "recall_at_init": {"mean": 0.2 + 0.6 * quality, "spread": 0.021},
            "memory_capacity": {"mean": 6.3 - 2 * quality + number % 3, "spread": 0.4},
            "hidden_covariance": {"mean": -412.0 + 13 * (number % 7), "spread": 11.0},
        }
        self.finish(number, "0/metrics", 0, {"metrics": metrics})

    def train(self, number: int) -> None:
        found = figures_of(number)
        for task, name in (("recall", "recall/accuracy"), ("text", "text/bits_per_byte")):
            score = {
                "mean": found[name],
                "spread": 0.0123,
                "interval": [found[name] - 0.03, found[name] + 0.03],
                "n": 3,
            }
            first = 0.06 if task == "recall" else 7.9
            steps = range(1, 11)
            scores = [found[name] + (first - found[name]) * 0.8**step for step in steps]
            curve = [
                {"tokens": 20_000 * step, "train_loss": 4.1 * 0.9**step, "score": at}
                for step, at in zip(steps, scores, strict=True)
            ]
            measured = {"median": 41.25, "p20": 40.1, "p80": 44.0, "repeats": 10}
            cost = {"train_step_ms": measured, "device": "cpu", "threads": 1, "precision": "fp32"}
            value = {"scores": {name: score}, "validation": {name: score}, "cost": cost, "curve": curve}
            self.finish(number, f"1/train/{task}", 1, value)

    def finish(self, number: int, stage: str, rung: int, value: dict[str, Any]) -> None:
        key = f"{number:04d}-{stage.replace('/', '-')}"
        families = self.families(number)
        where = [(family, f"blocks.{family}.mixer") for family in families]
        plan = [
            {"where": path, "family": family, "form": "chunkwise", "kernel": "torch", "reason": KERNELS[family]}
            for family, path in where
        ]
        result = {"status": "ok", "spec": spec_of(self.name(number), families), "plan": plan, "value": value}
        (self.folder / "results" / f"{key}.json").write_text(json.dumps(result))
        self.log.append("submitted", trial=number, key=key, stage=stage, rung=rung, attempt=1)
        kept = {name: item for name, item in value.items() if name != "curve"}
        self.log.append("finished", trial=number, key=key, stage=stage, rung=rung, ok=True, wall_s=4.5, value=kept)

    def reject(self, number: int, rule: str, reason: str) -> None:
        self.log.append("rejected", trial=number, round=0, coordinates={}, rule=rule, reason=reason)


def correlations() -> list[dict[str, Any]]:
    """Return one correlation of each verdict."""
    base = {"against": "recall/accuracy", "n": 24, "runs": 3}
    return [
        {**base, "metric": "non_embedding_parameters", "rho": 0.11, "interval": [-0.31, 0.50], "partial": None,
         "partial_interval": None, "verdict": "not enough evidence"},
        {**base, "metric": "recall_at_init", "rho": 0.64, "interval": [0.29, 0.84], "partial": 0.66,
         "partial_interval": [0.31, 0.85], "verdict": "predicts"},
        {**base, "metric": "hidden_covariance", "rho": -0.52, "interval": [-0.77, -0.13], "partial": -0.5,
         "partial_interval": [-0.76, -0.11], "verdict": "misleads"},
    ]  # fmt: skip


def read_yaml(text: str) -> Any:
    """Return what a YAML text says, by an independent reader."""
    return yaml.safe_load(text)
