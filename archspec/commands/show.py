"""``archspec show RUN TRIAL``: one trial of a search: spec, coordinates, scores, curves, cost, kernels and files."""

from __future__ import annotations

import argparse
import json
from typing import Any

from archspec.errors import EXIT_OK


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("show", help="show one trial of a search", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN", help="a run's folder, or the name of a study under runs/")
    parser.add_argument("trial", metavar="TRIAL", help="a trial's number, name, or the start of its hash")
    parser.add_argument("--json", action="store_true", help="data instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the trial."""
    from archspec.search.report.lookup import find_run, find_trial
    from archspec.search.report.tables import trial_data, trial_lines
    from archspec.search.report.text import console, show
    from archspec.search.survey import survey

    found = find_run(args.run_dir)
    trial = find_trial(found, args.trial)
    standing = survey(found)
    if args.json:
        print(json.dumps(trial_data(trial, found, standing, full=True), indent=2))
        return EXIT_OK
    out = console()
    show(trial_lines(trial, found, standing, out.width), out)
    return EXIT_OK
