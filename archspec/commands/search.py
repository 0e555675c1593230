"""``archspec search FILE``: search a space of specs; the same command continues a search that was stopped or killed.

Exit codes: 0 ok; 1 error; 2 usage or an invalid file; 3 no feasible candidate; 130 interrupted (Ctrl-C), to be
continued by the same command. A second Ctrl-C ends at once.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from archspec.commands import positive
from archspec.errors import EXIT_INTERRUPTED, EXIT_NO_FEASIBLE_TRIAL, EXIT_OK


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("search", help="search a space of specs", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="a search file, or a shipped search's name")
    parser.add_argument("--trials", type=positive, metavar="N", help="distinct feasible candidates in all")
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds until the search stops, to be continued")
    parser.add_argument("--workers", type=positive, metavar="N", help="worker processes (default: one per core or GPU)")
    parser.add_argument("--device", help="cpu, cuda, or one GPU: cuda:1")
    parser.add_argument("--seed", type=int, help="replaces the file's seed")
    parser.add_argument("--study", metavar="NAME", help="replaces the file's study: the name of the run's folder")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="where runs lie (runs/)")
    parser.add_argument("--executor", default="local", help="local (default), inprocess or ray: where evaluations run")
    parser.add_argument(
        "--address", metavar="A", help="a running Ray cluster's address, or auto (default: this machine)"
    )
    parser.add_argument(
        "--storage", metavar="URL", help="a database for the study, such as postgresql://user@host/name"
    )
    parser.add_argument("--plugin", action="append", metavar="MODULE", help="a module that defines components")
    parser.add_argument("--dry-run", action="store_true", help="show the space, samples, kernels and cost; run nothing")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="A.B=C", help="override a value of the file"
    )
    parser.add_argument("--json", action="store_true", help="data instead of text")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search, or say what would be searched."""
    if args.dry_run:
        return _dry_run(args)
    from archspec.search.entry import run as run_search
    from archspec.search.progress import Progress

    with Progress(quiet=args.quiet) as progress:
        result = run_search(
            args.file,
            trials=args.trials,
            timeout=args.timeout,
            workers=args.workers,
            device=args.device,
            seed=args.seed,
            study=args.study,
            runs_dir=args.runs_dir,
            executor=args.executor,
            address=args.address,
            storage=args.storage,
            overrides=args.overrides,
            on_event=progress,
            on_start=progress.attach,
            command=_command(args),
        )
    return finish(result, _command(args), as_json=args.json)


def finish(result: Any, command: str, *, as_json: bool) -> int:
    """Show what a search found; return the exit code."""
    _show(result, as_json)
    if result.status == "interrupted":
        print(f"interrupted; continue with: {command}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if not result.feasible:
        reasons = "; ".join(f"{rule} ({count})" for rule, count in result.run.counts.rejected.items())
        print(f"error: no feasible candidate in {result.run.counts.sampled} draws: {reasons}", file=sys.stderr)
        return EXIT_NO_FEASIBLE_TRIAL
    return EXIT_OK


def _show(result: Any, as_json: bool) -> None:
    from archspec.search.report.tables import by_first_objective, front_lines, run_data, trial_data
    from archspec.search.report.text import console, show
    from archspec.search.survey import survey

    standing = survey(result.run)
    if as_json:
        data = run_data(result.run, standing) | {"status": result.status, "report": str(result.report)}
        data["trials"] = [trial_data(trial, result.run, standing) for trial in result.trials]
        data["correlations"] = [vars(item) for item in result.run.correlations]
        print(json.dumps(data, indent=2))
        return
    if result.run.trained:
        out = console()
        front = [trial for trial in by_first_objective(result.run) if trial.number in standing.front]
        show(front_lines(result.run, standing, front, out.width), out)
    print(f"report: {result.report}")


def _dry_run(args: argparse.Namespace) -> int:
    from archspec.search.dryrun import dry_run
    from archspec.search.searchfile import load_search_file

    changes = {"trials": args.trials, "workers": args.workers, "device": args.device, "seed": args.seed}
    found = dry_run(load_search_file(args.file, args.overrides, changes={**changes, "study": args.study}))
    if args.json:
        print(json.dumps(found.data(), indent=2))
    else:
        _print_dry_run(found)
    return EXIT_OK if found.accepted else EXIT_NO_FEASIBLE_TRIAL


def _print_dry_run(found: Any) -> None:
    from archspec.search.progress import duration
    from archspec.search.report.spectext import spec_text

    continuous = f", times {found.size.continuous} continuous parameters" if found.size.continuous else ""
    print(f"space        {found.size.settings:,} settings of {found.size.discrete} discrete parameters{continuous}")
    print(f"draws        {found.draws}: {found.acceptance_rate:.0%} accepted, {found.distinct} distinct architectures")
    for rule, count in found.rejected.items():
        print(f"  rejected   {count}  {rule}: {found.reasons[rule]}")
    print("kernels")
    for summary, count in found.kernels.items():
        print(f"  {count:>4}  {summary}")
    for item in found.baselines:
        print(f"baseline     {item.name}: {item.candidate.plan.summary()}; {item.note}")
    stages = ", ".join(f"{count} x {stage.partition('/')[2]}" for stage, count in found.evaluations.items())
    print(f"evaluations  {stages}")
    print(f"estimate     {duration(found.seconds)} on the workers at hand, from a few measured steps")
    for item in found.samples:
        figures = ", ".join(f"{name} {value:,.0f}" for name, value in item.figures.items() if ":" not in name)
        print(f"\n# {item.hash}: {figures}\n{spec_text(item.document)}", end="")


def _command(args: argparse.Namespace) -> str:
    """Return the command that continues this run."""
    words = ["archspec", "search", args.file]
    for flag in ("trials", "timeout", "workers", "device", "seed", "study", "storage"):
        value = getattr(args, flag)
        words += [] if value is None else [f"--{flag}", str(value)]
    words += [] if args.runs_dir == Path("runs") else ["--runs-dir", str(args.runs_dir)]
    words += [] if args.executor == "local" else ["--executor", args.executor]
    words += [] if args.address is None else ["--address", args.address]
    for name in args.plugin or []:
        words += ["--plugin", name]
    for text in args.overrides:
        words += ["--set", text]
    return shlex.join(words)
