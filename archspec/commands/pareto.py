"""``archspec pareto RUN``: the front of a search, its hypervolume and rank correlations; rewrites the report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archspec.errors import EXIT_OK, RunError, UsageError

if TYPE_CHECKING:
    from archspec.search.records import Run


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("pareto", help="show the Pareto front of a search", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN", help="a run's folder, or the name of a study under runs/")
    parser.add_argument(
        "--objectives",
        metavar="A,B,...",
        help="the front over these instead: final scores, figures, measured costs or training-free metrics; "
        "NAME:max or NAME:min states the direction",
    )
    parser.add_argument(
        "--reference",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="the hypervolume's reference point on an objective (default: the search file's, else the worst known)",
    )
    parser.add_argument("--all", action="store_true", help="every compared trial, not the front alone")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="write the report here too")
    parser.add_argument("--json", action="store_true", help="data instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the front and write the report; the run's own report keeps the search file's objectives."""
    from archspec.search.report import REPORT, save_report
    from archspec.search.report.lookup import find_run
    from archspec.search.report.tables import by_first_objective, front_lines, run_data, trial_data
    from archspec.search.report.text import console, show
    from archspec.search.survey import survey

    found = find_run(args.run_dir)
    own = None if args.objectives else found.folder / REPORT
    found, worst = _along(found, args)
    standing = survey(found)
    if not standing.trials:
        counts = found.counts
        raise RunError(
            f"{found.folder}: no trial is trained yet ({counts.evaluated} evaluated, {counts.failed} failed); "
            f"required: at least one. See 'archspec status {found.folder}', or continue the search"
        )
    shown = [trial for trial in by_first_objective(found) if args.all or trial.number in standing.front]
    paths = [save_report(found, path, standing) for path in (own, args.output) if path is not None]
    if args.json:
        data = run_data(found, standing)
        data["trials"] = [trial_data(trial, found, standing) for trial in shown]
        data["correlations"] = [vars(item) for item in found.correlations]
        data["hypervolume_history"] = [vars(moment) for moment in standing.history]
        data["worst_as_reference"] = worst
        data["report"] = [str(path) for path in paths]
        print(json.dumps(data, indent=2))
        return EXIT_OK
    out = console()
    show(front_lines(found, standing, shown, out.width, worst), out)
    if paths:
        print(f"report: {', '.join(map(str, paths))}", file=sys.stderr)
    return EXIT_OK


def _along(found: Run, args: argparse.Namespace) -> tuple[Run, list[str]]:
    from archspec.search.report.axes import along

    references = {}
    for text in args.reference:
        name, _, value = text.partition("=")
        try:
            references[name] = float(value)
        except ValueError:
            raise UsageError(f"--reference {text}: required: NAME=VALUE, such as recall/accuracy=0.0") from None
    if args.objectives is None:
        if references:
            raise UsageError("--reference belongs to --objectives: a run keeps the reference point of its search file")
        return found, []
    return along(found, [name.strip() for name in args.objectives.split(",")], references)
