"""The far end of a cluster: one evaluation in a worker process on any node, and what goes back to the driver.

Where the worker sees the run's folder (shared storage, told by the run's identity, not by a path that looks alike),
the result is renamed into place there, and is durable before the driver hears of it. Where it does not, the files
travel back and the driver writes them.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archspec.errors import RunError
from archspec.search.executors.worker import load_components, prepare_device

OVERTIME_EXIT = 75
REPORT_EVERY_S = 1.0
CACHE = Path(tempfile.gettempdir()) / f"archspec-{os.getuid()}"


@dataclass(frozen=True)
class Job:
    """What a worker on a cluster needs beside its request.

    Fields:
        versions: of the libraries that must be the same here as at the driver.
        identity: the run's; ``identity_file`` holds it where the run's folder is shared.
        data: files that requests name, by path at the driver: what fetches the bytes of one.
        memory_fraction: the share of a GPU's memory that this process may take.
        limit_s: longest time for one evaluation.
        session: names the driver's own notes in the cluster's store.
    """

    versions: Mapping[str, str]
    identity: str
    identity_file: str
    modules: tuple[str, ...] = ()
    main: str | None = None
    threads: int = 1
    memory_fraction: float | None = None
    limit_s: float | None = None
    session: str = ""
    data: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What goes back: ``done``, with the result's files where storage is not shared; ``refused`` or ``unwritable``,
    with the reason."""

    status: str
    reason: str = ""
    files: tuple[tuple[str, bytes], ...] = ()


def serve(request: Mapping[str, Any], job: Job) -> Answer:
    """Evaluate one request in this process."""
    different = [
        f"{name} {here} here, {job.versions[name]} at the driver"
        for name, here in versions().items()
        if here != job.versions[name]
    ]
    if different:
        return Answer("refused", f"{'; '.join(different)}: install the same versions on every node")
    prepare_device(job.threads, job.memory_fraction)
    load_components(job.modules, job.main)
    request = _localised(request, job)
    with _limited(job.limit_s, overtime_note(job.session, request["key"])):
        if not job.session:
            return _evaluated(request, job, None)
        report = _Report(progress_note(job.session, request["key"]))
        try:
            return _evaluated(request, job, report)
        finally:
            report.close()


class _Report:
    """Leaves how far an evaluation is in the cluster's store, where the driver looks from time to time."""

    def __init__(self, note: bytes) -> None:
        import ray

        self._note, self._last = note, -math.inf
        self._where = {"node": platform.node(), "node_id": ray.get_runtime_context().get_node_id()}
        self({"phase": "begun"})
        self._last = -math.inf

    def __call__(self, data: Mapping[str, Any]) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        if time.monotonic() - self._last >= REPORT_EVERY_S:
            self._last = time.monotonic()
            _internal_kv_put(self._note, json.dumps({**data, **self._where}).encode(), overwrite=True)

    def close(self) -> None:
        """Remove the note: what it told of is over. That of a worker that died stays, and says that it had begun."""
        from ray.experimental.internal_kv import _internal_kv_del

        _internal_kv_del(self._note)


@contextmanager
def _limited(limit_s: float | None, note: bytes) -> Iterator[None]:
    """End this process when what is done here takes too long: nothing milder stops a kernel. A note says why."""
    if limit_s is None:
        yield
        return
    timer = threading.Timer(limit_s, _end, (note,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(note: bytes) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    try:
        _internal_kv_put(note, b"1")
    finally:
        os._exit(OVERTIME_EXIT)


def overtime_note(session: str, key: str) -> bytes:
    """Return the name of the note that an evaluation was stopped for taking too long."""
    return f"archspec/{session}/{key}/overtime".encode()


def progress_note(session: str, key: str) -> bytes:
    """Return the name of the note that says how far an evaluation is; there is none before it has begun."""
    return f"archspec/{session}/{key}/progress".encode()


def versions() -> dict[str, str]:
    """Return the versions that decide whether two machines compute the same; archspec itself is sent along."""
    import torch

    return {"python": platform.python_version().rpartition(".")[0], "torch": torch.__version__}


def _evaluated(request: Mapping[str, Any], job: Job, report: Callable[[dict[str, Any]], None] | None) -> Answer:
    from archspec.search.evaluation import evaluate

    try:
        if is_shared(Path(job.identity_file), job.identity):
            evaluate(request, report)
            return Answer("done")
        with tempfile.TemporaryDirectory(prefix="archspec-") as folder:
            evaluate({**request, "results": folder}, report)
            return Answer("done", files=tuple((path.name, path.read_bytes()) for path in Path(folder).iterdir()))
    except RunError as error:
        return Answer("unwritable", str(error))


def is_shared(path: Path, identity: str) -> bool:
    """Say whether this machine sees the run's own folder."""
    return path.is_file() and path.read_text().strip() == identity


def _localised(request: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """Return the request with the files it names on this machine: fetched where storage is not shared."""
    found = dict(request)
    task = dict(found.get("task") or {})
    for name, value in task.items():
        if isinstance(value, str) and value in job.data and not Path(value).is_file():
            task[name] = str(_fetched(value, job.data[value]))
    if task:
        found["task"] = task
    return found


def _fetched(path: str, fetch: Callable[[], bytes]) -> Path:
    from archspec.search.files import write_atomically

    CACHE.mkdir(mode=0o700, exist_ok=True)
    local = CACHE / Path(path).name  # a frozen corpus is named by its hash: the same name is the same bytes
    if not local.is_file():
        write_atomically(local, lambda file: file.write(fetch()))
    return local
