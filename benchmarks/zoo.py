"""Train every shipped model on text at one size, and lay the results beside the transformer's.

    python -m benchmarks.zoo --output benchmarks/results/zoo_training.json

Each model keeps its choices and counts; its width is solved for the wanted number of non-embedding parameters, as
baselines of a search are. All see the same windows of the standard library's source in the same order, with one seed
and one learning rate: the figure says that a model trains and does not diverge, not which one is best.

The file is written after every model. A model that is in it at the same settings, and has not changed since, is not
trained again. Those that
run as the token-by-token recurrence come last. Beside NAME.json a table is written to NAME.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import platform
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import archspec
from archspec import complexity, loading, lowering
from archspec.canonical import architecture_hash
from archspec.search.baselines import resized
from archspec.search.families import ModelFactory
from archspec.search.recipe import Recipe
from archspec.search.tasks.text import TextModelling
from archspec.search.training import TrialDiverged, device_name, train

BESIDE = "transformer"
SCORE = "text/bits_per_byte"
VOCAB_SIZE = 256
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """What all models have in common.

    Args:
        parameters: non-embedding parameters to come close to.
        steps: training steps, of ``batch_size`` windows of ``length`` bytes.
        test_tokens: bytes that the final score is taken on.
    """

    parameters: int = 300_000
    steps: int = 200
    batch_size: int = 8
    length: int = 128
    learning_rate: float = 2e-3
    test_tokens: int = 32_768
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Training tokens of one model."""
        return self.steps * self.batch_size * self.length


def main(arguments: list[str] | None = None) -> int:
    """Train what is missing from the file; return 0, or 1 when a model diverged."""
    options, settings = _parse(arguments)
    output = Path(options.output)
    results = recorded(output, settings)
    missing = [name for name in options.models if name not in results]
    for name, found in _trained_all(missing, settings, options):
        results[name] = found
        write(results, settings, output)
        print(f"{name}: {_line(found)}", flush=True)
    diverged = [name for name, found in results.items() if "diverged" in found]
    print(f"{len(results)} trained, {len(diverged)} diverged{': ' if diverged else ''}{', '.join(diverged)}")
    return 1 if diverged else 0


def _trained_all(
    names: list[str], settings: Settings, options: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each model's result as it comes: one after another, or in several processes."""
    if options.processes == 1:
        torch.set_num_threads(options.threads)
        for name in names:
            yield name, trained(name, settings, options.device)
        return
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    threads = (options.threads,)
    with ProcessPoolExecutor(options.processes, context, initializer=torch.set_num_threads, initargs=threads) as pool:
        running = {pool.submit(trained, name, settings, options.device): name for name in names}
        for future in as_completed(running):
            yield running[future], future.result()


def trained(name: str, settings: Settings, device: str = "cpu") -> dict[str, Any]:
    """Return one model's result: bits per byte on test, or why it diverged."""
    path = loading.find(name, Path())
    document = loading.resolve(loading.read(path), path.parent)
    document, note = resized(document, settings.parameters, VOCAB_SIZE)
    spec = loading.validate(document)
    recipe = Recipe(
        learning_rates=(settings.learning_rate,),
        batch_size=settings.batch_size,
        eval_every_tokens=settings.tokens,
        eval_tokens=settings.batch_size * settings.length,
        test_tokens=settings.test_tokens,
    )
    task = TextModelling(sequence_length=settings.length)
    common = {
        "architecture": architecture_hash(loading.load(name)),
        "parameters": complexity.predict(spec, VOCAB_SIZE).non_embedding_parameters,
        "steps": settings.steps,
        "tokens": settings.tokens,
        "device": device_name(torch.device(device)),
        "size": note,
    }
    try:
        result = train(_factory(spec), task, recipe, settings.tokens, settings.seed, device)
    except TrialDiverged as diverged:
        return {"diverged": str(diverged), **common}
    return {"bits_per_byte": round(result.runs[0].test[SCORE], 4), **common, "seconds": round(result.wall_s, 1)}


def recorded(output: Path, settings: Settings) -> Results:
    """Return the models of an earlier run at the same settings; none when there is no such file."""
    if not output.exists():
        return {}
    found = json.loads(output.read_text())
    if found["settings"] != asdict(settings):
        raise SystemExit(f"{output}: written with other settings ({found['settings']}); name another --output")
    return {name: row for name, row in found["models"].items() if _is_current(name, row)}


def _is_current(name: str, row: dict[str, Any]) -> bool:
    """Whether a shipped model is still the architecture that was trained."""
    return name in shipped() and row.get("architecture", "") in ("", architecture_hash(loading.load(name)))


def write(results: Results, settings: Settings, output: Path) -> None:
    """Write the results as JSON and, beside it, as a table."""
    ordered = {name: results[name] for name in sorted(results)}
    missing = [name for name in shipped() if name not in results]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    found = {"settings": asdict(settings), "versions": versions, "models": ordered, "not_run": missing}
    output.write_text(json.dumps(found, indent=2) + "\n")
    output.with_suffix(".md").write_text(as_table(ordered, missing, settings))


def as_table(results: Results, missing: Iterable[str], settings: Settings) -> str:
    """Return the results as Markdown, best first, each beside the transformer's."""
    beside = results.get(BESIDE, {}).get("bits_per_byte")
    lines = [
        "# Every shipped model, trained on text",
        "",
        f"`python -m benchmarks.zoo`: {settings.steps} steps of {settings.batch_size} x {settings.length} bytes "
        f"({settings.tokens:,} tokens) of the standard library's source, about {settings.parameters:,} non-embedding "
        f"parameters, peak learning rate {settings.learning_rate:g}, seed {settings.seed}. One seed and one rate, far "
        "from convergence: it shows that a model trains, not which is best. Seconds are wall time, beside whatever "
        "else ran on the machine.",
        "",
        f"| model | bits per byte | beside {BESIDE} | parameters | seconds | device |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in sorted(results.items(), key=lambda item: item[1].get("bits_per_byte", float("inf"))):
        score = found.get("bits_per_byte")
        shown = "diverged" if score is None else f"{score:.3f}"
        difference = "" if score is None or beside is None else f"{score - beside:+.3f}"
        cells = (name, shown, difference, f"{found['parameters']:,}", f"{found.get('seconds', '')}", found["device"])
        lines.append(f"| {' | '.join(cells)} |")
    missing = ", ".join(missing)
    return "\n".join([*lines, "", f"Not run: {missing}." if missing else "All shipped models are in the table.", ""])


@functools.cache
def shipped() -> tuple[str, ...]:
    """Return the shipped models' names, those that run token by token last."""
    names = sorted(path.stem for path in loading.MODELS.glob("*.yaml"))
    return tuple(sorted(names, key=lambda name: "recurrence" in " ".join(lowering.plan(loading.load(name)).kernels())))


def _factory(spec: Any) -> ModelFactory:
    return lambda seed: archspec.compile(spec, vocab_size=VOCAB_SIZE, seed=seed)


def _line(found: dict[str, Any]) -> str:
    if "diverged" in found:
        return str(found["diverged"])
    return f"{found['bits_per_byte']:.3f} bits per byte, {found['parameters']:,} parameters, {found['seconds']} s"


def _parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    default = Settings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", help="some shipped models, separated by commas (default: all)")
    parser.add_argument("--output", required=True, help="JSON file to write and to continue")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--processes", type=int, default=1, help="models trained at a time")
    for name, value in asdict(default).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default: {value}")
    options = parser.parse_args(arguments)
    known = shipped()
    options.models = options.models.split(",") if options.models else known
    wrong = sorted(set(options.models) - set(known))
    if wrong:
        parser.error(f"unknown model {wrong[0]!r}; known: {', '.join(sorted(known))}")
    return options, Settings(**{name: getattr(options, name) for name in asdict(default)})


if __name__ == "__main__":
    sys.exit(main())
