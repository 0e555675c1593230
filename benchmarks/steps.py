"""Time rules on a matrix in the form that their plan names beside one recorded step a token, on the CPU.

    python -m benchmarks.steps --length 512 --batch 1,8

Every case is a model of one layer, compiled twice: as ``archspec.compile`` plans it, and with the sequential family's
form of the same rule, from the same parameters. Logits and gradients are compared first; then rounds of both alternate,
and the medians are reported in tokens a second, for forward alone (no gradient recorded) and for forward + backward.
Nothing is written unless --output names a file.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import archspec
from archspec.blocks.mixer import MemoryMixerModule
from archspec.blocks.model import SequenceModel
from archspec.forms import form_of
from archspec.loading import load
from archspec.lowering import plan

HEADS, DIM, VOCABULARY = 2, 32, 256
# fp32 over some hundred tokens: rounding of 6e-8 a token, and sums in another order.
TOLERANCE = 1e-3

STEP = {"kind": "sigmoid", "scale": 0.2}
OPEN = {"kind": "sigmoid", "offset": 3}
DECAY = {"kind": "decay", "gate": OPEN}
TURNS = {"kind": "complex_decay", "gate": OPEN, "phase": "tanh"}
GD = {"kind": "gradient_descent", "step_size": STEP}
IMPLICIT = {"kind": "implicit", "step_size": STEP}


def _window(length: int, per: str = "head") -> dict[str, Any]:
    gate = {**OPEN, "per": per}
    window = {"length": length, "weights": "sigmoid"}
    return {"bias": {"kind": "l2", "window": window}, "retention": {"kind": "decay", "gate": gate}, "update": GD}


CASES: dict[str, dict[str, Any]] = {
    "window 2": _window(2),
    "window 4": _window(4),
    "window 8": _window(8),
    "window 4, decay per key": _window(4, "key"),
    "decay per value": {"retention": {"kind": "decay", "gate": {**OPEN, "per": "value"}}, "update": IMPLICIT},
    "step per value": {"retention": DECAY, "update": {**GD, "step_size": {**STEP, "per": "value"}}},
    "weights per value": {
        "bias": {"kind": "weighted_l2", "weights": {"kind": "sigmoid", "per": "value"}},
        "retention": DECAY,
        "update": GD,
    },
    "read before": {"retention": DECAY, "update": IMPLICIT, "readout": {"read": "before"}},
    "keys turn, together": {"retention": {**TURNS, "order": "together"}, "update": IMPLICIT},
    "values turn": {"retention": {**TURNS, "pairs": "value"}, "update": GD},
    "keys turn, momentum at an anchor": {
        "retention": TURNS,
        "update": {"kind": "momentum", "momentum": "sigmoid", "step_size": STEP, "anchor": 16},
    },
}


def models(choices: dict[str, Any]) -> tuple[str, SequenceModel, SequenceModel]:
    """Return the name of the planned form, the model that runs it, and the same with one recorded step a token."""
    mixer = {"num_heads": HEADS, "key_dim": DIM, "value_dim": DIM, "qk": {"norm": "l2"}, "memory": "matrix", **choices}
    document = {"name": "case", "model_dim": HEADS * DIM, "blocks": {"main": {"mixer": mixer}}, "layout": "main"}
    spec = load(document)
    decision = plan(spec).decisions["blocks.main.mixer"]
    if decision.family == "sequential":
        raise ValueError(f"{choices} is planned as {decision.name}")
    planned, stepped = (archspec.compile(spec, vocab_size=VOCABULARY) for _ in range(2))
    stepped.load_state_dict(planned.state_dict())
    for module in stepped.modules():
        if isinstance(module, MemoryMixerModule):
            module.form = form_of(replace(decision, family="sequential"))
    return decision.name, planned, stepped


def disagreement(planned: SequenceModel, stepped: SequenceModel, tokens: Tensor) -> str | None:
    """Return what differs between the models' logits or gradients, or None."""
    found = []
    for model in (planned, stepped):
        logits = model(tokens).logits
        logits.square().mean().backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"logits": logits.detach(), **gradients})
        model.zero_grad(set_to_none=True)
    for name, wanted in found[1].items():
        error = float((found[0][name] - wanted).norm() / wanted.norm())
        if not error < TOLERANCE:
            return f"{name} differs by {error:.1e} of its norm"
    return None


def measure(model: SequenceModel, tokens: Tensor, *, backward: bool) -> float:
    """Return the seconds of one pass."""
    start = time.perf_counter()
    if backward:
        model(tokens).logits.square().mean().backward()
        model.zero_grad(set_to_none=True)
    else:
        with torch.no_grad():
            model(tokens)
    return time.perf_counter() - start


def rows(name: str, batch: int, length: int, rounds: int) -> list[str]:
    """Return one case's rows of the table."""
    form, planned, stepped = models(CASES[name])
    tokens = torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))
    problem = disagreement(planned, stepped, tokens)
    if problem:
        raise ValueError(f"{name}: {problem}")
    found = []
    for direction, backward in (("forward", False), ("forward + backward", True)):
        times: tuple[list[float], list[float]] = ([], [])
        for n in range(rounds + 1):
            for model, kept in zip((planned, stepped), times, strict=True):
                seconds = measure(model, tokens, backward=backward)
                if n:
                    kept.append(seconds)
        fast, slow = (batch * length / statistics.median(kept) for kept in times)
        found.append(f"| {name} | {form} | {batch} | {direction} | {fast:,.0f} | {slow:,.0f} | {fast / slow:.1f}x |")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Check, time and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", default=",".join(CASES), help="some of the cases, by name")
    parser.add_argument("--length", type=int, default=512, help="T, tokens")
    parser.add_argument("--batch", default="1,8", help="batch sizes")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of either form")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", help="also write what is printed to this file")
    options = parser.parse_args(arguments)
    names = [name for name in CASES if name in options.cases]
    torch.set_num_threads(options.threads)
    lines = [
        f"T = {options.length}, {HEADS} heads of {DIM} x {DIM}, fp32, CPU, torch {torch.__version__}, "
        f"{options.threads} thread; medians of {options.rounds} alternating rounds, tokens a second",
        "",
        "| rule | planned form | batch | direction | planned | one step a token | factor |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        for batch in options.batch.split(","):
            lines += rows(name, int(batch), options.length, options.rounds)
            print(lines[-2], lines[-1], sep="\n", file=sys.stderr)
    report = "\n".join(lines)
    print(report)
    if options.output:
        Path(options.output).write_text(report + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
