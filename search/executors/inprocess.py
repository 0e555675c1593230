"""Evaluations in the driver's own process, one after another: for debuggers, profilers, and very small spaces.

An evaluation that kills its process kills the search, which the same command continues; one cannot be stopped before
its end, so that a Ctrl-C waits for it and a limit on its time is refused.
"""

from __future__ import annotations

import time
from collections import deque

from archspec.errors import UsageError
from archspec.search.executors import Outcome, Request, Setup


class InProcess:
    """One evaluation at a time, carried out inside ``wait``."""

    capacity = 1

    def __init__(self, num_workers: int | None, device: str, setup: Setup) -> None:
        if num_workers not in (None, 1):
            raise UsageError(f"executor inprocess: found {num_workers} workers; there is one, the driver itself")
        if setup.evaluation_timeout_s is not None:
            raise UsageError(
                "executor inprocess: evaluation_timeout_s needs a process that can be stopped; use --executor local"
            )
        self._waiting: deque[Request] = deque()

    def submit(self, request: Request) -> None:
        """Keep the request for ``wait``."""
        if self._waiting:
            raise RuntimeError("all 1 workers are busy")
        self._waiting.append(request)

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Evaluate what was submitted, on one thread like every worker."""
        if not self._waiting:
            time.sleep(timeout_s)
            return []
        import torch

        from archspec.search.evaluation import evaluate

        request = self._waiting.popleft()
        found: list[Outcome] = []
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            evaluate(request, lambda data: found.append(Outcome(request["key"], "progress", data=data)))
        finally:
            torch.set_num_threads(threads)
        return [*found, Outcome(request["key"], "finished")]

    def cancel(self, key: str) -> None:
        """Forget a request that has not begun."""
        self._waiting = deque(request for request in self._waiting if request["key"] != key)

    def shutdown(self) -> None:
        """Forget all."""
        self._waiting.clear()
