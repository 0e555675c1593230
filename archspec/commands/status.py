"""``archspec status RUN``: how far a search is: counts, what is running, the last event, the best so far."""

from __future__ import annotations

import argparse
import json
from typing import Any

from archspec.errors import EXIT_OK


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("status", help="show how far a search is", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN", help="a run's folder, or the name of a study under runs/")
    parser.add_argument("--json", action="store_true", help="data instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the state of the run."""
    from archspec.search.report.lookup import find_run
    from archspec.search.report.tables import best, run_data, running, status_lines
    from archspec.search.report.text import console, show
    from archspec.search.survey import survey

    found = find_run(args.run_dir)
    standing = survey(found)
    if args.json:
        data = run_data(found, standing)
        data |= {"workers": found.workers, "device": found.device, "trials_wanted": found.trials_wanted}
        data |= {"running": running(found), "best": dict(best(found))}
        print(json.dumps(data, indent=2))
        return EXIT_OK
    out = console()
    show(status_lines(found, standing, out.width), out)
    return EXIT_OK
