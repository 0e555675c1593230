"""Where evaluations run. An executor takes plain requests and says what became of them.

    submit(request)    start an evaluation; at most ``capacity`` at a time
    wait(timeout_s)    what happened since: outcomes, in order
    cancel(key)        stop one, as if it had never been started
    shutdown()         stop all at once

The result itself is the file that the worker renames into place (``evaluation``): an outcome only says that it is
time to look. An executor never retries; what to do about a death is the driver's decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from archspec.errors import UsageError, unknown
from archspec.search.resources import Resources

Request = Mapping[str, Any]
EXECUTORS = ("inprocess", "local", "ray")


@dataclass(frozen=True)
class Outcome:
    """What became of an evaluation.

    Fields:
        key: the request's.
        status: ``finished`` (the result file is there), ``died`` (its worker is gone), ``lost`` (the machine is gone,
            or the worker before it began: no fault of the evaluation), ``overtime`` (it was stopped for taking too
            long), ``unwritable`` (its result could not be written: a full disk), or ``progress`` (``data``
            says how far it is).
        reason: why.
    """

    key: str
    status: Literal["finished", "died", "lost", "overtime", "unwritable", "progress"]
    reason: str = ""
    data: dict[str, Any] = field(default_factory=dict)


class Executor(Protocol):
    """What the driver asks of an executor."""

    @property
    def capacity(self) -> int: ...
    def submit(self, request: Request) -> None: ...
    def wait(self, timeout_s: float) -> list[Outcome]: ...
    def cancel(self, key: str) -> None: ...
    def shutdown(self) -> None: ...


@dataclass(frozen=True)
class Setup:
    """What a worker needs before its first request.

    Fields:
        modules: modules that define components; ``main``: a script that does.
        logs: folder for the workers' own output, in the run's folder.
        evaluation_timeout_s: longest time for one evaluation; None without limit.
        resources: what one trial takes.
        address: of a running Ray cluster, or ``auto``; None for the machine's own.
        identity: the run's, and the file that holds it: by these a worker knows whether it sees the run's folder.
    """

    logs: Path
    modules: tuple[str, ...] = ()
    main: str | None = None
    evaluation_timeout_s: float | None = None
    resources: Resources = field(default_factory=Resources)
    address: str | None = None
    identity: str = ""
    identity_file: Path | None = None


def make_executor(name: str, num_workers: int | None, device: str, setup: Setup) -> Executor:
    """Return an executor by name.

    Args:
        name: ``local``, a pool of worker processes on this machine; ``inprocess``, the driver itself; ``ray``, tasks
            on a Ray cluster.
        num_workers: evaluations at a time; default: as many as cores, GPUs or the cluster's nodes hold.
        device: ``cpu``, ``cuda``, or one GPU, ``cuda:1``.

    Raises:
        UsageError: for an unknown executor, or options that it does not have.
        UnsupportedError: for a device that is not there.
    """
    if setup.address is not None and name != "ray":
        raise UsageError(f"--address {setup.address}: executor {name} has no address; use --executor ray")
    if name == "local":
        from archspec.search.executors.local import LocalPool

        return LocalPool(num_workers, device, setup)
    if name == "inprocess":
        from archspec.search.executors.inprocess import InProcess

        return InProcess(num_workers, device, setup)
    if name == "ray":
        from archspec.search.executors.cluster import RayCluster

        return RayCluster(num_workers, device, setup)
    raise UsageError(f"executor: {unknown('executor', name, EXECUTORS)}")
