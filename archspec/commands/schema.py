"""``archspec schema``: the JSON Schema of specs, for editors and other tools."""

from __future__ import annotations

import argparse
import json
from typing import Any

from archspec.errors import EXIT_OK


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("schema", help="print the JSON Schema of specs", description=__doc__)
    parser.add_argument("--plugin", action="append", metavar="MODULE", help="a module that defines components")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the schema."""
    from archspec.json_schema import spec_schema

    print(json.dumps(spec_schema(), indent=2))
    return EXIT_OK
