"""Draw random documents from the whole grammar, and hold every legal one to what a spec promises.

    python -m benchmarks.draws --draws 2000 --seed 0

A legal document must compile in fp32 and fp64; take one training step in fp32 with a finite loss and finite
gradients; give the same logits in fp64 from a whole sequence, from two stretches, token by token, and from the
recurrence that defines it; and be as large, and keep as many bytes, as predicted. How documents are drawn is said in
``benchmarks.drawing``. Reported are the share that is legal, every failure, and the share of the legal that runs
token by token, with the reasons. Exit code 1 when a legal document fails. Nothing is written unless --output names
a file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from archspec.composition import inside
from archspec.errors import SpecError
from archspec.loading import load
from archspec.lowering import decide, plan
from archspec.rule import Rule
from archspec.schema import MemoryMixer, Spec
from benchmarks.drawing import Drawer
from benchmarks.promises import Diverges, Failure, check

RICHNESS = 0.25
STRETCH = 25


@dataclass
class Tally:
    """What came of a number of draws."""

    drawn: int = 0
    legal: int = 0
    recurrent: int = 0
    sequential: int = 0
    avoidable: int = 0
    with_point: int = 0
    at_anchor: int = 0
    sequential_of_others: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    families: Counter[str] = field(default_factory=Counter)
    illegal: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    diverging: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def merge(self, other: Tally) -> None:
        """Count another tally's draws as well."""
        for one in fields(self):
            mine, more = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, Counter):
                mine.update(more)
            else:
                setattr(self, one.name, mine + more)

    def add(self, document: dict[str, Any], *, held: bool = True) -> None:
        """Load a document, plan it when it is legal, and hold it to its promises unless ``held`` is false."""
        self.drawn += 1
        try:
            spec = load(json.loads(json.dumps(document)))
        except SpecError as error:
            self.illegal.update({_sentence(str(problem)) for problem in error.problems})
            return
        self.legal += 1
        self._lowered(spec)
        if not held:
            return
        try:
            check(spec)
        except Diverges as found:
            self.diverging.append((str(found), document))
        except Failure as failure:
            self.failures.append((str(failure), document))
        except Exception as error:  # noqa: BLE001 - whatever a legal document raises is a finding, and is reported
            self.failures.append((f"{type(error).__name__}: {error}".split("\n")[0], document))

    def _lowered(self, spec: Spec) -> None:
        self.families.update({decision.family for decision in plan(spec).decisions.values()})
        mixers = [mixer for block in spec.blocks.values() for _, mixer in inside(block.mixer)]
        rules = [Rule.of(mixer, spec.model_dim) for mixer in mixers if isinstance(mixer, MemoryMixer)]
        decided = [(rule, decide(rule)) for rule in rules]
        slow = [(rule, decision) for rule, decision in decided if decision.family in ("sequential", "recurrence")]
        families = {decision.family for _, decision in slow}
        self.recurrent += "recurrence" in families
        self.sequential += families == {"sequential"}
        self.avoidable += any(not sequential(rule) for rule, _ in slow)
        self.reasons.update({f"{decision.family}: {decision.rejected[-1].reason}" for _, decision in slow})
        at_token, at_anchor = any(map(sequential, rules)), any(rule.update.anchor is not None for rule in rules)
        self.with_point += at_token or at_anchor
        self.at_anchor += at_anchor and not at_token
        self.sequential_of_others += bool(slow) and not at_token


def sequential(rule: Rule) -> bool:
    """Whether every token's gradient sees, through something nonlinear, weights that the token before has moved.

    It does where its evaluation point is the token, and not where it is an anchor. No exact form of such a rule treats
    tokens side by side; of all others one may exist.
    """
    if (
        rule.memory.grows
        or rule.update.anchor is not None
        or (rule.bias.error == "value" and rule.memory.kind == "matrix")
    ):
        return False
    bent = rule.bias.error == "nonlinear" or rule.retention.has_link or rule.update.kind == "muon"
    return rule.memory.kind != "matrix" or bent


def _sentence(problem: str) -> str:
    """Return a problem without its place, numbers and names, so that like problems count together."""
    return re.sub(r"\d+", "N", problem.partition(": ")[2])[:110]


def run(
    draws: int, seed: int | str, richness: float = RICHNESS, *, conditional: bool = True, held: bool = True
) -> Tally:
    """Draw a number of documents, and hold the legal ones to their promises unless ``held`` is false."""
    drawer, tally = Drawer(random.Random(seed), richness, conditional=conditional), Tally()
    for _ in range(draws):
        tally.add(drawer.draw(), held=held)
    return tally


def run_all(
    draws: int, seed: int, jobs: int, richness: float = RICHNESS, *, conditional: bool = True, held: bool = True
) -> Tally:
    """Draw in stretches with seeds of their own, so that the result does not depend on the number of processes."""
    sizes = [min(STRETCH, draws - start) for start in range(0, draws, STRETCH)]
    tally = Tally()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        stretches = [
            pool.submit(run, size, f"{seed}/{index}", richness, conditional=conditional, held=held)
            for index, size in enumerate(sizes)
        ]
        for stretch in stretches:
            tally.merge(stretch.result())
    return tally


def report(tally: Tally, seed: int, seconds: float, *, held: bool = True) -> str:
    """Return the result as Markdown; documents that were only planned have no row of failures."""
    drawn, legal = tally.drawn, max(1, tally.legal)
    others = max(1, tally.legal - (tally.with_point - tally.at_anchor))
    lines = [
        "# Random draws from the grammar",
        "",
        f"`python -m benchmarks.draws --draws {tally.drawn} --seed {seed}{'' if held else ' --planned'}`; "
        f"torch {torch.__version__}, CPU, "
        f"{seconds:.0f} s.",
        "",
        "Each coordinate is drawn from the values that are legal for it beside the four kinds alone; what coordinates",
        "mean for each other is left to chance. Nothing is drawn again because a document turned out illegal. Left out",
        "are cells (a graph of nodes is legal only as a whole) and what routed memories share.",
        "",
        "| figure | found |",
        "|---|---|",
        f"| drawn | {drawn:,} |",
        f"| legal | {tally.legal:,} ({tally.legal / drawn:.1%}) |",
        *(_held(tally) if held else ["| legal and run | none: planned only |"]),
        f"| legal and left to the recurrence that defines them | {tally.recurrent:,} ({tally.recurrent / legal:.1%}) |",
        f"| legal and one recorded step a token (family sequential) | {tally.sequential:,} "
        f"({tally.sequential / legal:.1%}) |",
        f"| legal, one token after another in either way, with a rule that is not so by nature | {tally.avoidable:,} "
        f"({tally.avoidable / legal:.1%}) |",
        f"| legal, with a rule for which the evaluation point makes another function | {tally.with_point:,} |",
        f"| ... drawn at an anchor | {tally.at_anchor:,} |",
        f"| ... drawn at the token: sequential by nature | {tally.with_point - tally.at_anchor:,} |",
        f"| of all others, one token after another | {tally.sequential_of_others:,} "
        f"({tally.sequential_of_others / others:.1%}) |",
        "",
        "A rule is sequential by nature when each token's gradient sees, through something nonlinear (a network, a",
        "loss that is not a square, a link, Muon), weights that the token before has moved: no exact form treats such",
        "tokens side by side. Where gradients are taken (at the token, or at an anchor that several tokens share) is a",
        "coordinate, drawn evenly.",
    ]
    for title, counts in (
        ("Legal documents by family (a document may have several)", tally.families),
        ("Why documents run one token after another: what the family before says", tally.reasons),
        ("Why documents are illegal", tally.illegal),
    ):
        lines += ["", f"## {title}", "", "| documents | |", "|---|---|"]
        lines += [f"| {count:,} | {name} |" for name, count in counts.most_common(20)]
    for title, found in (("Failures", tally.failures), ("Diverging", tally.diverging)):
        if found:
            lines += ["", f"## {title}", ""]
            lines += [f"- {message}\n  `{json.dumps(document)}`" for message, document in found]
    return "\n".join(lines)


def _held(tally: Tally) -> list[str]:
    """Return the rows on documents that were run."""
    return [
        f"| legal and failing | {len(tally.failures):,} |",
        f"| legal and diverging by their own equations (not held to agreement) | {len(tally.diverging):,} "
        f"({len(tally.diverging) / max(1, tally.legal):.1%}) |",
    ]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.draws", description=__doc__)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes; the result does not depend on it")
    parser.add_argument("--richness", type=float, default=RICHNESS, help="how likely an optional key is written")
    parser.add_argument("--blind", action="store_true", help="draw from the JSON Schema alone, without conditions")
    parser.add_argument("--planned", action="store_true", help="load and plan only; run nothing")
    parser.add_argument("--output", type=Path, help="write the report here as well")
    args = parser.parse_args()
    start = time.perf_counter()
    held = not args.planned
    tally = run_all(args.draws, args.seed, args.jobs, args.richness, conditional=not args.blind, held=held)
    text = report(tally, args.seed, time.perf_counter() - start, held=held)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
