"""An append-only log of one JSON event a line, whole lines only, readable while it is written."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

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
    numbered = iter(enumerate(lines, first_line))
    for number, line in numbered:
        if not line.endswith(b"\n"):
            return
        event = _event(line)
        if event is None or "event" not in event:
            if not any(later.endswith(b"\n") for _, later in numbered):
                return  # the last whole line: what a crash left, which the next driver cuts off
            raise RunError(f"{path}:{number}: not an event; the log was edited or damaged")
        yield event


def _event(line: bytes) -> Event | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def trim_torn_line(path: Path) -> int:
    """Cut what a crash left after the last whole line of JSON, one line of garbage included.

    Returns:
        How many bytes were cut.
    """
    if not path.is_file():
        return 0
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = _line_start(file, size)
        before = _line_start(file, max(0, end - 1))
        file.seek(before)
        if _event(file.read(end - before)) is None:
            end = before
        if end < size:
            file.truncate(end)
        return size - end


def _line_start(file: IO[bytes], end: int) -> int:
    """Return where the text after the last newline before ``end`` begins."""
    block = 1 << 16
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


class EventLog:
    """The writing end of a log; one process holds it at a time."""

    def __init__(self, path: Path) -> None:
        trim_torn_line(path)
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._written = self._durable = 0  # events

    def append(self, event: str, **fields: Any) -> Event:
        """Write one event and hand it to the operating system; return it with its time (seconds, UTC epoch).

        It outlives a kill of this process; ``commit`` makes it outlive a power cut.

        Raises:
            RunError: when the disk does not take it; the log then ends with the event before.
        """
        entry: Event = {"event": event, "time": round(time.time(), 3), **fields}
        line = json.dumps(entry, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)
            raise self._unwritable(error) from error
        self._written += 1
        return entry

    def commit(self) -> None:
        """Wait until every event is on the disk.

        Raises:
            RunError: when the disk does not take them.
        """
        written = self._written  # more may be appended meanwhile, by another thread
        if written == self._durable:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error
        self._durable = written

    def close(self) -> None:
        """Make everything written durable and close."""
        if not self._file.closed:
            try:
                self.commit()
            finally:
                self._file.close()

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(
            f"{self._path}: cannot be written ({error.strerror}); free the disk, then continue with the same command"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
