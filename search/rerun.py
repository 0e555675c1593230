"""Replay: take every decision of a run again, from its search file and the evaluations in its log, and compare.

The run's own driver does it, in a folder of its own, with an executor that evaluates nothing: evaluations finish in the
order in which they did, with the results that they had, measured times included. Every event that is a decision or a
completion must come out as it stands in the log, in the same order; starts, deaths and pauses may differ. Re-scoring
a front on fresh seeds decides nothing, and is left out.

Where the space grew, the log is replayed in parts, each by a driver with the search file of its time, which goes on in
the folder of the one before.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from archspec.errors import RunError
from archspec.search.driver import Driver, Limits
from archspec.search.eventlog import EVENTS, Event, read_events
from archspec.search.executors import Outcome, Request
from archspec.search.records import RECHECK
from archspec.search.rundir import ENVIRONMENT, SEARCH, RunFolder
from archspec.search.searchfile import load_search_file

DECISIONS = ("round", "proposed", "rejected", "exhausted", "promoted", "finished", "closed")
DRAWN = ("proposed", "rejected", "exhausted")
IGNORED = ("time", "wall_s", "reused")
MANY = 1 << 30
ALONE = ("storage=null", "cache=null", "recheck=null")


@dataclass(frozen=True)
class Replay:
    """What a replay found: how many events were derived again and equal, by kind."""

    verified: dict[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.verified.values())


class _Done(Exception):  # noqa: N818 - a way out, not an error
    """The log has been replayed to its end."""


def replay_run(folder: Path) -> Replay:
    """Derive the decisions of a run again.

    Raises:
        RunError: at the first one that differs, or when the folder is no run.
    """
    if not (folder / EVENTS).is_file() or not (folder / SEARCH).is_file():
        raise RunError(f"{folder}: no run here ({EVENTS} or {SEARCH} is missing)")
    environment = folder / ENVIRONMENT
    known = json.loads(environment.read_bytes()) if environment.is_file() else {}
    beside = Path(known.get("search_folder", folder))
    verified: Counter[str] = Counter()
    with TemporaryDirectory() as temporary:
        shared = folder.parent / ".cache"
        if shared.is_dir():  # frozen corpora are read, not built again
            (Path(temporary) / ".cache").symlink_to(shared.resolve())
        for generation, log in _parts(folder):
            path = folder / f"search-{generation + 1}.yaml"
            search = load_search_file(path if path.is_file() else folder / SEARCH, ALONE, folder=beside)
            cursor = _Recorded(folder, log, Path(temporary) / "run" / "results", sum(verified.values()))
            with RunFolder(Path(temporary) / "run", search) as opened, suppress(_Done):
                _Replaying(search, opened, cursor, Limits(1)).take_again()
            if cursor.place < len(log):
                raise RunError(f"replay: ended before event {cursor.number} of the log: {_brief(cursor.next)}")
            verified.update(event["event"] for event in log)
    return Replay(dict(verified))


def _parts(folder: Path) -> list[tuple[int, list[Event]]]:
    """Return the decisions in the log by the generation of the space in which they were taken."""
    parts: list[tuple[int, list[Event]]] = [(0, [])]
    for event in read_events(folder / EVENTS):
        if event["event"] == "grown":
            parts.append((event.get("generation", parts[-1][0] + 1), []))
        elif event["event"] in DECISIONS and RECHECK not in event.get("stage", ""):
            parts[-1][1].append(event)
    return [(generation, log) for generation, log in parts if log]


class _Recorded:
    """An executor whose evaluations finish as the log says, and which knows the place in the log."""

    def __init__(self, folder: Path, log: Sequence[Event], results: Path, before: int) -> None:
        self.log, self.results, self.place = log, results, 0
        self._before = before
        self._folder, self._flying = folder, dict[str, Request]()

    @property
    def next(self) -> Event:
        """The event that must come next."""
        if self.place == len(self.log):
            raise _Done
        return self.log[self.place]

    @property
    def number(self) -> int:
        """Which decision of the whole log comes next, from 1."""
        return self._before + self.place + 1

    @property
    def capacity(self) -> int:
        """As many workers as let the next event come: idle ones only before a draw."""
        if self.place == len(self.log):
            return 0
        if self.next["event"] in DRAWN:
            return MANY
        waits_for_worker = self.next["event"] == "finished" and self.next["key"] not in self._flying
        return len(self._flying) + waits_for_worker

    def submit(self, request: Request) -> None:
        """Take note of a request."""
        self._flying[request["key"]] = request

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Return the evaluations that finish next, as far as nothing is decided between them."""
        found: list[Outcome] = []
        for event in self.log[self.place :]:
            if event["event"] != "finished" or event["key"] not in self._flying:
                break
            del self._flying[event["key"]]
            self._place(event["key"])
            found.append(Outcome(event["key"], "finished"))
        if not found and timeout_s > 0:
            raise RunError(
                f"replay: event {self.number} of the log is not due: {_brief(self.next)}; "
                "the run was made by another version, or its log was edited"
            )
        return found

    def cancel(self, key: str) -> None:
        """Forget a request."""
        self._flying.pop(key, None)

    def shutdown(self) -> None:
        """Forget all."""
        self._flying.clear()

    def compare(self, event: str, fields: dict[str, Any]) -> None:
        """Check an event against the log's next.

        Raises:
            RunError: when they differ.
        """
        expected = self.next
        made = {"event": event, **fields}
        for name in {**expected, **made}:
            if name not in IGNORED and _plain(expected.get(name)) != _plain(made.get(name)):
                raise RunError(
                    f"replay: event {self.number} of the log differs in {name!r}: the log has "
                    f"{_brief(expected)}: {expected.get(name)!r}; derived: {_brief(made)}: {made.get(name)!r}"
                )
        self.place += 1
        self.foresee()

    def foresee(self) -> None:
        """Put the result that comes next in its place: the run may have had it when it asked for it."""
        if self.place < len(self.log) and self.log[self.place]["event"] == "finished":
            self._place(self.log[self.place]["key"])

    def _place(self, key: str) -> None:
        for path in (self._folder / "results").glob(f"{key}.*"):
            shutil.copy(path, self.results / path.name)


class _Replaying(Driver):
    """A driver that compares each of its events with the log's."""

    def __init__(self, search: Any, folder: RunFolder, cursor: _Recorded, limits: Limits) -> None:
        self.cursor = cursor
        super().__init__(search, folder, cursor, limits)

    def take_again(self) -> None:
        """Decide as far as the log goes."""
        self.cursor.foresee()
        self._open_dispatcher()
        try:
            self._work()
        finally:
            self._log.close()
            self._opened.close()

    def emit(self, event: str, **fields: Any) -> None:
        """Compare, then log and apply; a decision beyond the log's end is the end of the replay."""
        if event in DECISIONS:
            self.cursor.compare(event, fields)
        super().emit(event, **fields)

    def _check(self) -> None:
        """Stop where the log does: what comes after may be decided in another space."""
        if self.cursor.place == len(self.cursor.log):
            raise _Done

    def _next_size(self) -> int:
        return int(self.cursor.next["size"]) if self.cursor.next["event"] == "round" else 0


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _brief(event: Event) -> str:
    where = "".join(f" {name} {event[name]}" for name in ("round", "trial", "stage") if name in event)
    return f"{event['event']}{where}"
