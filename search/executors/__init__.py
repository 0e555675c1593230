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

from archspec.errors import UnsupportedError, unknown

Request = Mapping[str, Any]
EXECUTORS = ("local",)


@dataclass(frozen=True)
class Outcome:
    """What became of an evaluation.

    Fields:
        key: the request's.
        status: ``finished`` (the result file is there), ``died`` (its worker is gone), ``overtime`` (it was stopped
            for taking too long), or ``progress`` (``data`` says how far it is).
        reason: why it died.
    """

    key: str
    status: Literal["finished", "died", "overtime", "progress"]
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
        logs: folder for the workers' own output.
        evaluation_timeout_s: longest time for one evaluation; None without limit.
    """

    logs: Path
    modules: tuple[str, ...] = ()
    main: str | None = None
    evaluation_timeout_s: float | None = None


def make_executor(name: str, num_workers: int | None, device: str, setup: Setup) -> Executor:
    """Return an executor by name.

    Args:
        name: ``local``, a pool of worker processes on this machine.
        num_workers: evaluations at a time; default: one per core, or per GPU.
        device: ``cpu``, ``cuda``, or one GPU, ``cuda:1``.

    Raises:
        UnsupportedError: for an unknown executor or a device that is not there.
    """
    if name == "local":
        from archspec.search.executors.local import LocalPool

        return LocalPool(num_workers, device, setup)
    raise UnsupportedError(f"executor: {unknown('executor', name, EXECUTORS)}")
