"""``archspec replay RUN``: derive every decision of a search again from its log of completions, and compare.

Nothing is evaluated. Exit code 0 when draws, promotions and rounds all come out as logged; 1 at the first difference.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from archspec.errors import EXIT_OK


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("replay", help="derive a search's decisions again from its log", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN", help="a run's folder, or the name of a study under runs/")
    parser.add_argument("--plugin", action="append", metavar="MODULE", help="a module that defines components")
    parser.add_argument("--json", action="store_true", help="data instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Replay, and say what was verified."""
    from archspec.search.rerun import replay_run

    folder = Path(args.run_dir)
    found = replay_run(folder if folder.is_dir() else Path("runs") / args.run_dir)
    if args.json:
        print(json.dumps({"verified": found.verified}))
    else:
        print(f"{found.total} events derived again, all as logged")
        for name, count in found.verified.items():
            print(f"  {count:>6}  {name}")
    return EXIT_OK
