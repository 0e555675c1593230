"""Which evaluations a candidate needs on a rung, as plain requests with keys that say what determines the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archspec import __version__
from archspec.lowering import Plan
from archspec.search.candidates import Candidate
from archspec.search.executors import Request
from archspec.search.families import Task
from archspec.search.searchfile import SearchFile
from archspec.search.settings import Rung, Settings

KEY_DIGITS = 20
FRESH_SEEDS = 1_000_000  # added to a search's seed: no run of the search itself has used these


@dataclass(frozen=True)
class Prepared:
    """A search file made ready for workers.

    Fields:
        tasks: each task as workers read it, its shared data on disk.
        identities: what determines each task's data, free of paths.
        results: the folder for result files.
    """

    search: SearchFile
    tasks: Mapping[str, Task]
    identities: Mapping[str, Any]
    results: Path

    @property
    def worker_device(self) -> str:
        """The device as a worker sees it: a worker has one GPU, and it is the first."""
        return self.search.settings.device.partition(":")[0]


def prepare(search: SearchFile, cache: Path, results: Path) -> Prepared:
    """Do once what every worker would repeat: build and freeze corpora."""
    corpora = cache / "corpora"
    corpora.mkdir(parents=True, exist_ok=True)
    tasks = {name: task.prepare(corpora.resolve()) for name, task in search.settings.tasks.items()}
    identities = {name: task.identity() for name, task in tasks.items()}
    return Prepared(search, tasks, identities, results.resolve())


def requests_for(
    prepared: Prepared, candidate: Candidate, trial: int, index: int, *, climbed: bool = True
) -> list[Request]:
    """Return the evaluations of a candidate on rung ``index``, the longest first.

    ``climbed``: it was on the rungs below, and can continue from there.
    """
    settings = prepared.search.settings
    rung = settings.ladder[index]
    if rung.rung == "training_free":
        kinds = [("training_free", "training_free", _training_free(prepared, rung))]
    else:
        kinds = []
        for name in settings.tasks:
            fields = _train(prepared, rung, name)
            if climbed and rung.continues:
                below = requests_for(prepared, candidate, trial, index - 1)
                fields["continues"] = next(each["key"] for each in below if each.get("task_name") == name)
            if climbed and index + 1 < len(settings.ladder) and settings.ladder[index + 1].continues:
                fields["is_continued"] = True
            kinds.append((f"train/{name}", "train", fields))
        if index == len(settings.ladder) - 1 and settings.cost.measure:
            kinds.append(("cost", "cost", _cost(prepared)))
    return _requests(prepared, candidate, trial, index, kinds)


def rechecks_for(prepared: Prepared, candidate: Candidate, trial: int, seeds: int) -> list[Request]:
    """Return what scores a trained candidate again: the last rung's training on ``seeds`` seeds it has not seen."""
    settings = prepared.search.settings
    index = len(settings.ladder) - 1
    fresh = {"seed": settings.seed + FRESH_SEEDS, "keep_weights": False}
    kinds = []
    for name in settings.tasks:
        fields = _train(prepared, settings.ladder[index], name)
        kinds.append((f"recheck/{name}", "train", {**fields, **fresh, "recipe": {**fields["recipe"], "seeds": seeds}}))
    return _requests(prepared, candidate, trial, index, kinds)


def _requests(
    prepared: Prepared, candidate: Candidate, trial: int, index: int, kinds: list[tuple[str, str, dict[str, Any]]]
) -> list[Request]:
    settings = prepared.search.settings
    shared = {
        "trial": trial,
        "rung": index,
        "spec": candidate.document,
        "hash": candidate.hash,
        "plan": plan_entries(candidate.plan),
        "figures": candidate.figures,
        "results": str(prepared.results),
        "seed": settings.seed,
        "device": prepared.worker_device,
    }
    found: list[Request] = []
    for stage, kind, fields in kinds:
        key = _key(prepared, candidate.hash, kind, fields)
        found.append({**shared, **fields, "key": key, "stage": f"{index}/{stage}", "kind": kind})
    return found


def stages(settings: Settings, index: int) -> list[str]:
    """Return the names of a candidate's evaluations on a rung."""
    if settings.ladder[index].rung == "training_free":
        return [f"{index}/training_free"]
    cost = ["cost"] if index == len(settings.ladder) - 1 and settings.cost.measure else []
    return [f"{index}/{stage}" for stage in (*(f"train/{name}" for name in settings.tasks), *cost)]


def plan_entries(plan: Plan) -> list[dict[str, Any]]:
    """Return one plain entry per distinct mixer: where, family, form, kernel, reason, and what was rejected."""
    return [
        {
            "where": path,
            "layers": sum(path in layer for layer in plan.layers),
            "family": decision.family,
            "form": decision.form,
            "kernel": decision.kernel,
            "reason": decision.reason,
            "rejected": [vars(rejection) for rejection in decision.rejected],
        }
        for path, decision in plan.decisions.items()
    ]


def fingerprint(prepared: Prepared) -> str:
    """Return what runs must have in common for their correlations to be pooled: everything but seed and length."""
    document = prepared.search.document
    kept = {
        name: value
        for name, value in document.items()
        if name in ("space", "variables", "fit", "constraints", "training", "ladder", "context", "device")
    }
    return _digest({**kept, "tasks": prepared.identities, "version": __version__})


def _training_free(prepared: Prepared, rung: Rung) -> dict[str, Any]:
    return {
        "metrics": [metric.dump() for metric in rung.metrics or ()],
        "init_seeds": rung.init_seeds or 3,
        "vocab_size": next(iter(prepared.tasks.values())).vocab_size,
    }


def _train(prepared: Prepared, rung: Rung, name: str) -> dict[str, Any]:
    settings = prepared.search.settings
    recipe = settings.training.model_dump(mode="json")
    return {
        "task_name": name,
        "task": prepared.tasks[name].dump(),
        "recipe": recipe if rung.seeds is None else {**recipe, "seeds": rung.seeds},
        "tokens": settings.tokens_of(rung, name),
        "seconds": rung.seconds,
        "keep_weights": settings.keep_weights,
    }


def _cost(prepared: Prepared) -> dict[str, Any]:
    settings = prepared.search.settings
    first = next(iter(prepared.tasks.values()))
    return {
        "vocab_size": first.vocab_size,
        "batch_size": settings.cost.batch_size or settings.training.batch_size,
        "sequence_length": settings.cost.sequence_length or first.sequence_length,
        "precision": settings.training.precision,
        "repeats": settings.cost.repeats,
        "limit_s": settings.cost.limit_s,
    }


def _key(prepared: Prepared, code: str, kind: str, fields: Mapping[str, Any]) -> str:
    """Hash what determines a result: architecture, work, data, seed, device and version; no path, no trial number."""
    settings = prepared.search.settings
    determines = {name: value for name, value in fields.items() if name != "task"}
    if kind == "train":
        determines["task"] = prepared.identities[fields["task_name"]]
    return _digest(
        {"hash": code, "kind": kind, "seed": settings.seed, "device": settings.device, "version": __version__}
        | {"fields": determines}
    )


def _digest(data: Mapping[str, Any]) -> str:
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]
