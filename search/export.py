"""A trained trial as a folder that stands alone: spec, weights, scores, environment, and how to load it."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archspec.errors import RunError, UsageError, unknown
from archspec.search.records import Run
from archspec.search.report.coordinates import coordinates
from archspec.search.report.figures import columns_of, entries_of, interval, with_spread
from archspec.search.report.spectext import spec_text
from archspec.search.report.text import clean
from archspec.search.trial import Trial

if TYPE_CHECKING:
    import torch

    from archspec.blocks.model import SequenceModel

SPEC = "spec.yaml"
WEIGHTS = "weights.safetensors"
SCORES = "scores.json"
ENVIRONMENT = "environment.json"
README = "README.md"
EMBEDDING = "embedding.weight"  # [vocab, D]: its first axis says for how many tokens the model was trained


def export(run: Run, trial: Trial, folder: str | Path, *, task: str | None = None, force: bool = False) -> Path:
    """Write a trial's export and return its folder. It is written beside and renamed: whole, or not there.

    Args:
        run, trial: what to export.
        folder: where to; it must not exist.
        task: whose weights, for a trial trained on several tasks; by default that of the first objective.
        force: replace an earlier export.

    Raises:
        RunError: the trial has no stored weights, or the folder is in the way.
        UsageError: the trial has weights, but not of this task.
    """
    target = Path(folder)
    weights = _weights(run, trial, task)
    _check_target(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside, old = (target.with_name(f".{target.name}.{what}.{os.getpid()}") for what in ("new", "old"))
    try:
        beside.mkdir()
        shutil.copyfile(trial.weights[weights], beside / WEIGHTS)
        (beside / SPEC).write_text(spec_text(trial.spec), encoding="utf-8")
        _write_json(beside / SCORES, _scores(run, trial, weights, _vocab_size(beside / WEIGHTS)))
        _write_json(beside / ENVIRONMENT, {**run.environment, "study": run.study, "command": run.command})
        (beside / README).write_text(_readme(run, trial, weights, target.name), encoding="utf-8")
        if target.exists():
            target.rename(old)
        beside.rename(target)
    except OSError as error:
        raise RunError(f"{target}: the export cannot be written ({error.strerror}); choose another folder") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_exported(folder: str | Path, *, device: str | torch.device = "cpu") -> SequenceModel:
    """Return the exported model with its trained weights, in evaluation mode.

    On the device it was trained on, its logits are bit for bit those of the model in the search.

    Args:
        folder: what ``archspec export`` wrote.
        device: where the module lives.

    Raises:
        RunError: a file is missing, or the weights are not those of the spec.
    """
    import torch
    from safetensors.torch import load_file

    from archspec.compiler import compile as compile_spec

    source = Path(folder)
    for name in (SPEC, WEIGHTS):
        if not (source / name).is_file():
            raise RunError(f"{source}: {name} is missing; required: a folder that 'archspec export' wrote")
    model = compile_spec(source / SPEC, vocab_size=_vocab_size(source / WEIGHTS), device=device)
    stored = load_file(source / WEIGHTS, device=str(device))
    wanted: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (stored, wanted)]
    if shapes[0] != shapes[1]:
        differ = sorted(name for name in stored.keys() | wanted.keys() if shapes[0].get(name) != shapes[1].get(name))
        raise RunError(f"{source}: {WEIGHTS} and {SPEC} disagree on {', '.join(differ[:5])}; export the trial again")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])
    return model.eval()


def _weights(run: Run, trial: Trial, task: str | None) -> str:
    """Return the task whose weights to export."""
    kept = trial.weights
    if not kept:
        others = [f"#{other.number} {other.name}" for other in run.trained if other.weights]
        have = f"trials that have: {', '.join(others[:8])}" if others else "no trial of this run has"
        why = f"it is {trial.state}" if trial.state != "trained" else "the search file says 'keep_weights: false'"
        raise RunError(f"{run.folder}: trial {trial.number} ({trial.name}) has no stored weights: {why}; {have}")
    if task is not None and task not in kept:
        raise UsageError(f"{run.folder}: trial {trial.number}: {unknown('task with weights', task, kept)}")
    first = [objective.metric.split("/")[0] for objective in run.objectives]
    return task or next(name for name in (*first, *kept) if name in kept)


def _check_target(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not force:
        raise RunError(f"{target}: exists already; give another folder, or --force to replace an earlier export")
    if not (target / SPEC).is_file() or not (target / WEIGHTS).is_file():
        raise RunError(f"{target}: is not an export, so --force does not replace it; give another folder")


def _vocab_size(path: Path) -> int:
    """Read the vocabulary's size from the header of a safetensors file: its length in 8 bytes, then JSON."""
    with path.open("rb") as file:
        prefix = file.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        text = file.read(size) if 0 < size < 100_000_000 else b""
    try:
        return int(json.loads(text)[EMBEDDING]["shape"][0])
    except (ValueError, KeyError, IndexError):
        raise RunError(f"{path}: holds no tensor {EMBEDDING!r}; required: weights that archspec stored") from None


def _scores(run: Run, trial: Trial, task: str, vocab_size: int) -> dict[str, Any]:
    names = ("number", "name", "hash", "origin", "promoted_by", "scores", "validation", "training_free")
    found = {name: getattr(trial, name) for name in (*names, "figures", "cost", "families", "kernels", "note")}
    weights = {"task": task, "vocab_size": vocab_size, "file": WEIGHTS, "split": "best step on validation"}
    objectives = [objective.as_dict() for objective in run.objectives]
    return {"study": run.study, "trial": found, "weights": weights, "objectives": objectives}


def _readme(run: Run, trial: Trial, task: str, name: str) -> str:
    origin = f"Trial {trial.number} of the study {clean(run.study)}, trained on the task `{task}`."
    lines = [f"# {clean(trial.name)}", "", origin, ""]
    lines += ["```python", "import archspec", "", f"model = archspec.load_exported({name!r})  # a torch.nn.Module"]
    lines += ["logits = model(tokens).logits  # tokens: int64 [B, T]; logits: [B, T, vocab]", "```", ""]
    lines += ["## Coordinates", "", *(f"- `{item.where}`: {item.line()}" for item in coordinates(trial.spec)), ""]
    lines += _score_table(run, trial)
    files = {
        SPEC: "the architecture: `archspec explain spec.yaml`, or `archspec.compile('spec.yaml')` for fresh weights",
        WEIGHTS: "the trained weights, at the step that was best on validation",
        SCORES: "everything measured of this trial",
        ENVIRONMENT: "versions and machine of the search",
    }
    return "\n".join([*lines, "## Files", "", *(f"- `{file}`: {what}" for file, what in files.items()), ""])


def _score_table(run: Run, trial: Trial) -> list[str]:
    columns = [column for column in columns_of(run) if column.group in ("Objectives", "Test scores", "Size")]
    entries = entries_of(trial, columns)
    lines = ["## Scores", "", "| figure | value | 95% interval | runs |", "|---|---|---|---|"]
    for column in columns:
        entry = entries.get(column.key)
        if entry is not None:
            cells: Sequence[str] = (column.label, with_spread(entry, column.unit), interval(entry, column.unit))
            lines.append(f"| {' | '.join(cells)} | {entry.n} |")
    return [*lines, ""]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
