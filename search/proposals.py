"""Which point is proposed next. What is decided follows from the seed, the trial's number and the trials before it.

In this order, the first that applies:

    known    the search file's ``known`` points are the first proposals
    repair   the last draw broke a rule or a constraint: with one value changed, it, or the least bad of its repairs,
             by the first change of ``NEIGHBOURS`` that breaks nothing, else the one that breaks least
    unseen   nearly all has been seen (``ENUMERATE_AFTER`` known points in a row, or ``REDRAWS`` draws within one
             proposal): the points that are left, in turn, from then on
             (until the space grows)
    chance   the sampler is stuck (``RANDOM_AFTER`` known points in a row), or is ``random``: uniform
    sampler  the sampler's own proposal

Points that were drawn before are drawn again at once (``redraws``), as far as the search draws them itself; what
Optuna proposes twice, and points that are the same architecture, cost a rejected draw, and are never evaluated.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from archspec.search.candidates import Rejection, admit, named
from archspec.search.evolution import Parents, mutated
from archspec.search.names import Objective
from archspec.search.points import Coordinates, Genes, Values, express, key_of, known_coordinates, points
from archspec.search.records import Run
from archspec.search.searchfile import SearchFile
from archspec.search.study import SearchStudy
from archspec.search.trial import Trial
from archspec.yamltext import LocatedMap

RANDOM_AFTER = 5
ENUMERATE_AFTER = 20
NEIGHBOURS = 40
REDRAWS = 50  # draws within one proposal, until one is news
MAX_REPEATS = 200  # known points in a row of a space that cannot be enumerated: it is exhausted
MAX_REJECTIONS = 1000  # draws in a row that were all rejected: nothing feasible is left to find

How = Literal["known", "repair", "unseen", "chance", "sampler"]


@dataclass(frozen=True)
class Proposal:
    """A proposed point: its number in the study, the document there, how it was come by, and draws thrown away.

    Fields:
        values: parameter -> what it could have been, for the study; None: the study holds the point already.
    """

    number: int
    document: LocatedMap
    coordinates: Coordinates
    how: How
    redraws: int = 0
    values: Mapping[str, Values] | None = None


@dataclass(frozen=True)
class _Miss:
    """A draw that was rejected; ``is_old``: nothing was learnt of it, it was known before."""

    coordinates: Coordinates
    is_old: bool
    how: str
    excess: float


def learnt(trial: Trial, objectives: Sequence[Objective]) -> list[float] | None:
    """Return what a sampler learns of a trial: validation where there is a choice of split, the figure elsewhere."""
    values: list[float] = []
    for objective in objectives:
        score = trial.validation.get(objective.name)
        value = score["mean"] if score is not None else trial.value(objective.name)
        if trial.state != "trained" or value is None:
            return None
        values.append(float(value))
    return values


class Proposer:
    """Proposes points, and hears what became of them.

    Args:
        offset: baselines are numbered before the study's first trial.
    """

    def __init__(
        self, search: SearchFile, study: SearchStudy, run: Run, offset: int, parameters: Mapping[str, Values]
    ) -> None:
        self._search, self._space, self._settings, self._study = search, search.space, search.settings, study
        self._parameters, self._offset = parameters, offset
        kind = self._settings.sampler.kind
        known = self._settings.known or (("base",) if kind == "evolution" else ())
        self._known = [known_coordinates(self._space, self._parameters, item) for item in known]
        self._seen: set[tuple[tuple[str, Any], ...]] = set()
        self._misses: list[_Miss] = []
        self._last_how: str = ""
        self._left: Iterator[Coordinates] | None = None
        self._generator = random.Random()
        self._parents = Parents(self._settings.sampler.population)
        for trial in run:
            if trial.origin == "sampled":
                broken = trial.rule if trial.state == "rejected" else None
                self._take_note(trial.coordinates, trial.how, broken, trial.excess)
        self._catch_up(run)
        for number, coordinates, losses, excess in study.completed():
            self._parents.add(number, coordinates, study.losses(losses), excess)
        self._unfinished = self._half_asked(run)

    @property
    def is_cut_short(self) -> bool:
        """Whether a kill left a proposal half made: it comes before anything else is decided."""
        return bool(self._unfinished)

    @property
    def is_exhausted(self) -> bool:
        """Whether the space has nothing more to propose, as far as can be told."""
        size = self._space.size
        if not size.continuous and len(self._seen) >= size.settings:
            return True
        repeats = self._repeats()
        return len(self._misses) >= MAX_REJECTIONS or (bool(size.continuous) and repeats >= MAX_REPEATS)

    def next(self) -> Proposal | None:
        """Return the next proposal; None when every point has been seen.

        Optuna's own the study holds as running. The others it holds once they are heard of: whatever happens to them
        is logged first.
        """
        resumed = self._unfinished.pop(0) if self._unfinished else None
        number = self._study.num_trials if resumed is None else resumed
        how = self._how(number)
        if how == "sampler" and self._settings.sampler.kind not in ("evolution", "random"):
            asked = self._study.ask() if resumed is None else self._study.resume(resumed)
            document = self._space.draw(asked)
            return Proposal(number, document, asked.coordinates, how)
        made = self._made(number, how)
        if made is None:
            return None
        document, genes, how, redraws = made
        return Proposal(number, document, genes.coordinates, how, redraws, genes.values if resumed is None else None)

    def hear(self, proposal: Proposal, rejection: Rejection | None, **attributes: Any) -> None:
        """Take note of whether a proposal was accepted, and tell the study; ``attributes`` label an accepted one."""
        if rejection is None:
            self._take_note(proposal.coordinates, proposal.how, None, {})
            if proposal.values is not None:
                self._study.add(proposal.coordinates, proposal.values, **attributes)
            else:
                self._study.label(proposal.number, **attributes)
            return
        self._take_note(proposal.coordinates, proposal.how, rejection.rule, rejection.excess)
        if proposal.values is not None:
            self._study.add(proposal.coordinates, proposal.values, rejected=rejection.excess)
        else:
            self._study.fail(proposal.number, rejection.excess)

    def hear_values(self, number: int, point: Mapping[str, Any], losses: list[float], excess: float) -> None:
        """Take note of the final values of the study's trial ``number``."""
        self._parents.add(number, point, losses, excess)

    def _take_note(self, point: Coordinates, how: str, broken: str | None, excess: Mapping[str, float]) -> None:
        key = key_of(point)
        if broken is None:
            self._misses.clear()
        else:
            is_old = broken == "duplicate" or key in self._seen
            self._misses.append(_Miss(point, is_old, how, math.fsum(excess.values()) if excess else math.inf))
        self._seen.add(key)
        self._last_how = how

    def _catch_up(self, run: Run) -> None:
        """Add to the study what the event log has and a kill, or a power cut, kept from it."""
        for trial in run:
            if trial.number - self._offset == self._study.num_trials:
                if trial.state == "rejected":
                    self._study.add(trial.coordinates, self._parameters, rejected=trial.excess)
                else:
                    self._study.add(trial.coordinates, self._parameters, hash=trial.hash)

    def _half_asked(self, run: Run) -> list[int]:
        """Return the proposals that a kill cut short; those it only left untold are told."""
        found = []
        for number in self._study.unfinished():
            trial = run.trials.get(number + self._offset)
            if trial is None:
                found.append(number)
                continue
            self._study.restore(number, trial.coordinates, self._parameters)
            if trial.state == "rejected":
                self._study.fail(number, trial.excess)
            else:
                self._study.label(number, hash=trial.hash)
        return found

    def _repeats(self) -> int:
        count = 0
        while count < len(self._misses) and self._misses[-1 - count].is_old:
            count += 1
        return count

    def _how(self, number: int) -> How:
        if number < len(self._known):
            return "known"
        if self._last_how == "unseen" and 2 * len(self._seen) >= self._space.size.settings:
            return "unseen"  # unless the space has grown since
        if self._misses and not self._misses[-1].is_old and len(self._chain()) <= self._settings.repair:
            return "repair"
        repeats = self._repeats()
        if repeats >= ENUMERATE_AFTER and not self._space.size.continuous:
            return "unseen"
        return "chance" if repeats >= RANDOM_AFTER or self._settings.sampler.kind == "random" else "sampler"

    def _chain(self) -> list[_Miss]:
        """Return the last draw that was no repair, and the repairs of it so far."""
        start = len(self._misses) - 1
        while start > 0 and self._misses[start].how == "repair":
            start -= 1
        return self._misses[start:]

    def _made(self, number: int, how: How) -> tuple[LocatedMap, Genes, How, int] | None:
        """Return a point that is news, if one can be found, with how it was come by and the draws thrown away."""
        for attempt in range(REDRAWS):
            seed = f"{self._settings.seed}/{number}/{attempt}"
            self._generator.seed(seed)
            given = self._given(number, how, self._generator)
            if given is None:
                return None
            if how == "sampler" and key_of(given) in self._seen:
                continue  # whatever has been seen is a whole point: it need not be drawn to be known
            document, genes = express(self._space, given, seed)
            if how in ("known", "unseen", "repair") or key_of(genes.coordinates) not in self._seen:
                return document, genes, how, attempt
        if self._space.size.continuous:
            return *express(self._space, given or {}, seed), how, attempt
        rest = self._made(number, "unseen")
        return None if rest is None else (*rest[:3], REDRAWS)

    def _given(self, number: int, how: How, generator: random.Random) -> Coordinates | None:
        """Return what is decided of a point; the rest is uniform. None: there is no point left."""
        if how == "known":
            return self._known[number]
        if how == "unseen":
            self._left = self._left or points(self._space)
            return next((point for point in self._left if key_of(point) not in self._seen), None)
        if how == "repair":
            return self._repaired(number, min(self._chain(), key=lambda miss: miss.excess), generator)
        if how == "chance" or number < self._settings.sampler.startup or len(self._parents) < 2:
            return {}
        return self._parents.child(generator, self._parameters)

    def _repaired(self, number: int, miss: _Miss, generator: random.Random) -> Coordinates:
        """Return a rejected point with one value changed, so that it is legal if that is enough."""
        best, least = miss.coordinates, math.inf
        for attempt in range(NEIGHBOURS):
            changed = mutated(miss.coordinates, generator, self._parameters)
            document, genes = express(self._space, changed, f"{self._settings.seed}/{number}/repair/{attempt}")
            if key_of(genes.coordinates) in self._seen:
                continue
            found = admit(named(document, "candidate"), self._search)
            if not isinstance(found, Rejection):
                return genes.coordinates
            excess = math.fsum(found.excess.values()) if found.excess else math.inf
            if excess < least:
                best, least = genes.coordinates, excess
        return best
