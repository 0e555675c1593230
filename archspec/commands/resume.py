"""``archspec resume RUN``: continue a search that was stopped or killed, from its folder alone.

Everything that decides what is found comes from the run's frozen search file; executor, address, workers and plug-ins
from the command that drove it last, unless said otherwise here. Exit codes are those of ``archspec search``.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from archspec.commands import positive


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("resume", help="continue a search from its folder", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN", help="a run's folder, or the name of a study under runs/")
    parser.add_argument("--trials", type=positive, metavar="N", help="distinct feasible candidates in all")
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds until the search stops, to be continued")
    parser.add_argument("--workers", type=positive, metavar="N", help="evaluations at a time")
    parser.add_argument("--executor", help="local, inprocess or ray (default: as before)")
    parser.add_argument("--address", metavar="A", help="a running Ray cluster, or auto (default: as before)")
    parser.add_argument("--plugin", action="append", metavar="MODULE", help="a module that defines components")
    parser.add_argument("--json", action="store_true", help="data instead of text")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Continue the run."""
    from archspec import catalog
    from archspec.commands.search import finish
    from archspec.search.entry import run as run_search
    from archspec.search.progress import Progress
    from archspec.search.report.lookup import find_run
    from archspec.search.rundir import ENVIRONMENT, SEARCH

    found = find_run(args.run_dir)
    before = _before(found.command)
    catalog.add_plugins([*(getattr(before, "plugin", None) or []), *(args.plugin or [])])
    environment = json.loads((found.folder / ENVIRONMENT).read_bytes())
    executor = args.executor or getattr(before, "executor", "local")
    command = shlex.join(["archspec", "resume", args.run_dir])
    with Progress(quiet=args.quiet) as progress:
        result = run_search(
            found.folder / SEARCH,
            run_dir=found.folder,
            relative_to=Path(environment.get("search_folder", found.folder)),
            trials=args.trials or found.trials_wanted or None,
            timeout=args.timeout,
            workers=args.workers or getattr(before, "workers", None),
            executor=executor,
            address=args.address or (getattr(before, "address", None) if executor == "ray" else None),
            on_event=progress,
            on_start=progress.attach,
            command=found.command or command,
        )
    return finish(result, command, as_json=args.json)


def _before(command: str) -> argparse.Namespace:
    """Return the arguments of the command that drove the run last; empty for a run from Python."""
    from archspec.commands import build_parser

    words = shlex.split(command)[1:]
    return build_parser().parse_args(words) if words[:1] == ["search"] else argparse.Namespace()
