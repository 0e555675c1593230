"""The command line, one verb a file. Data goes to stdout, progress and errors to stderr.

Exit codes: 0 ok; 1 error; 2 usage or an invalid document; 3 no feasible trial; 130 interrupted and resumable.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import NoReturn

import archspec
from archspec.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_INVALID, ArchspecError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        _load_plugins(getattr(args, "plugin", None))
        return int(args.run(args))
    except ArchspecError as error:
        print(f"error: {error}" if "\n" not in str(error) else f"errors:\n{error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output went away (`archspec list | head`): nothing more can be said to anyone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every verb registered."""
    parser = Parser(
        prog="archspec",
        description="Sequence-model backbones as specs: check, compile to Triton-backed torch modules, search.",
        epilog="exit codes: 0 ok; 1 error; 2 usage or an invalid document; 3 no feasible trial; 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"archspec {archspec.__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=Parser)
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        importlib.import_module(f"{__name__}.{module}").register(verbs)
    return parser


class Parser(argparse.ArgumentParser):
    """A parser whose usage errors look like every other error of archspec."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print(f"error: {self.prog}: {message}", file=sys.stderr)
        sys.exit(EXIT_INVALID)


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    value = int(text) if text.strip().isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}; required: a whole number of at least 1")
    return value


def _load_plugins(names: Sequence[str] | None) -> None:
    if names:
        from archspec import catalog

        sys.path.insert(0, os.getcwd())  # a plug-in may lie beside the spec that uses it
        catalog.add_plugins(names)


if __name__ == "__main__":
    sys.exit(main())
