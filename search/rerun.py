"""Replay: take every decision of a run again, from its search file and the evaluations in its log, and compare.

The run's own driver does it, in a folder of its own, with an executor that evaluates nothing: evaluations finish in the
order in which they did, with the results that they had, measured times included. Every event that is a decision or a
completion must come out as it stands in the log, in the same order; starts, deaths and pauses may differ. Re-scoring
a front on fresh seeds decides nothing, and is left out.
"""

from __future__ import annotations

import shutil
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
from archspec.search.rundir import SEARCH, RunFolder
from archspec.search.searchfile import load_search_file

DECISIONS = ("round", "proposed", "rejected", "exhausted", "promoted", "finished", "closed")
DRAWN = ("proposed", "rejected", "exhausted")
IGNORED = ("time", "wall_s", "reused")
MANY = 1 << 30


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
    search = load_search_file(folder / SEARCH, overrides=["storage=null", "cache=null", "recheck=null"])
    events = list(read_events(folder / EVENTS))
    if any(event["event"] == "grown" for event in events):
        raise RunError(f"{folder}: the space grew during this run; required: a run of one search file")
    log = [event for event in events if event["event"] in DECISIONS and RECHECK not in event.get("stage", "")]
    with TemporaryDirectory() as temporary:
        shared = folder.parent / ".cache"
        if shared.is_dir():  # frozen corpora are read, not built again
            (Path(temporary) / ".cache").symlink_to(shared.resolve())
        with RunFolder(Path(temporary) / "run", search) as opened:
            driver = _Replaying(search, opened, _Recorded(folder, log, opened.path / "results"), Limits(1))
            with suppress(_Done):
                driver.take_again()
    verified: dict[str, int] = {}
    for event in driver.cursor.log[: driver.cursor.place]:
        verified[event["event"]] = verified.get(event["event"], 0) + 1
    if driver.cursor.place < len(log):
        raise RunError(f"replay: ended before event {driver.cursor.place + 1} of the log: {_brief(driver.cursor.next)}")
    return Replay(verified)


class _Recorded:
    """An executor whose evaluations finish as the log says, and which knows the place in the log."""

    def __init__(self, folder: Path, log: Sequence[Event], results: Path) -> None:
        self.log, self.results, self.place = log, results, 0
        self._folder, self._flying = folder, dict[str, Request]()

    @property
    def next(self) -> Event:
        """The event that must come next."""
        if self.place == len(self.log):
            raise _Done
        return self.log[self.place]

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
                f"replay: event {self.place + 1} of the log is not due: {_brief(self.next)}; "
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
                    f"replay: event {self.place + 1} of the log differs in {name!r}: the log has "
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

    def _next_size(self) -> int:
        return int(self.cursor.next["size"]) if self.cursor.next["event"] == "round" else 0


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _brief(event: Event) -> str:
    where = "".join(f" {name} {event[name]}" for name in ("round", "trial", "stage") if name in event)
    return f"{event['event']}{where}"
