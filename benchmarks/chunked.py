"""Time the chunkwise torch forms beside two token loops of the same rule, on the CPU.

    python -m benchmarks.chunked --families linear,delta --length 512 --threads 1

Each case runs three forms on the same inputs: ``chunked``, the kernels' own form; ``reference``, the token loop that
tests hold it against; and ``loop``, a loop written here with as few tensor operations a token as the rule needs.
Outputs and gradients of all three are compared first; then rounds of all forms alternate, and the median with the
20th and 80th percentile is reported for forward alone (no gradient recorded) and for forward + backward.
Nothing is written unless --output names a file.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.chunked_cases import CASES, Case, Inputs
from benchmarks.chunked_rules import RULE_CASES

FORMS = ("chunked", "reference", "loop")
# fp32 over some hundred tokens: rounding of 6e-8 a token, and sums in another order.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3


@dataclass(frozen=True)
class Timing:
    """Wall time of one form: median and percentiles over the rounds, in milliseconds."""

    family: str
    case: str
    form: str
    direction: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int


def main(arguments: list[str] | None = None) -> int:
    """Check, time and print; return 0, or 1 when forms disagree."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    cases = [case for case in (*CASES, *RULE_CASES) if case.family in options.families]
    timings: list[Timing] = []
    for case in cases:
        problem = disagreement(case, options.length)
        if problem:
            print(f"{case.family} ({case.name}): {problem}", file=sys.stderr)
            return 1
        timings += time_case(case, options.length, options.rounds)
    report = as_json(timings, options.length) if options.json else as_table(timings, options.length)
    print(report)
    if options.output:
        Path(options.output).write_text(report + "\n")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    families = sorted({case.family for case in (*CASES, *RULE_CASES)})
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chunked", description=__doc__.split("\n\n")[0])
    parser.add_argument("--families", default=",".join(families), help=f"some of {', '.join(families)}")
    parser.add_argument("--length", type=int, default=512, help="T, tokens")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of every form")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", help="also write what is printed to this file")
    options = parser.parse_args(arguments)
    options.families = options.families.split(",")
    wrong = sorted(set(options.families) - set(families))
    if wrong:
        parser.error(f"unknown family {wrong[0]!r}; known: {', '.join(families)}")
    return options


def _run(case: Case, form: str, inputs: Inputs) -> Tensor:
    return getattr(case, form)(**inputs)  # type: ignore[no-any-return]


def disagreement(case: Case, length: int) -> str | None:
    """Return what differs between the forms' outputs or gradients, or None."""
    inputs = case.inputs(length)
    found: dict[str, tuple[Tensor, ...]] = {}
    for form in FORMS:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        o = _run(case, form, leaves)
        found[form] = (o.detach(), *torch.autograd.grad(o.square().mean(), list(leaves.values())))
    names = ["output", *(f"gradient of {name}" for name in inputs)]
    for form in ("chunked", "loop"):
        for name, x, y in zip(names, found[form], found["reference"], strict=True):
            error = float((x - y).norm() / y.norm())
            if not error < (OUTPUT_TOLERANCE if name == "output" else GRADIENT_TOLERANCE):
                return f"{form} and reference differ in the {name} by {error:.1e} of its norm"
    return None


def time_case(case: Case, length: int, rounds: int) -> list[Timing]:
    """Time every form, alternating between them, after one warm-up round."""
    inputs = {name: x.requires_grad_() for name, x in case.inputs(length).items()}

    def forward(form: str) -> None:
        with torch.no_grad():
            _run(case, form, inputs)

    def both(form: str) -> None:
        torch.autograd.backward(_run(case, form, inputs).square().mean())
        for x in inputs.values():
            x.grad = None

    timings = []
    for direction, run in (("forward", forward), ("forward + backward", both)):
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for n in range(rounds + 1):
            for form in FORMS:
                start = time.perf_counter()
                run(form)
                if n:
                    times[form].append((time.perf_counter() - start) * 1e3)
        for form in FORMS:
            timings.append(Timing(case.family, case.name, form, direction, *_percentiles(times[form]), rounds))
    return timings


def _percentiles(times: list[float]) -> tuple[float, float, float]:
    """Return the median and the 20th and 80th percentile."""
    if len(times) == 1:
        return (times[0],) * 3
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), fifths[0], fifths[-1]


def _versions() -> dict[str, str | int]:
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def as_json(timings: list[Timing], length: int) -> str:
    """Return the timings with length and versions as a JSON document."""
    return json.dumps({"length": length, **_versions(), "timings": [asdict(t) for t in timings]}, indent=2)


def as_table(timings: list[Timing], length: int) -> str:
    """Return the timings as a Markdown table with the factor of the chunked form over each loop."""
    said = ", ".join(f"{name} {value}" for name, value in _versions().items())
    rounds = timings[0].rounds if timings else 0
    lines = [
        f"T = {length}, fp32, CPU; {said}; median (p20 to p80) of {rounds} rounds, ms",
        "",
        "| family | case | direction | chunked | reference loop | tight loop | over reference | over tight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for start in range(0, len(timings), len(FORMS)):
        of = {t.form: t for t in timings[start : start + len(FORMS)]}
        first = timings[start]
        cells = [f"{of[f].median_ms:.1f} ({of[f].p20_ms:.1f} to {of[f].p80_ms:.1f})" for f in FORMS]
        ratios = [f"{of[f].median_ms / of['chunked'].median_ms:.1f}x" for f in FORMS[1:]]
        lines.append("| " + " | ".join([first.family, first.case, first.direction, *cells, *ratios]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
