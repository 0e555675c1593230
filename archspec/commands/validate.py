"""``archspec validate FILE...``: check specs and say what is wrong, at which line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from archspec.errors import EXIT_INVALID, EXIT_OK, SpecError


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("validate", help="check specs and search files", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="a spec, a search file, or a shipped model's name")
    parser.add_argument("--json", action="store_true", help="one JSON object a file, on stdout")
    parser.add_argument("--plugin", action="append", metavar="MODULE", help="a module that defines components")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check every file; the exit code is 2 when any is invalid."""
    from archspec import loading

    failed = False
    for file in args.files:
        problems: list[str] = []
        try:
            path = loading.find(file, Path.cwd())
            _check(loading, path)
        except SpecError as error:
            problems = [str(problem) for problem in error.problems]
        failed = failed or bool(problems)
        if args.json:
            print(json.dumps({"file": file, "valid": not problems, "problems": problems}))
        elif problems:
            print("\n".join(problems), file=sys.stderr)
        else:
            print(f"{file}: ok")
    return EXIT_INVALID if failed else EXIT_OK


def _check(loading: Any, path: Any) -> None:
    document = loading.read(path)
    if "study" in document or "space" in document:
        from archspec.search.searchfile import load_search_file

        load_search_file(path)
    else:
        loading.load(path)
