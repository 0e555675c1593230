"""``archspec export RUN TRIAL -o DIR``: a trained trial as a folder that stands alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from archspec.errors import EXIT_OK


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("export", help="write a trained trial as a folder of its own", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN", help="a run's folder, or the name of a study under runs/")
    parser.add_argument("trial", metavar="TRIAL", help="a trial's number, name, or the start of its hash")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="the folder to write")
    parser.add_argument("--task", metavar="NAME", help="whose weights (default: the first objective's task)")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the folder and print its name."""
    from archspec.search.export import export
    from archspec.search.report.lookup import find_run, find_trial

    found = find_run(args.run_dir)
    print(export(found, find_trial(found, args.trial), args.output, task=args.task, force=args.force))
    return EXIT_OK
