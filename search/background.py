"""What a driver need not wait for: small writes, and the disk, in a thread of their own and in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

MOST_WAITING = 256


class Background:
    """One thread that does jobs in the order given. What goes wrong there is raised by the next call from here."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="archspec-writer")
        self._waiting: deque[Future[None]] = deque()

    def do(self, job: Callable[[], None]) -> None:
        """Have a job done; wait for earlier ones only when very many are waiting."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= MOST_WAITING):
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(job))

    def finish(self) -> None:
        """Wait until all is done, also when some of it failed, and end the thread."""
        self._thread.shutdown()
        for job in self._waiting:
            job.result()
