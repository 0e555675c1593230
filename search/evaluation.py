"""One evaluation, as a worker runs it: a plain request in, a result file renamed into place.

A request is a plain mapping, so that any executor can carry it:

    key, trial, stage, rung     what it is; the key names the result file
    kind                        training_free, train or cost
    spec, hash, plan, figures   the candidate, and what was predicted of it
    results, seed, device       where and how
    vocab_size, metrics, init_seeds                        training_free
    task_name, task, recipe, tokens, keep_weights          train
    continues, is_continued                                train: the key of the rung below, and whether one above will
    vocab_size, batch_size, sequence_length, repeats, limit_s    cost

Nothing but the result file counts: once it is renamed, the evaluation is done, whoever dies next. A failure is a
result too, with its reason; what kills the worker itself leaves no file, and the driver decides.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import stdev
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from archspec import catalog
from archspec.compiler import compile as compile_spec
from archspec.errors import ArchspecError
from archspec.loading import load
from archspec.search.checkpoint import Checkpoint, checkpoint_path, load_checkpoint, save_checkpoint
from archspec.search.cost import measure_cost
from archspec.search.families import Metric, MetricContext, ModelFactory, Task
from archspec.search.files import write_json
from archspec.search.intervals import t_interval
from archspec.search.recipe import Recipe
from archspec.search.rundir import machine
from archspec.search.settings import score_name
from archspec.search.training import Checkpoints, Progress, tokens_in, train
from archspec.search.training_result import TrainingResult

Request = Mapping[str, Any]
OnProgress = Callable[[dict[str, Any]], None]


def evaluate(request: Request, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Run one evaluation, write its result file, and return what the file holds."""
    catalog.load_search()
    started, clock = time.time(), time.perf_counter()
    result: dict[str, Any] = {
        name: request[name] for name in ("key", "trial", "stage", "rung", "kind", "hash", "spec", "plan")
    }
    try:
        value = KINDS[request["kind"]](request, on_progress)
        result |= {"status": "ok", "reason": "", "value": finite(value)}
    except Exception as error:  # noqa: BLE001 - whatever a candidate raises is recorded, and the search goes on
        result |= {"status": "failed", "reason": reason_of(error), "traceback": traceback.format_exc(), "value": {}}
    result |= {"machine": machine(request["device"]), "started": started, "wall_s": time.perf_counter() - clock}
    write_json(Path(request["results"]) / f"{request['key']}.json", result)
    return result


def reason_of(error: BaseException) -> str:
    """Return one line that says what happened."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 400 else f"{text[:397]}..."
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"out of memory: {text or type(error).__name__}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def finite(value: Any) -> Any:
    """Return plain data in which every number that JSON cannot hold is None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def model_factory(request: Request, vocab_size: int) -> ModelFactory:
    """Return what builds the candidate's model from a seed."""
    spec = load(request["spec"])

    def make(seed: int) -> nn.Module:
        return compile_spec(spec, vocab_size=vocab_size, seed=seed, device=request["device"])

    return make


def training_free(request: Request, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Return ``metrics``: name -> {mean, spread} over the initialisation seeds; ``unmeasured``: name -> why not."""
    context = MetricContext(
        make_model=model_factory(request, request["vocab_size"]),
        vocab_size=request["vocab_size"],
        figures=request["figures"],
        device=torch.device(request["device"]),
        seeds=tuple(range(request["seed"], request["seed"] + request["init_seeds"])),
    )
    metrics: list[Metric] = TypeAdapter(list[Metric]).validate_python(request["metrics"])
    found: dict[str, float] = {}
    unmeasured: dict[str, str] = {}
    for metric in metrics:
        try:
            found.update(metric.measure(context))
        except ArchspecError as error:  # the metric says that it is not defined for this model
            unmeasured[metric.kind] = str(error)
    spreads = {name for name in found if name.endswith("_spread") and name.removesuffix("_spread") in found}
    return {
        "metrics": {
            name: {"mean": value, "spread": found.get(f"{name}_spread", 0.0)}
            for name, value in found.items()
            if name not in spreads
        },
        "unmeasured": unmeasured,
    }


def short_train(request: Request, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Train on one task; return scores by split, the first seed's curve, and everything else in ``result``."""
    task: Task = TypeAdapter(Task).validate_python(request["task"])
    recipe = Recipe.model_validate(request["recipe"])
    make = model_factory(request, task.vocab_size)
    latest: dict[int, nn.Module] = {}  # the last model made from a seed is that of its full run

    def make_and_keep(seed: int) -> nn.Module:
        latest[seed] = make(seed)
        return latest[seed]

    def report(progress: Progress) -> None:
        if on_progress is not None:
            on_progress(finite(vars(progress)))

    tokens = request["tokens"] or tokens_in(request["seconds"], make, task, recipe, request["device"])
    result = train(
        make_and_keep, task, recipe, tokens, request["seed"], request["device"], report, _checkpoints(request)
    )
    if request["keep_weights"]:
        save_weights(latest[request["seed"]], Path(request["results"]) / f"{request['key']}.safetensors")
    name = request["task_name"]
    return {
        "task": name,
        "learning_rate": result.learning_rate,
        "tokens": result.tokens,
        "tokens_per_s": result.tokens_per_s,
        "device": result.device,
        "scores": _scores(name, result, "test"),
        "validation": _scores(name, result, "validation"),
        "curve": [
            {"tokens": point.tokens, "train_loss": point.train_loss, "score": point.validation}
            for point in result.runs[0].curve
        ],
        "result": result.model_dump(mode="json"),
    }


def _checkpoints(request: Request) -> Checkpoints:
    """Return where this training continues from, and where it leaves what the rung above continues from."""
    results, below, key = Path(request["results"]), request.get("continues"), request["key"]

    def load(seed: int) -> Checkpoint:
        return load_checkpoint(checkpoint_path(results, str(below), seed), request["device"])

    def save(seed: int, checkpoint: Checkpoint) -> None:
        save_checkpoint(checkpoint, checkpoint_path(results, key, seed))

    return Checkpoints(load if below else None, save if request.get("is_continued") else None)


def cost(request: Request, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Measure the compiled module; return ``cost``: figure -> {median, p20, p80, repeats}, and the conditions."""
    found = measure_cost(
        model_factory(request, request["vocab_size"]),
        request["vocab_size"],
        batch_size=request["batch_size"],
        sequence_length=request["sequence_length"],
        device=request["device"],
        precision=request["precision"],
        repeats=request["repeats"],
        limit_s=request["limit_s"],
        seed=request["seed"],
    )
    return {"cost": found.model_dump(mode="json")}


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights as safetensors, on the CPU, renamed into place."""
    from safetensors.torch import save

    from archspec.search.files import write_atomically

    # Tied weights appear once in named_parameters, and safetensors refuses shared storage.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.named_parameters()}
    tensors |= {name: tensor.detach().cpu().contiguous() for name, tensor in model.named_buffers()}
    write_atomically(path, lambda file: file.write(save(tensors)))


def _scores(task_name: str, result: TrainingResult, split: str) -> dict[str, dict[str, Any]]:
    found = {}
    for score in result.runs[0].test:
        values = [getattr(run, split)[score] for run in result.runs]
        found[score_name(task_name, score)] = {
            "mean": math.fsum(values) / len(values),
            "spread": stdev(values) if len(values) > 1 else 0.0,
            "interval": t_interval(values),
            "n": len(values),
        }
    return found


KINDS: dict[str, Callable[[Request, OnProgress | None], dict[str, Any]]] = {
    "training_free": training_free,
    "train": short_train,
    "cost": cost,
}
