"""Where the Optuna study is kept: a journal in the run's folder, or a database (PostgreSQL, SQLite, MySQL) by its URL.

A database holds many studies, so that a study there belongs to one run: it carries the run's identity, and another
run that takes its name is refused. On PostgreSQL the driver holds an advisory lock besides, which ends with its
connection however that ends: a copy of a run's folder on another machine cannot drive the same study.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import JournalStorage, RDBStorage
from optuna.study import Study

from archspec.errors import RunError
from archspec.search.eventlog import trim_torn_line
from archspec.search.journal import Journal
from archspec.search.names import Direction

IDENTITY = "archspec:run"
# A driver's machine that vanished is noticed by the server within a minute, and its lock with it.
KEEP_ALIVE = ("tcp_keepalives_idle = 30", "tcp_keepalives_interval = 10", "tcp_keepalives_count = 3")


class DatabaseLock:
    """Holds a study on a PostgreSQL server for as long as this process and its connection live."""

    def __init__(self, storage: RDBStorage, name: str) -> None:
        from sqlalchemy import text

        self._connection: Any = storage.engine.connect()
        key = int.from_bytes(hashlib.sha256(f"archspec/{name}".encode()).digest()[:8], "little", signed=True)
        for setting in KEEP_ALIVE:
            self._connection.execute(text(f"SET {setting}"))
        held = self._connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": key}).scalar()
        self._connection.commit()
        if not held:
            self.close()
            raise RunError(
                f"the study {name!r} in the database is in progress: another driver holds it; "
                "wait for it, stop it, or give a new name with --study"
            )

    def close(self) -> None:
        """Let others have the study. The connection itself is ended: one in the pool would keep the lock."""
        self._connection.invalidate()
        self._connection.close()


def open_journal(path: Path, name: str, directions: Sequence[Direction]) -> tuple[Study, Journal]:
    """Open the study in a run's journal, cut to its last whole line."""
    trim_torn_line(path)
    for lock in path.parent.glob(f"{path.name}.lock*"):
        lock.unlink()  # the run's own lock keeps other drivers out: this one was left by a kill
    try:
        journal = Journal(path)
        storage = JournalStorage(journal)
        study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
        return study, journal
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: the study cannot be read ({error}); the journal was edited or damaged") from error


def open_database(
    url: str, name: str, directions: Sequence[Direction], identity: str
) -> tuple[Study, DatabaseLock | None]:
    """Open or create a run's study in a database.

    Raises:
        RunError: when the database is out of reach, or the study is another run's or in progress.
    """
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    try:
        storage = RDBStorage(with_driver(url), engine_kwargs={"pool_pre_ping": True})
        lock = DatabaseLock(storage, name) if storage.engine.dialect.name == "postgresql" else None
        study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
        owner = study.user_attrs.get(IDENTITY)
        if owner is None and not study.get_trials(deepcopy=False):
            study.set_user_attr(IDENTITY, identity)
        elif owner != identity:
            if lock is not None:
                lock.close()
            raise RunError(
                f"storage {url}: the study {name!r} belongs to another run; give this one a new name with --study"
            )
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise RunError(f"storage {url}: no such kind of database, or its driver is not installed ({error})") from error
    except (SQLAlchemyError, StorageInternalError) as error:
        raise RunError(f"storage {url}: cannot be opened ({_brief(error)}); start it, or correct the URL") from error
    return study, lock


def with_driver(url: str) -> str:
    """Return the URL with the driver named that is installed: SQLAlchemy's own choice has changed between versions."""
    kind, separator, rest = url.partition("://")
    if kind == "postgresql" and not importlib.util.find_spec("psycopg") and importlib.util.find_spec("psycopg2"):
        kind = "postgresql+psycopg2"
    return kind + separator + rest


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn what a full disk or a lost database raises into an error that says how to go on.

    Raises:
        RunError: in its place; the run continues from where its files stand.
    """
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise RunError(
            f"{where}cannot be written ({error.strerror or error}); free the disk, then continue with the same command"
        ) from error
    except (SQLAlchemyError, StorageInternalError) as error:
        raise RunError(
            f"the database is out of reach ({_brief(error)}); bring it back, then continue with the same command"
        ) from error


def _brief(error: BaseException) -> str:
    cause = error.__cause__ or error
    text = " ".join(str(cause).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
