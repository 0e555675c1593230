"""An append-only log of one JSON event a line, whole lines only, readable while it is written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from archspec.errors import RunError

EVENTS = "events.jsonl"
Event = dict[str, Any]


def read_events(path: Path) -> Iterator[Event]:
    """Yield the events of a log; a last line that was never finished is left out.

    Raises:
        RunError: when any other line is not an event.
    """
    with path.open("rb") as file:
        yield from _parsed(file, path, 1)


def parse_events(text: bytes, path: Path, first_line: int = 1) -> Iterator[Event]:
    """Yield the events of a part of the log at ``path`` that begins with line ``first_line``, as ``read_events``."""
    yield from _parsed(BytesIO(text), path, first_line)


def _parsed(lines: Iterable[bytes], path: Path, first_line: int) -> Iterator[Event]:
    for number, line in enumerate(lines, first_line):
        if not line.endswith(b"\n"):
            return
        try:
            event = json.loads(line)
        except ValueError:
            raise RunError(f"{path}:{number}: not an event; the log was edited or damaged") from None
        if not isinstance(event, dict) or "event" not in event:
            raise RunError(f"{path}:{number}: not an event; the log was edited or damaged")
        yield event


def trim_torn_line(path: Path) -> int:
    """Cut what a killed writer left after the last whole line; return how many bytes were cut."""
    if not path.is_file():
        return 0
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end, block = size, 1 << 16
        while end > 0:
            start = max(0, end - block)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
        return size - end


class EventLog:
    """The writing end of a log; one process holds it at a time."""

    def __init__(self, path: Path) -> None:
        trim_torn_line(path)
        self._file = path.open("ab")

    def append(self, event: str, **fields: Any) -> Event:
        """Write one event and hand it to the operating system; return it with its time (seconds, UTC epoch)."""
        entry: Event = {"event": event, "time": round(time.time(), 3), **fields}
        self._file.write(json.dumps(entry, separators=(",", ":"), allow_nan=False).encode() + b"\n")
        self._file.flush()
        return entry

    def close(self) -> None:
        """Make everything written durable and close."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
