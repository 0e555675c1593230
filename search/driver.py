"""The driver: one process that owns a run. It draws, promotes and concludes; workers evaluate.

A run is a number of rounds. In each, ``candidates`` distinct feasible draws climb the ladder together: all are
evaluated on the first rung, some are promoted, and the round is closed by telling the study what became of them.
Draws wait for the round before them, not for each other, so that what is drawn does not depend on which worker was
faster; nor does anything else but measured times.

An asynchronous run has one round, however large, and no worker waits in it: who finishes a rung is promoted or not at
once (``ladder.Halving``), and while a worker is free another candidate is drawn. What is drawn then depends on the
order in which evaluations finish; with one worker that order is always the same.

The driver's memory is the event log. Whatever it is about to do it derives from the log, the study's journal and the
result files, so that a driver that was killed at any point is continued by another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from archspec.search.background import Background
from archspec.search.baselines import baselines
from archspec.search.candidates import DUPLICATE, Candidate, Rejection, admit, drawn_again, named, read_back
from archspec.search.conclusions import conclude
from archspec.search.dispatch import Dispatcher
from archspec.search.eventlog import EVENTS, Event, EventLog, read_events, trim_torn_line
from archspec.search.executors import Executor
from archspec.search.ladder import Halving, contender, promote, ranking
from archspec.search.opening import opening
from archspec.search.points import parameters
from archspec.search.proposals import Proposal, Proposer, learnt
from archspec.search.records import replay
from archspec.search.report.coordinates import coordinates
from archspec.search.requests import prepare, rechecks_for, requests_for
from archspec.search.rundir import RunFolder
from archspec.search.searchfile import SearchFile
from archspec.search.shared import SharedResults
from archspec.search.storage import storage_errors
from archspec.search.study import open_study
from archspec.search.survey import survey
from archspec.search.trial import Trial
from archspec.search.watch import Watch

POLL_S = 0.2
COMMIT_S = 1.0  # of log and study at most this much is lost with the machine; results are on the disk before they count

OnEvent = Callable[[Event], None]


class StoppedEarly(Exception):  # noqa: N818 - a way out, not an error
    """The run ends before its end, for the reason given, and can be continued."""


@dataclass
class Limits:
    """What may differ from one start to the next.

    Fields:
        trials: distinct feasible draws wanted in all.
        timeout_s: seconds until the run stops.
        stop: set by a signal to the reason for stopping.
    """

    trials: int
    timeout_s: float | None = None
    command: str = ""
    stop: list[str] = field(default_factory=list)


class Driver:
    """Takes a run from wherever it stands to its end."""

    def __init__(
        self, search: SearchFile, folder: RunFolder, executor: Executor, limits: Limits, on_event: OnEvent | None = None
    ) -> None:
        self._search, self._folder, self._executor, self._limits = search, folder, executor, limits
        self._on_event = on_event
        path = folder.path / EVENTS
        trim_torn_line(path)
        self.run = replay(folder.path, read_events(path) if path.is_file() else [])
        self._log = EventLog(path)
        self._watch = Watch(folder.path)
        self._candidates: dict[int, Candidate] = {}
        self._by_hash = {trial.hash: trial.number for trial in reversed(list(self.run)) if trial.state != "rejected"}
        self._opened = ExitStack()
        self._background, self._committed = Background(), time.monotonic()
        self._deadline = None if limits.timeout_s is None else time.monotonic() + limits.timeout_s

    def execute(self) -> str:
        """Run to the end, or until stopped; return the status: finished, interrupted, timeout or exhausted."""
        self._open_dispatcher()
        with self._log:
            try:
                with storage_errors():
                    status = self._work()
            except StoppedEarly as stopped:
                status = str(stopped)
            finally:
                self._executor.shutdown()
                self._opened.close()
            self._dispatcher.withdraw()
            conclude(self.run, self._prepared, self._folder, self.emit)
            self.emit("stopped", reason=status)
        return status

    def _open_dispatcher(self) -> None:
        settings = self._search.settings
        shared = None
        if settings.cache is not None:
            shared = SharedResults(settings.cache, settings.device, self._search.modules)
        self._dispatcher = Dispatcher(self._folder, self.run, self.emit, self._executor, self._progress, shared)

    def emit(self, event: str, **fields: Any) -> None:
        """Log an event, apply it, and pass it on."""
        entry = self._log.append(event, **fields)
        self.run.apply(entry)
        if self._on_event is not None:
            self._on_event(entry)

    def _work(self) -> str:
        self._prepared = prepare(self._search, self._folder.cache, self._folder.path / "results")
        if not self.run.study:
            self.emit("opened", **opening(self._search))
        self.emit(
            "started",
            command=self._limits.command,
            workers=self._executor.capacity,
            device=self._search.settings.device,
            trials=self._limits.trials,
        )
        if self.run.generation != self._folder.generation:
            self.emit("grown", space=vars(self._search.space.size), generation=self._folder.generation)
        among = parameters(self._search.space)
        self._study = open_study(self._search, self._folder, among)
        self._opened.callback(self._study.close)
        self._opened.callback(self._background.finish)
        self._proposer = Proposer(self._search, self._study, self.run, self._offset, among)
        for trial in [self.run.trials.get(number + self._offset) for number in self._study.unfinished()]:
            if trial is not None and trial.round in self.run.closed:  # a power cut took what the study was told
                self._tell(trial)
        self._start_baselines()
        while (size := self._round_size()) > 0:
            climb = self._flow if self._search.settings.asynchronous else self._climb
            climb(len(self.run.closed), size)
            if len(self.run.closed) - 1 in self.run.exhausted:
                break
        self._finish([trial.number for trial in self.run if trial.origin == "baseline"])
        self._recheck()
        return "exhausted" if self.run.exhausted else "finished"

    def _recheck(self) -> None:
        """Score the front's members again on fresh seeds, where the file asks for it."""
        if self._search.settings.recheck is None:
            return
        members, seeds = sorted(survey(self.run).front), self._search.settings.recheck.seeds
        for number in members:
            self._dispatcher.add(rechecks_for(self._prepared, self._candidate(number), number, seeds))
        self._finish(members)

    def _start_baselines(self) -> None:
        known = {trial.name for trial in self.run if trial.origin == "baseline"}
        for number, item in enumerate(baselines(self._search)):
            if item.name not in known:
                self._accept(number, item.name, item.candidate, -1, item.note, {"coordinates": {}})
            else:
                self._candidates[number] = item.candidate
        last = len(self._search.settings.ladder) - 1
        for trial in [trial for trial in self.run if trial.origin == "baseline"]:
            for index in sorted({0, last}):
                self._enqueue(trial.number, index)

    def _round_size(self) -> int:
        index = len(self.run.closed)
        if index not in self.run.round_sizes:
            size = self._next_size()
            if size <= 0:
                return 0
            self.emit("round", round=index, size=size)
        return self.run.round_sizes[index]

    def _next_size(self) -> int:
        settings, left = self._search.settings, self._limits.trials - sum(self.run.round_sizes.values())
        return left if settings.asynchronous else min(left, settings.candidates)

    def _climb(self, index: int, size: int) -> None:
        """Take one round up the ladder and close it."""
        self._draw(index, size)
        members = [trial.number for trial in self._accepted(index)]
        for rung in range(len(self._search.settings.ladder)):
            for number in members:
                self._enqueue(number, rung)
            self._finish(members)
            alive = [number for number in members if self.run.trials[number].state != "failed"]
            members = self._promote(index, rung, alive)
        for trial in self._accepted(index):
            self._tell(trial)
        self.emit("closed", round=index)

    def _flow(self, index: int, size: int) -> None:
        """Take one round up the ladder asynchronously: whenever a worker is free, the next step is decided."""
        recorded = {rung: found["rank"] for (at, rung), found in self.run.promotions.items() if at == index}
        halving, settled, heard = Halving(self._search, recorded), 0, time.monotonic()
        accepted = len(self._accepted(index))
        while self._proposer.is_cut_short and index not in self.run.exhausted:
            accepted += self._draw_one(index) is not None  # before anything else is known: as it would have been drawn
        done = {(number, rung) for number, rung, _ in self.run.completions}
        for number, rung in self.run.begun:
            if self.run.trials[number].round == index and (number, rung) not in done:
                self._enqueue(number, rung, first=rung > 0)
        while True:
            self._check()
            settled = self._settle(index, halving, settled)
            drawing = accepted < size and index not in self.run.exhausted
            if drawing and self._dispatcher.idle > 0:
                if (found := self._draw_one(index)) is not None:
                    accepted += 1
                    self._enqueue(self._by_hash[found.hash], 0)
                self._dispatcher.start()
                if time.monotonic() - heard > POLL_S:  # between draws, hear what has finished meanwhile
                    self._dispatcher.step(0.0)
                    heard = time.monotonic()
            elif self._dispatcher.is_busy:
                self._dispatcher.step(POLL_S)
                heard = time.monotonic()
            elif settled == len(self.run.completions):
                break
        for trial in self._accepted(index):
            self._tell(trial)
        self.emit("closed", round=index)

    def _settle(self, index: int, halving: Halving, settled: int) -> int:
        """Promote and tell as the completions from ``settled`` on require; return how many there are."""
        while settled < len(self.run.completions):
            number, rung, ok = self.run.completions[settled]
            settled += 1
            trial = self.run.trials[number]
            if trial.round != index:
                continue
            if not ok or rung == len(self._search.settings.ladder) - 1:
                self._tell(trial)
                continue
            for decision in halving.finish(trial, rung):
                if decision.number not in self.run.promotions.get((index, rung), {}).get(decision.how, ()):
                    promoted = {"rank": [], "random": [], decision.how: [decision.number]}
                    self.emit("promoted", round=index, rung=rung, **promoted, aggregates={})
                    self._enqueue(decision.number, rung + 1, first=True)
        return settled

    def _draw(self, index: int, size: int) -> None:
        """Propose until the round has its candidates, or the space has no more."""
        accepted = len(self._accepted(index))
        while accepted < size and index not in self.run.exhausted:
            self._check()
            accepted += self._draw_one(index) is not None

    def _draw_one(self, index: int) -> Candidate | None:
        """Propose once; return the candidate if there is one, and note when the space has no more."""
        proposal = self._proposer.next()
        if proposal is None:
            self.emit("exhausted", round=index)
            return None
        found = self._consider(proposal, index)
        if self._proposer.is_exhausted:
            self.emit("exhausted", round=index)
        return found

    def _consider(self, proposal: Proposal, index: int) -> Candidate | None:
        """Accept or reject one draw."""
        number = proposal.number + self._offset
        name = f"{self._search.settings.study}-{number}"
        found = admit(named(proposal.document, name), self._search, self._was_drawn)
        if found.hash in self._by_hash and (isinstance(found, Candidate) or found.rule == DUPLICATE):
            twin = self.run.trials[self._by_hash[found.hash]]
            reason = f"the same architecture as trial {twin.number} ({twin.name})"
            found = Rejection(DUPLICATE, reason, {}, found.hash)
        drawn = {"coordinates": proposal.coordinates, "how": proposal.how, "redraws": proposal.redraws}
        if isinstance(found, Candidate):
            self._accept(number, name, found, index, "", drawn)
            self._proposer.hear(proposal, None, hash=found.hash)
            return found
        broken = {"rule": found.rule, "reason": found.reason, "hash": found.hash, "excess": found.excess}
        self.emit("rejected", trial=number, round=index, **drawn, **broken)
        self._proposer.hear(proposal, found)
        return None

    def _was_drawn(self, code: str) -> bool:
        """Whether an architecture was accepted before; of a baseline it is not known to be within the constraints."""
        return self._by_hash.get(code, -1) >= self._offset

    def _accept(
        self, number: int, name: str, found: Candidate, index: int, note: str, drawn: Mapping[str, Any]
    ) -> None:
        self._by_hash[found.hash] = number
        self._background.do(partial(self._folder.write_spec, found.hash, found.document))
        self._candidates[number] = found
        self.emit(
            "proposed",
            trial=number,
            name=name,
            origin="baseline" if index < 0 else "sampled",
            round=index,
            hash=found.hash,
            **drawn,
            figures=found.figures,
            families=found.plan.families(),
            kernels=found.plan.kernels(),
            mixers=[vars(item) for item in coordinates(found.document)],
            note=note,
        )

    def _promote(self, index: int, rung: int, members: Sequence[int]) -> list[int]:
        settings = self._search.settings
        rule = settings.ladder[rung].promote
        if rule is None:
            return list(members)
        if (index, rung) not in self.run.promotions:
            by = ranking(settings, rung)
            contenders = []
            for trial in (self.run.trials[number] for number in members):
                contenders.append(contender(trial, rung, by, rung == 0 or trial.promoted_by == "random"))
            found = promote(contenders, rule, by, (settings.seed, index, rung))
            aggregates = {str(number): round(value, 6) for number, value in found.aggregates.items()}
            self.emit("promoted", round=index, rung=rung, rank=found.rank, random=found.random, aggregates=aggregates)
        promoted = self.run.promotions[index, rung]
        return sorted([*promoted["rank"], *promoted["random"]])

    def _tell(self, trial: Trial) -> None:
        number = trial.number - self._offset
        self._candidates.pop(trial.number, None)  # nothing more is done with it, as a rule
        values = learnt(trial, self._search.objectives)
        if trial.state == "failed":
            self._study.fail(number)
        elif values is None:
            self._study.prune(number)
        else:
            excess = self.run.soft_excess(trial)
            self._study.complete(number, values, excess)
            total = sum(max(0.0, each) for each in excess.values())
            self._proposer.hear_values(number, trial.coordinates, self._study.losses(values), total)

    def _enqueue(self, number: int, rung: int, *, first: bool = False) -> None:
        trial = self.run.trials[number]
        if trial.state != "failed":
            climbed = trial.origin == "sampled"  # baselines go to the last rung at once
            requests = requests_for(self._prepared, self._candidate(number), number, rung, climbed=climbed)
            self._dispatcher.add(requests, first=first)

    def _candidate(self, number: int) -> Candidate:
        """Return an accepted candidate, after a restart from its spec; without that, drawn again."""
        if number not in self._candidates:
            trial = self.run.trials[number]
            found = read_back(trial.hash, self._folder.spec(trial.hash), self._search)
            if found is None:
                found = drawn_again(trial, self._folder.spec(trial.hash), self._search)
                self._folder.write_spec(found.hash, found.document)
            self._candidates[number] = found
        return self._candidates[number]

    def _finish(self, members: Sequence[int]) -> None:
        """Wait until nothing of these trials is queued or running."""
        for number in members:
            while self._dispatcher.is_pending(number):
                self._check()
                self._dispatcher.step(POLL_S)

    def _check(self) -> None:
        """Between any two steps: make what was logged durable from time to time, and stop when it is time."""
        self._watch.write(self.run)
        if time.monotonic() - self._committed > COMMIT_S:
            self._background.do(self._commit)
            self._committed = time.monotonic()
        if self._limits.stop:
            raise StoppedEarly(self._limits.stop[0])
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise StoppedEarly("timeout")

    def _commit(self) -> None:
        with storage_errors():
            self._log.commit()
            self._study.commit()

    def _accepted(self, index: int) -> list[Trial]:
        return [trial for trial in self.run if trial.round == index and trial.state != "rejected"]

    @property
    def _offset(self) -> int:
        """Baselines are numbered first, and the study knows nothing of them."""
        return len(self._search.settings.baselines)

    def _progress(self, data: Mapping[str, Any]) -> None:
        self._watch.note(data)
        if self._on_event is not None:
            self._on_event({"event": "progress", "time": time.time(), **data})
