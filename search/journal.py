"""The journal of a run's study: Optuna's format, one record a line, written by the one driver that holds the run.

Optuna's own writer takes a lock and waits for the disk at every record. Here the run's lock keeps other drivers out,
every record is handed to the operating system at once, so that it outlives a kill of the driver, and ``commit`` makes
all of them durable together, so that they outlive a power cut: one wait for many. Readers, and Optuna's own writer (a
dashboard's notes), may open the file meanwhile: a record is appended whole.
"""

from __future__ import annotations

import errno
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend


class Journal(BaseJournalBackend):
    """A journal file, opened for as long as this object lives."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._close = weakref.finalize(self, os.close, self._file)
        self._read = (0, 0)  # records handed out so far, and where they end in the file
        self._written = self._durable = 0  # appends

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield the records from number ``log_number_from`` on; a last line that is not whole is none yet."""
        number, offset = self._read if self._read[0] <= log_number_from else (0, 0)
        size = os.fstat(self._file).st_size
        if size <= offset:
            return
        text = os.pread(self._file, size - offset, offset)
        for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):
            record = json.loads(line)
            number, offset = number + 1, offset + len(line)
            self._read = max(self._read, (number, offset))
            if number > log_number_from:
                yield record

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append records; all of them, or none where the disk has no room."""
        text = b"".join(json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs)
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._file, size)
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._written += 1

    def commit(self) -> None:
        """Wait until every record is on the disk."""
        written = self._written  # more may be appended meanwhile, by another thread
        if written == self._durable:
            return
        try:
            os.fsync(self._file)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self._durable = written

    def close(self) -> None:
        """Commit and close."""
        if self._close.alive:
            try:
                self.commit()
            finally:
                self._close()
