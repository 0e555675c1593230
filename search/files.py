"""Writing files that a kill cannot tear."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from archspec.errors import RunError


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any], *, durable: bool = True) -> None:
    """Write a file beside and rename it into place: a reader sees all of it or none, and it outlives a kill.

    ``durable``: and a power cut, for which it waits for the disk.

    Raises:
        RunError: when the disk does not take it.
    """
    try:
        descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror}); free the disk or choose another folder"
        ) from error


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write plain data as JSON, atomically."""
    text = json.dumps(data, allow_nan=False)
    write_atomically(path, lambda file: file.write(text.encode()))
