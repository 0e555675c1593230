"""What a search would do, without doing it: the size of its space, sampled specs, acceptance, kernels, cost.

Draws are uniform over each node's options, as the first draws of every sampler are. The time is measured, not
modelled: a few training steps, one initialisation's metrics and one costing of the median candidate of each set of
rule families, on one thread.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

from archspec.search.baselines import Known, baselines
from archspec.search.candidates import Candidate, Rejection, admit, named
from archspec.search.points import Uniform
from archspec.search.requests import Prepared, prepare, requests_for
from archspec.search.rundir import available_cores
from archspec.search.searchfile import SearchFile
from archspec.search.space import Size

DRAWS = 200
LIMIT_S = 10.0
SHOWN = 5
MEASURED_STEPS = 3
MEASURING_LIMIT_S = 15.0


@dataclass(frozen=True)
class DryRun:
    """What a search would do.

    Fields:
        size: of the space; ``draws``: how many were tried; ``rejected``: rule -> how many of them.
        distinct: architectures among the accepted draws.
        samples: some of them; ``kernels``: plan -> how many of the distinct ones run so.
        baselines: resized, ready to run.
        evaluations: number of evaluations by kind; ``seconds``: estimated wall time on the file's workers.
    """

    size: Size
    draws: int
    rejected: dict[str, int]
    reasons: dict[str, str]
    accepted: int
    distinct: int
    samples: list[Candidate]
    kernels: dict[str, int]
    baselines: list[Known]
    evaluations: dict[str, int]
    seconds: float

    @property
    def acceptance_rate(self) -> float:
        """Share of the draws that break no rule and no constraint."""
        return self.accepted / self.draws if self.draws else 0.0

    def data(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "space": vars(self.size),
            "draws": self.draws,
            "acceptance_rate": self.acceptance_rate,
            "rejected": self.rejected,
            "reasons": self.reasons,
            "distinct": self.distinct,
            "kernels": self.kernels,
            "samples": [_summary(item) for item in self.samples],
            "baselines": [
                {"name": item.name, "note": item.note, **_summary(item.candidate)} for item in self.baselines
            ],
            "evaluations": self.evaluations,
            "estimated_seconds": round(self.seconds, 1),
        }


def dry_run(search: SearchFile) -> DryRun:
    """Sample the space, resize the baselines, and time a few training steps."""
    generator = random.Random(search.settings.seed)
    rejected: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    found: dict[str, Candidate] = {}
    accepted, draws, stop = 0, 0, time.monotonic() + LIMIT_S
    while draws < DRAWS and (time.monotonic() < stop or draws < SHOWN):
        draws += 1
        document = search.space.draw(Uniform(generator))
        result = admit(named(document, f"{search.settings.study}-{draws}"), search)
        if isinstance(result, Rejection):
            rejected[result.rule] += 1
            reasons.setdefault(result.rule, result.reason)
        else:
            accepted += 1
            found.setdefault(result.hash, result)
    known = baselines(search)
    evaluations = _evaluations(search, len(known))
    candidates = list(found.values())
    return DryRun(
        size=search.space.size,
        draws=draws,
        rejected=dict(rejected.most_common()),
        reasons=reasons,
        accepted=accepted,
        distinct=len(found),
        samples=candidates[:SHOWN],
        kernels=dict(Counter(item.plan.summary() for item in candidates).most_common()),
        baselines=known,
        evaluations=evaluations,
        seconds=_seconds(search, candidates, evaluations) if candidates else 0.0,
    )


def _evaluations(search: SearchFile, num_baselines: int) -> dict[str, int]:
    """Return how many evaluations of each stage the search runs."""
    settings = search.settings
    members = settings.trials or settings.candidates
    rounds = -(-members // settings.candidates)
    found: dict[str, int] = {}
    last = len(settings.ladder) - 1
    for index, rung in enumerate(settings.ladder):
        count = members + (num_baselines if index in (0, last) else 0)
        stages = ["training_free"] if rung.rung == "training_free" else [f"train/{name}" for name in settings.tasks]
        if index == last and settings.cost.measure:
            stages.append("cost")
        found.update({f"{index}/{stage}": count for stage in stages})
        if rung.promote is not None and rung.promote.count is not None:
            members = min(members, rounds * rung.promote.count)
        elif rung.promote is not None:
            members = rung.promote.numbers(members)[0]
    return found


def _seconds(search: SearchFile, candidates: Sequence[Candidate], evaluations: dict[str, int]) -> float:
    """Estimate the wall time: each sort of candidate is measured at its median, and weighed by its share."""
    sorts: dict[tuple[str, ...], list[Candidate]] = {}
    for item in candidates:
        sorts.setdefault(tuple(item.plan.families()), []).append(item)
    shares: list[int] = []
    seconds: list[float] = []
    stop = time.monotonic() + MEASURING_LIMIT_S
    with TemporaryDirectory() as folder:
        prepared = prepare(search, Path(folder), Path(folder))
        for members in sorted(sorts.values(), key=len, reverse=True):
            if shares and time.monotonic() > stop:
                break
            flops = [item.figures["flops_per_token"] for item in members]
            middle = min(members, key=lambda item: abs(item.figures["flops_per_token"] - median(flops)))
            scale = fmean(flops) / middle.figures["flops_per_token"]
            shares.append(len(members))
            measured = (count * measured_seconds(prepared, middle, stage) for stage, count in evaluations.items())
            seconds.append(scale * sum(measured))
    core_s = sum(share * each for share, each in zip(shares, seconds, strict=True)) / sum(shares)
    return core_s / (search.settings.workers or available_cores())


def measured_seconds(prepared: Prepared, candidate: Candidate, stage: str) -> float:
    """Return the seconds that one evaluation takes, from a small part of it."""
    import torch

    from archspec.search.evaluation import cost, short_train, training_free

    index = int(stage.partition("/")[0])
    request = next(item for item in requests_for(prepared, candidate, 0, index) if item["stage"] == stage)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if request["kind"] != "train":
            started = time.perf_counter()
            if request["kind"] == "cost":
                cost(request)
                return time.perf_counter() - started
            training_free({**request, "init_seeds": 1})
            return float(request["init_seeds"] * (time.perf_counter() - started))
        if request["seconds"] is not None:
            return float(request["seconds"] * _training_tokens({**request, "tokens": 1.0}, evaluation=False))
        step_tokens = request["recipe"]["batch_size"] * prepared.tasks[request["task_name"]].sequence_length
        recipe = {
            **request["recipe"],
            "learning_rates": request["recipe"]["learning_rates"][:1],
            "seeds": 1,
            "eval_tokens": 1,
            "test_tokens": 1,
        }
        result = short_train(
            {
                **request,
                "recipe": recipe,
                "tokens": MEASURED_STEPS * step_tokens,
                "keep_weights": False,
                "continues": None,
            }
        )
        return _training_tokens(request) / float(result["tokens_per_s"])
    finally:
        torch.set_num_threads(threads)


def _training_tokens(request: Any, *, evaluation: bool = True) -> float:
    """Return the training tokens of a request, sweep included; an evaluation token costs a third of a training one."""
    recipe, tokens = request["recipe"], request["tokens"]
    rates = len(recipe["learning_rates"])
    sweep = rates * recipe["sweep_fraction"] * tokens if rates > 1 else 0.0
    if not evaluation:
        return float(sweep + recipe["seeds"] * tokens)
    evaluated = 10 * recipe["eval_tokens"] + (recipe["test_tokens"] or 4 * recipe["eval_tokens"])
    return float(sweep + recipe["seeds"] * (tokens + evaluated / 3))


def _summary(item: Candidate) -> dict[str, Any]:
    return {
        "hash": item.hash,
        "plan": item.plan.summary(),
        **{name: value for name, value in item.figures.items() if ":" not in name},
        "spec": item.document,
    }
