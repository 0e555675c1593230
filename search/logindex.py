"""An index of a run's events: the state they add up to, beside the log, so that a large run opens at once.

    events.index    a header line, then the state as JSON

The header says how many bytes of the log the state covers and their SHA-256, what code folded them, and the SHA-256 of
the state itself. An index is used only where all of it holds: the log is read and hashed to that length every time, and
what was appended since is folded on top. So it never overrules the log: anything else makes it stale, and it is written
anew. Readers write it; the driver neither reads nor needs it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from archspec.search import eventlog, names, records, trial
from archspec.search.names import Objective
from archspec.search.records import Correlation, Run, correlation_from
from archspec.search.trial import Trial

INDEX = "events.index"
WORTH_BYTES = 1 << 20  # a log that grew by less is folded sooner than an index is written

_TRIAL_FIELDS = tuple(item.name for item in fields(Trial) if item.name != "folder")
_RUN_FIELDS = tuple(item.name for item in fields(Run) if item.name not in ("folder", "trials"))
_PAIRS, _SET, _OBJECTIVES, _CORRELATIONS = "pairs", "set", "objectives", "correlations"


@dataclass(frozen=True)
class Header:
    """What an index covers: ``log_bytes`` of the log with their digest, folded by ``code``, and the state's digest."""

    log_bytes: int
    log_sha256: str
    code: str
    state_sha256: str


def open_run(folder: Path) -> Run:
    """Return the run of a folder, from its index where that holds, and from its whole log otherwise.

    Raises:
        RunError: when the log is damaged, or was written by another version.
    """
    text = (folder / eventlog.EVENTS).read_bytes()
    whole = text[: text.rfind(b"\n") + 1]  # a last line that was never finished is left out
    run, covered = _indexed(folder, whole)
    for event in eventlog.parse_events(whole[covered:], folder / eventlog.EVENTS, 1 + whole.count(b"\n", 0, covered)):
        run.apply(event)
    if len(whole) - covered >= WORTH_BYTES:
        _write(folder, run, whole)
    return run


def encode(run: Run) -> bytes:
    """Return a run's state as JSON. What is inside its fields came from JSON; only the fields' own types are kept."""
    data = {name: _packed(getattr(run, name)) for name in _RUN_FIELDS}
    trials = [[_packed(getattr(item, name)) for name in _TRIAL_FIELDS] for item in run.trials.values()]
    return json.dumps({"run": data, "trials": trials}, separators=(",", ":"), allow_nan=False).encode()


def decode(text: bytes, folder: Path) -> Run:
    """Return the run that ``encode`` was given, for its folder."""
    data = json.loads(text)
    run = Run(folder, **{name: _unpacked(value) for name, value in data["run"].items()})
    for row in data["trials"]:
        item = Trial(**{name: _unpacked(value) for name, value in zip(_TRIAL_FIELDS, row, strict=True)}, folder=folder)
        run.trials[item.number] = item
    return run


def _indexed(folder: Path, log: bytes) -> tuple[Run, int]:
    """Return the state that the index holds and how much of the log it covers; an empty run where it does not hold."""
    path = folder / INDEX
    if len(log) < WORTH_BYTES or not path.is_file():
        return Run(folder), 0
    first, _, state = path.read_bytes().partition(b"\n")
    try:
        header = Header(**json.loads(first))
    except (ValueError, TypeError):  # not a header: torn, or another version's
        return Run(folder), 0
    covers = header.log_bytes <= len(log) and header.log_sha256 == _digest(memoryview(log)[: header.log_bytes])
    if not covers or header.code != _code() or header.state_sha256 != _digest(state):
        return Run(folder), 0
    return decode(state, folder), header.log_bytes


def _write(folder: Path, run: Run, log: bytes) -> None:
    """Write the index beside and rename it: a reader sees all of it or none."""
    state = encode(run)
    header = Header(len(log), _digest(log), _code(), _digest(state))
    beside = folder / f".{INDEX}.{os.getpid()}"
    try:
        beside.write_bytes(json.dumps(vars(header)).encode() + b"\n" + state)
        beside.replace(folder / INDEX)
    except OSError:
        return  # a run that cannot be written to, an archive or a full disk, is read from its log, only slower
    finally:
        if os.access(folder, os.W_OK):
            beside.unlink(missing_ok=True)


def _packed(value: Any) -> Any:
    if isinstance(value, set):
        return {_SET: sorted(value)}
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        return {_PAIRS: [[key, item] for key, item in value.items()]}
    if isinstance(value, list) and value and isinstance(value[0], Objective | Correlation):
        return {_OBJECTIVES if isinstance(value[0], Objective) else _CORRELATIONS: [vars(item) for item in value]}
    return {_PAIRS: list(map(list, value.items()))} if isinstance(value, dict) and len(value) == 1 else value


def _unpacked(value: Any) -> Any:
    if not isinstance(value, Mapping) or len(value) != 1:
        return value
    ((how, items),) = value.items()
    if how == _SET:
        return set(items)
    if how == _OBJECTIVES:
        return [Objective.from_dict(item) for item in items]
    if how == _CORRELATIONS:
        return [correlation_from(item) for item in items]
    return {tuple(key) if isinstance(key, list) else key: item for key, item in items}


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


@cache
def _code() -> str:
    """Return a digest of the code that folds events: another version's index is stale."""
    sources = [Path(str(module.__file__)) for module in (names, trial, records)]
    return _digest(b"".join(path.read_bytes() for path in (*sources, Path(__file__))))
