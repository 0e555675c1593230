"""A Ray cluster, or one started on this machine: every evaluation is a Ray core task.

The driver keeps the study and hands out one task an evaluation; Ray places it where its resources are free. Ray
retries nothing (``max_retries=0``): what a lost worker or node means is for the driver to decide, as everywhere.

Code is sent along: archspec as it is here, the plug-ins in force, the modules and the script that define components.
They are the working directory of the cluster's workers, so that a node needs only Python and the libraries; a node
whose torch or Python differs is refused with the versions named.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import exceptions
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get

import archspec
from archspec import catalog
from archspec.errors import RunError, UnsupportedError, UsageError
from archspec.search.executors import Outcome, Request, Setup
from archspec.search.executors.remote import Answer, Job, overtime_note, progress_note, serve, versions
from archspec.search.files import write_atomically
from archspec.search.resources import Resources

LOOK_EVERY_S = 2.0  # how often the cluster is asked what it has: nodes come and go
WAITING = b'{"phase": "waiting"}'  # for a node with room, or for a worker to start
SCRIPT = "archspec_driver_script.py"
ASK_EVERY_S = 1.0  # how often the cluster's store is asked how far evaluations are, and of how many at a time
ASKED = 64
LOST = (exceptions.NodeDiedError, exceptions.ObjectLostError)


class RayCluster:
    """Evaluations as Ray core tasks; ``capacity`` follows the nodes that are there."""

    def __init__(self, num_workers: int | None, device: str, setup: Setup) -> None:
        self._limit, self._setup = num_workers, setup
        self._resources = _of_device(setup.resources, device)
        self._flying: dict[Any, Request] = {}
        self._far: dict[str, bytes] = {}
        self._asked = -math.inf
        self._data: dict[str, Any] = {}
        self._looked, self._slots = -math.inf, 0
        self._results = setup.logs.parent / "results"
        main = setup.main and SCRIPT
        with tempfile.TemporaryDirectory(prefix="archspec-") as folder:
            code = Path(folder) / "code"
            _stage(code, [*catalog.plugins(), *setup.modules], setup.main)
            _connect(setup.address, code)
        self._job = Job(
            versions(),
            setup.identity,
            str(setup.identity_file.resolve()) if setup.identity_file else "",
            setup.modules,
            main,
            max(1, int(self._resources.cpus)),
            self._resources.memory_fraction,
            setup.evaluation_timeout_s,
            uuid.uuid4().hex,
        )
        self._task = ray.remote(serve).options(
            num_cpus=self._resources.cpus,
            num_gpus=self._resources.gpus or 0,
            memory=self._resources.memory,
            max_retries=0,
        )
        if not self.capacity:
            found = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in _nodes())
            self.shutdown()
            raise UnsupportedError(
                f"executor ray: no node has {self._resources.text()} for a trial; the nodes have: {found or 'none'}"
            )

    @property
    def capacity(self) -> int:
        """How many evaluations the nodes that are there can run at a time."""
        if time.monotonic() - self._looked > LOOK_EVERY_S:
            self._looked = time.monotonic()
            self._slots = sum(_slots(offered, self._resources) for offered in _nodes())
        return self._slots if self._limit is None else min(self._limit, self._slots)

    def submit(self, request: Request) -> None:
        """Give the cluster a task."""
        job = replace(self._job, data=self._files_of(request))
        self._flying[self._task.remote(dict(request), job)] = request
        self._far[request["key"]] = b""

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Return what happened, waiting at most ``timeout_s`` for the first of it.

        Raises:
            RunError: when a node cannot run this search at all, or no result can be written.
        """
        if not self._flying:
            time.sleep(timeout_s)
            return []
        told = self._progress()
        ready, _ = ray.wait(list(self._flying), num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(list(self._flying), num_returns=len(self._flying), timeout=0)
        return [*told, *(self._outcome(reference) for reference in ready)]

    def cancel(self, key: str) -> None:
        """Stop the evaluation and its worker."""
        for reference in [ref for ref, request in self._flying.items() if request["key"] == key]:
            del self._flying[reference]
            ray.cancel(reference, force=True)
            self._notes_left(key)

    def shutdown(self) -> None:
        """Leave the cluster; what is not finished is lost, and a cluster started here ends."""
        self._flying.clear()
        self._far.clear()
        ray.shutdown()

    def _progress(self) -> list[Outcome]:
        """Return what is news of how far evaluations are; those that wait longest to be asked about come first."""
        if time.monotonic() - self._asked < ASK_EVERY_S:
            return []
        self._asked, found = time.monotonic(), []
        for key, known in list(self._far.items())[:ASKED]:
            said = _internal_kv_get(progress_note(self._job.session, key)) or WAITING
            del self._far[key]
            self._far[key] = said
            if said != known:
                found.append(Outcome(key, "progress", data=json.loads(said)))
        return found

    def _notes_left(self, key: str) -> tuple[bool, bool]:
        """Remove the notes of a worker that did not come to its end; return whether it had begun, and was overtime."""
        self._far.pop(key, None)
        notes = progress_note(self._job.session, key), overtime_note(self._job.session, key)
        found = [_internal_kv_get(note) is not None for note in notes]
        for note in notes:
            _internal_kv_del(note)
        return found[0], found[1]

    def _outcome(self, reference: Any) -> Outcome:
        request = self._flying.pop(reference)
        key = request["key"]
        self._far.pop(key)
        try:
            answer: Answer = ray.get(reference)
        except exceptions.RuntimeEnvSetupError as error:
            raise RunError(f"executor ray: a node cannot take the search's code ({_brief(error)})") from error
        except LOST as error:
            self._notes_left(key)
            return Outcome(key, "lost", f"its node is gone: {_brief(error)}")
        except exceptions.RayError as error:
            has_begun, is_overtime = self._notes_left(key)
            if is_overtime:
                return Outcome(key, "overtime", f"took longer than {self._job.limit_s:g} s")
            if isinstance(error, exceptions.WorkerCrashedError) and not has_begun:
                return Outcome(key, "lost", f"the worker ended before it began: {_brief(error)}")
            return Outcome(key, "died", f"the worker ended: {_brief(error)}")
        if answer.status == "refused":
            raise RunError(f"executor ray: a node cannot take part: {answer.reason}")
        if answer.status == "unwritable":
            return Outcome(key, "unwritable", answer.reason)
        # Weights first: the result file is what says that an evaluation is done.
        for name, content in sorted(answer.files, key=lambda item: item[0].endswith(".json")):
            write_atomically(self._results / name, lambda file, content=content: file.write(content))  # type: ignore[misc]
        return Outcome(key, "finished")

    def _files_of(self, request: Request) -> dict[str, Callable[[], bytes]]:
        """Return what fetches the data files of a request, for nodes that do not see this machine's disk."""
        named = (request.get("task") or {}).values()
        paths = [value for value in named if isinstance(value, str) and os.path.isabs(value) and os.path.isfile(value)]
        for path in paths:
            if path not in self._data:
                self._data[path] = _Fetch(ray.put(Path(path).read_bytes()))
        return {path: self._data[path] for path in paths}


class _Fetch:
    """Fetches an object from the cluster's store, once it is called for."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference

    def __call__(self) -> bytes:
        found: bytes = ray.get(self._reference)
        return found


def _of_device(resources: Resources, device: str) -> Resources:
    """Return what a trial takes, one GPU if the device is one and nothing else is said."""
    kind, _, index = device.partition(":")
    if index:
        raise UsageError(f"device {device}: Ray chooses the GPU; use --device cuda")
    if kind == "cpu" and resources.gpus:
        raise UsageError(f"resources.gpus: found {resources.gpus:g} with device cpu; use --device cuda, or 0")
    if kind == "cuda" and not resources.gpus:
        return resources.model_copy(update={"gpus": 1.0})
    return resources


def _connect(address: str | None, code: Path) -> None:
    if ray.is_initialized():
        raise RunError("executor ray: this process is connected to Ray already; call ray.shutdown() before the search")
    variables = {"ARCHSPEC_WORKER": "1", catalog.PLUGINS_VARIABLE: ",".join(catalog.plugins())}
    options: dict[str, Any] = {"address": address} if address is not None else {"include_dashboard": False}
    try:
        ray.init(
            **options,
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={"working_dir": str(code), "env_vars": variables},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(
            f"executor ray: no connection to a cluster at {address or 'this machine'} ({_brief(error)}); "
            "start one with 'ray start --head', or leave --address out to start one here"
        ) from error


def _stage(folder: Path, modules: Sequence[str], main: str | None) -> None:
    """Copy what workers import into one folder: archspec, plug-ins, and the driver's script."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(Path(archspec.__file__).parent, folder / "archspec", ignore=ignored)
    for name in dict.fromkeys(module.partition(".")[0] for module in modules):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise RunError(f"executor ray: the module {name!r} has no source file to send; make it a file or a package")
        if found.submodule_search_locations:
            shutil.copytree(Path(found.origin).parent, folder / name, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy2(found.origin, folder / Path(found.origin).name)
    if main is not None:
        shutil.copy2(main, folder / SCRIPT)


def _slots(offered: Mapping[str, float], wanted: Resources) -> int:
    """Return how many trials a node holds at a time."""
    shares = [offered.get("CPU", 0.0) / wanted.cpus]
    if wanted.gpus:
        shares.append(offered.get("GPU", 0.0) * math.floor(1 / wanted.gpus + 1e-9))  # a share lies on one GPU
    if wanted.memory:
        shares.append(offered.get("memory", 0.0) / wanted.memory)
    return math.floor(min(shares) + 1e-9)


def _nodes() -> list[dict[str, float]]:
    """Return what each node that is there has in all."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
