"""A pool of worker processes on this machine: fresh interpreters, one thread each, one evaluation at a time.

A worker is `python -c "... worker.main()"` on one end of a socket pair. It is in a session of its own, so that a
Ctrl-C in the terminal reaches the driver alone. If the driver dies, the socket closes and the worker ends; if a
worker dies, the driver sees the socket close, reports it, and starts another in its place.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import IO, Any

from archspec.errors import UnsupportedError
from archspec.search.executors import Outcome, Request, Setup
from archspec.search.resources import Resources
from archspec.search.rundir import available_cores

START = (
    "import json, sys; setup = json.loads(sys.argv[1]); sys.path[:] = setup['path']; "
    "from archspec.search.executors.worker import main; main(setup)"
)
LOG_TAIL_BYTES = 2000


@dataclass
class _Worker:
    """One process, the socket to it, and what it is working on."""

    process: subprocess.Popen[bytes]
    connection: Connection[Any, Any]
    slot: int
    log: IO[bytes]
    key: str | None = None
    since: float = 0.0
    has_begun: bool = False


class LocalPool:
    """Worker processes, started when first needed and replaced when they die."""

    def __init__(self, num_workers: int | None, device: str, setup: Setup) -> None:
        self._gpus = _gpus(device)
        self._setup, self._resources = setup, setup.resources
        self._capacity = num_workers or _slots(len(self._gpus), self._resources)
        self._workers: list[_Worker] = []

    @property
    def capacity(self) -> int:
        """How many evaluations run at a time."""
        return self._capacity

    def submit(self, request: Request) -> None:
        """Hand a request to an idle worker.

        Raises:
            RuntimeError: when ``capacity`` evaluations are running.
        """
        worker = next((worker for worker in self._workers if worker.key is None), None)
        if worker is None:
            taken = {other.slot for other in self._workers}
            if len(taken) >= self._capacity:
                raise RuntimeError(f"all {self._capacity} workers are busy")
            worker = self._start(min(set(range(self._capacity)) - taken))
        worker.key, worker.since, worker.has_begun = request["key"], time.monotonic(), False
        try:
            worker.connection.send(dict(request))
        except OSError:
            return  # it died while idle: ``wait`` finds the closed socket and reports the death

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Return what happened, waiting at most ``timeout_s`` for the first of it."""
        found: list[Outcome] = []
        for connection in wait([worker.connection for worker in self._workers], timeout_s):
            worker = next(worker for worker in self._workers if worker.connection is connection)
            found.extend(self._read(worker))
        limit = self._setup.evaluation_timeout_s
        for worker in list(self._workers):
            if limit is not None and worker.key is not None and time.monotonic() - worker.since > limit:
                found.append(Outcome(worker.key, "overtime", f"took longer than {limit:g} s"))
                self._end(worker)
        return found

    def cancel(self, key: str) -> None:
        """Stop the evaluation and its worker."""
        for worker in [worker for worker in self._workers if worker.key == key]:
            self._end(worker)

    def shutdown(self) -> None:
        """Stop every worker now; what is not finished is lost."""
        for worker in self._workers:
            worker.process.kill()
        for worker in list(self._workers):
            self._end(worker)

    def pids(self) -> list[int]:
        """Return the process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def _read(self, worker: _Worker) -> list[Outcome]:
        found: list[Outcome] = []
        try:
            while worker.connection.poll():
                message = worker.connection.recv()
                if message["status"] == "begun":
                    worker.has_begun = True
                    continue
                found.append(Outcome(**message))
                if message["status"] != "progress":
                    worker.key = None
        except (EOFError, OSError):
            reason = self._death(worker)
            if worker.key is not None and (worker.has_begun or worker.process.returncode >= 0):
                found.append(Outcome(worker.key, "died", reason))
            elif worker.key is not None:  # killed while it was starting: the evaluation had no part in it
                found.append(Outcome(worker.key, "lost", f"{reason}, before it began"))
            self._end(worker)
        return found

    def _start(self, slot: int) -> _Worker:
        ours, theirs = Pipe()
        environment, threads = dict(os.environ, ARCHSPEC_WORKER="1"), max(1, int(self._resources.cpus))
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        else:
            environment.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        setup = {
            "path": sys.path,
            "socket": theirs.fileno(),
            "modules": self._setup.modules,
            "main": self._setup.main,
            "threads": threads,
            "memory_fraction": self._resources.memory_fraction,
        }
        log = (self._setup.logs / f"worker-{slot}.log").open("ab")
        process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(setup)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        worker = _Worker(process, ours, slot, log)
        self._workers.append(worker)
        return worker

    def _end(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.wait()
        worker.connection.close()
        worker.log.close()
        self._workers.remove(worker)

    def _death(self, worker: _Worker) -> str:
        """Return how a worker ended, with the last thing it wrote."""
        code = worker.process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            hint = ": out of memory, or killed by hand" if -code == signal.SIGKILL else ""
            return f"the worker was ended by {name}{hint}"
        with open(worker.log.name, "rb") as log:
            log.seek(max(0, os.path.getsize(worker.log.name) - LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").strip().splitlines()
        return f"the worker ended with exit code {code}" + (f": {lines[-1].strip()}" if lines else "")


def _slots(gpus: int, resources: Resources) -> int:
    """Return how many evaluations this machine holds at a time: by its GPUs where they are used, else by its cores."""
    if gpus:
        return gpus * int(1 / (resources.gpus or 1.0) + 1e-9)
    return max(1, int(available_cores() / resources.cpus))


def _gpus(device: str) -> list[str]:
    """Return the GPUs that a device stands for, as CUDA_VISIBLE_DEVICES names them; none for the CPU."""
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return []
    import torch

    available = torch.cuda.device_count()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",")[:available] if listed else [str(number) for number in range(available)]
    if not names:
        raise UnsupportedError(f"device {device}: this machine has no usable GPU; use --device cpu")
    if index and (not index.isdecimal() or int(index) >= len(names)):
        raise UnsupportedError(f"device {device}: no such GPU; there are {len(names)}, from cuda:0")
    return [names[int(index)]] if index else names
