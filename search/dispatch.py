"""Between driver and executor: a queue of requests, each carried to exactly one recorded result."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from archspec.errors import RunError
from archspec.search.executors import Executor, Outcome, Request
from archspec.search.files import write_json
from archspec.search.records import Run
from archspec.search.rundir import RunFolder
from archspec.search.shared import SharedResults

MAX_DEATHS = 3  # a worker that dies on the same evaluation this often is no accident
MAX_LOSSES = 8  # machines, or workers that had not begun, that were lost under the same evaluation
MAX_INTERRUPTIONS = 20  # drivers in which nothing else was finished either that ended during the same evaluation
SUMMARY = ("metrics", "cost", "scores", "validation", "learning_rate", "tokens_per_s")


class Emit(Protocol):
    """Logs an event, applies it to the run, and tells whoever listens."""

    def __call__(self, event: str, **fields: Any) -> None: ...


class Dispatcher:
    """Keeps the executor busy, and the log true.

    A result file is an evaluation done, whether or not the log knows it yet: what a kill left between renaming and
    logging is logged when the request comes up again. A worker's death is repeated ``MAX_DEATHS`` times and then
    recorded as the evaluation's failure. A lost machine is nobody's fault, and only ``MAX_LOSSES`` of them are enough.
    A driver's end is not held against what was running, unless it happens ``MAX_INTERRUPTIONS`` times and never gets
    further: an evaluation in the driver's own process may be what kills it. A result that cannot be written ends the
    run, which continues once there is room.
    """

    def __init__(
        self,
        folder: RunFolder,
        run: Run,
        emit: Emit,
        executor: Executor,
        on_progress: Callable[[dict[str, Any]], None],
        shared: SharedResults | None = None,
    ) -> None:
        self._shared = shared
        self._folder, self._run, self._emit, self._executor = folder, run, emit, executor
        self._on_progress = on_progress
        self._queue: deque[Request] = deque()
        self._flying: dict[str, Request] = {}
        self._outstanding: dict[str, int] = {}  # key -> trial, of what is queued or running
        self._pending: Counter[int] = Counter()  # trial -> how much of that is its

    def add(self, requests: Iterable[Request], *, first: bool = False) -> None:
        """Queue what is not done yet, behind what is queued or, if it goes ``first``, before it."""
        place = 0
        for request in requests:
            if request["key"] in self._run.finished_keys or request["key"] in self._outstanding:
                continue
            path = self._folder.result(request["key"])
            if path.is_file() or (self._shared is not None and self._shared.fetch(request, path)):
                self._record(request)
            else:
                self._queue.insert(place if first else len(self._queue), request)
                self._outstanding[request["key"]] = request["trial"]
                self._pending[request["trial"]] += 1
                place += 1

    @property
    def idle(self) -> int:
        """How many workers have nothing to do, with nothing queued for them."""
        return self._executor.capacity - len(self._flying) - len(self._queue)

    @property
    def is_busy(self) -> bool:
        """Whether anything is queued or running."""
        return bool(self._outstanding)

    def is_pending(self, trial: int) -> bool:
        """Whether anything of a trial is queued or running."""
        return trial in self._pending

    def step(self, timeout_s: float) -> None:
        """Start what can be started, and record what happened within ``timeout_s``."""
        self.start()
        for outcome in self._executor.wait(timeout_s):
            self._take(outcome)
        self.start()

    def withdraw(self) -> None:
        """Note that what is running will be stopped and was not at fault."""
        for request in list(self._flying.values()):
            if self._folder.result(request["key"]).is_file():
                self._record(request)
            else:
                self._emit("cancelled", key=request["key"], trial=request["trial"], stage=request["stage"])
        self._flying.clear()
        self._queue.clear()
        self._outstanding.clear()
        self._pending.clear()

    def _done(self, key: str) -> None:
        trial = self._outstanding.pop(key, None)
        if trial is not None:
            self._pending[trial] -= 1
            if not self._pending[trial]:
                del self._pending[trial]

    def start(self) -> None:
        """Start what can be started."""
        while self._queue and len(self._flying) < self._executor.capacity:
            request = self._queue.popleft()
            key, attempt = request["key"], self._run.attempts.get(request["key"], 0) + 1
            if self._run.trials[request["trial"]].state == "failed":
                self._done(key)
                continue  # another of its evaluations failed: this one could not save it
            if (hopeless := self._hopeless(key)) is not None:
                self._fail(request, hopeless)
                continue
            names = {name: request[name] for name in ("key", "trial", "stage", "rung")}
            self._emit("submitted", **names, attempt=attempt)
            self._flying[key] = request
            self._executor.submit(request)

    def _hopeless(self, key: str) -> str | None:
        """Return why an evaluation is not started once more, None if it is."""
        if self._run.losses.get(key, 0) >= MAX_LOSSES:
            return f"its machine or its worker was lost {MAX_LOSSES} times before it finished"
        if self._run.interruptions.get(key, 0) >= MAX_INTERRUPTIONS:
            return f"the search was killed {MAX_INTERRUPTIONS} times during it before anything was finished"
        return None

    def _take(self, outcome: Outcome) -> None:
        request = self._flying.get(outcome.key)
        if request is None:
            return
        if outcome.status == "progress":
            self._on_progress(
                {"key": outcome.key, "trial": request["trial"], "stage": request["stage"], **outcome.data}
            )
            return
        del self._flying[outcome.key]
        if self._folder.result(outcome.key).is_file():
            self._record(request)
        elif outcome.status == "unwritable":
            raise RunError(outcome.reason)
        elif outcome.status == "lost":
            self._emit("lost", key=outcome.key, trial=request["trial"], stage=request["stage"], reason=outcome.reason)
            self._queue.appendleft(request)
        elif outcome.status == "died" and self._run.deaths.get(outcome.key, 0) + 1 < MAX_DEATHS:
            self._emit("died", key=outcome.key, trial=request["trial"], stage=request["stage"], reason=outcome.reason)
            self._queue.appendleft(request)
        else:
            self._fail(request, outcome.reason or "the worker left no result")

    def _fail(self, request: Request, reason: str) -> None:
        names = ("key", "trial", "stage", "rung", "kind", "hash", "spec", "plan")
        result = {name: request[name] for name in names}
        result |= {"status": "failed", "reason": reason, "traceback": "", "value": {}, "started": None, "wall_s": 0.0}
        write_json(self._folder.result(request["key"]), result)
        self._record(request)

    def _record(self, request: Request) -> None:
        self._done(request["key"])
        result = json.loads(self._folder.result(request["key"]).read_bytes())
        if self._shared is not None:
            self._shared.keep(self._folder.result(request["key"]), result)
        reused = {"reused": True} if result.get("reused") else {}
        value = {name: result["value"][name] for name in SUMMARY if name in result["value"]}
        self._emit(
            "finished",
            key=request["key"],
            trial=request["trial"],
            stage=request["stage"],
            rung=request["rung"],
            ok=result["status"] == "ok",
            reason=result["reason"],
            wall_s=0.0 if reused else result["wall_s"],
            value=value,
            **reused,
        )
