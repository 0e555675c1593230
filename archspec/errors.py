"""The errors archspec raises on purpose, and the exit codes the command line gives them.

Every message says where, what was found, what is required and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_INVALID = 2
EXIT_NO_FEASIBLE_TRIAL = 3
EXIT_INTERRUPTED = 130


class ArchspecError(Exception):
    """Base of every error that archspec raises on purpose; the command line prints it without a traceback."""

    exit_code = EXIT_ERROR


class ShapeError(ArchspecError, ValueError):
    """Tensors whose shapes, dtypes or devices do not fit an operation."""


class UnsupportedError(ArchspecError, ValueError):
    """A request that is meaningful but that the named backend, form or device cannot serve."""


class RunError(ArchspecError):
    """A run directory, study or export that cannot be read, written or resumed."""


class UsageError(ArchspecError, ValueError):
    """An option with a value that it cannot have, or options that do not go together."""

    exit_code = EXIT_INVALID


@dataclass(frozen=True, order=True)
class Problem:
    """One thing wrong with a document.

    Args:
        file: the document's path as the user gave it, or "<string>".
        line: line in that file, from 1; 0 when the problem belongs to the document as a whole.
        path: the dotted path in the document, such as ``blocks.main.mixer.bias``.
        message: what was found, what is required, and what to do.
    """

    file: str
    line: int
    path: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where} {self.path}: {self.message}" if self.path else f"{where}: {self.message}"


class SpecError(ArchspecError, ValueError):
    """One or more problems in a spec or search document, reported together."""

    exit_code = EXIT_INVALID

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[SpecError], tuple[tuple[Problem, ...]]]:
        return (type(self), (self.problems,))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name closest to ``name``, or "" when none is close."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown(noun: str, name: str, known: Iterable[str]) -> str:
    """Return the sentence for a name that is not among the known ones, with the nearest as a suggestion."""
    listed = sorted(known)
    return f"unknown {noun} {name!r}; known: {', '.join(listed) or 'none'}.{nearest(name, listed)}"
