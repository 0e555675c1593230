"""The Optuna study of a run: ask and tell over a journal or a database, by proposals that a kill does not change.

A proposal of one of Optuna's samplers depends on the trials before it and on (seed, trial number, parameter name)
alone: every draw has a sampler of its own, seeded by these. So a trial that a kill left half asked is taken up again
where it stood, and a run that was killed proposes what it would have proposed. Points that the search proposes by
itself (``proposals``) are added whole, with what became of them, once the event log has them; what a kill or a power
cut kept from the study is added from there.

What Optuna is told: COMPLETE with the objectives' values for those with final scores; PRUNED for those that were not
promoted, whose low-fidelity values stay out of the study; FAIL for draws that were rejected, and for failures.
Baselines are not draws and do not enter the study.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from archspec.errors import RunError
from archspec.search.names import Objective
from archspec.search.points import Values
from archspec.search.rundir import RunFolder
from archspec.search.searchfile import SearchFile
from archspec.search.settings import Sampler
from archspec.search.space import Range
from archspec.search.storage import open_database, open_journal

JOURNAL = "journal.log"


class SearchStudy:
    """An Optuna study that asks and tells for the driver.

    Args:
        path: the journal; ``name`` the study's name in it.
        parameters: every parameter of the space with its values; only ``qmc`` needs them.
        url: a database that holds the study instead; ``identity`` that of the run it belongs to.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        objectives: Sequence[Objective],
        sampler: Sampler,
        seed: int,
        parameters: Mapping[str, Values] | None = None,
        url: str | None = None,
        identity: str = "",
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.seed = seed
        self._objectives = objectives
        directions = [objective.direction for objective in objectives]
        self._place, self._lock, self._journal = url or str(path), None, None
        if url is None:
            self._study, self._journal = open_journal(path, name, directions)
        else:
            self._study, self._lock = open_database(url, name, directions, identity)
        distributions = {name: distribution(values) for name, values in (parameters or {}).items()}
        self._study = _grown(self._study, distributions)
        self._study.sampler = _Seeded(sampler, seed, distributions)
        # Nobody else adds trials: counting them again would take longer the more there are.
        self._num_trials = int(self._study._storage.get_n_trials(self._study._study_id))

    def commit(self) -> None:
        """Make everything durable that the study was told; a database does it at once."""
        if self._journal is not None:
            self._journal.commit()

    def close(self) -> None:
        """Let other drivers have the study."""
        if self._journal is not None:
            self._journal.close()
        if self._lock is not None:
            self._lock.close()

    def ask(self) -> Asked:
        """Return the sampler's next proposal."""
        trial_id = self._study._storage.create_new_trial(self._study._study_id)
        self._num_trials += 1
        return self._asked(trial_id)

    def resume(self, number: int) -> Asked:
        """Return a proposal that a kill left unfinished; the parameters it has keep their values."""
        return self._asked(self._trial_id(number))

    def _asked(self, trial_id: int) -> Asked:
        self._study._thread_local.cached_all_trials = None  # what a sampler saw before this trial
        return Asked(Trial(self._study, trial_id))

    def add(
        self,
        coordinates: Mapping[str, Any],
        values: Mapping[str, Values],
        *,
        rejected: Mapping[str, float] | None = None,
        **attributes: Any,
    ) -> int:
        """Add a point that no sampler of Optuna proposed, in one record; return its number.

        Args:
            coordinates: the point; ``values``: parameter -> what it could have been.
            rejected: by how much it broke which constraint, of a trial that failed; without it, one that is running.
            attributes: as ``label`` notes them.
        """
        number = self._num_trials
        trial = create_trial(
            state=TrialState.RUNNING if rejected is None else TrialState.FAIL,
            params=dict(coordinates),
            distributions={name: distribution(values[name]) for name in coordinates},
            user_attrs=attributes,
            constraints=dict(rejected or {}),
        )
        self._study._storage.create_new_trial(self._study._study_id, template_trial=trial)
        self._num_trials += 1
        return number

    def restore(self, number: int, coordinates: Mapping[str, Any], values: Mapping[str, Values]) -> None:
        """Give a running trial those of its coordinates that it has lost."""
        frozen = self._frozen(number)
        for name in [name for name in coordinates if name not in frozen.params]:
            among = distribution(values[name])
            internal = among.to_internal_repr(coordinates[name])
            self._study._storage.set_trial_param(frozen._trial_id, name, internal, among)

    def unfinished(self) -> list[int]:
        """Return the numbers of the trials that were asked and not told."""
        trials = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial.number for trial in trials]

    @property
    def num_trials(self) -> int:
        """How many proposals there are."""
        return self._num_trials

    def completed(self) -> Iterator[tuple[int, dict[str, Any], list[float], float]]:
        """Yield number, coordinates, values and sum of the soft constraints' excess of every completed trial."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            yield trial.number, trial.params, trial.values, sum(max(0.0, value) for value in trial.constraints.values())

    def losses(self, values: Sequence[float]) -> list[float]:
        """Return the objectives' values oriented so that less is better."""
        return [goal.loss(value) for goal, value in zip(self._objectives, values, strict=True)]

    def label(self, number: int, **attributes: Any) -> None:
        """Note attributes on a trial, for readers of the study; those that it has stay."""
        frozen = self._frozen(number)
        for name, value in attributes.items():
            if name not in frozen.user_attrs:
                self._study._storage.set_trial_user_attr(frozen._trial_id, name, value)

    def complete(self, number: int, values: Sequence[float], excess: Mapping[str, float] | None = None) -> None:
        """Tell the final values, and how far they are outside soft constraints; a told trial is left as it is."""
        self._constrain(number, excess or {})
        self._tell(number, TrialState.COMPLETE, list(values))

    def prune(self, number: int) -> None:
        """Tell that a trial was not promoted."""
        self._tell(number, TrialState.PRUNED)

    def fail(self, number: int, excess: Mapping[str, float] | None = None) -> None:
        """Tell that a trial failed or was rejected, and by how much it broke which constraint."""
        self._constrain(number, excess or {})
        self._tell(number, TrialState.FAIL)

    def _constrain(self, number: int, excess: Mapping[str, float]) -> None:
        """Set how far a trial is outside its constraints, 0 or less for inside; what a kill left set stays."""
        if excess and not self._is_told(number):
            known = self._frozen(number).constraints
            trial = Trial(self._study, self._trial_id(number))
            for name in excess.keys() - known.keys():
                trial.set_constraint(name, excess[name])

    def _tell(self, number: int, state: TrialState, values: list[float] | None = None) -> None:
        frozen = self._frozen(number)
        if not frozen.state.is_finished():
            self._study._storage.set_trial_state_values(frozen._trial_id, state, values)

    def _is_told(self, number: int) -> bool:
        return self._frozen(number).state.is_finished()

    def _trial_id(self, number: int) -> int:
        return int(self._frozen(number)._trial_id)

    def _frozen(self, number: int) -> FrozenTrial:
        storage = self._study._storage
        try:
            return storage.get_trial(storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number))
        except KeyError:
            raise RunError(
                f"{self._place}: trial {number} of the event log is not in the study; the run was edited or damaged"
            ) from None


def open_study(search: SearchFile, folder: RunFolder, parameters: Mapping[str, Values]) -> SearchStudy:
    """Return the study of a run."""
    settings = search.settings
    return SearchStudy(
        folder.path / JOURNAL,
        settings.study,
        search.objectives,
        settings.sampler,
        settings.seed,
        parameters,
        settings.storage.url if settings.storage is not None else None,
        folder.identity,
    )


class Asked:
    """One proposal: decides at the nodes of a space."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self.number = trial.number

    def choose(self, name: str, options: Sequence[str]) -> str:
        """Return one of the options."""
        return str(self._trial.suggest_categorical(name, list(options)))

    def number_in(self, name: str, limits: Range) -> float | int:
        """Return a number within the limits."""
        if limits.whole:
            step = int(limits.step or 1)
            return self._trial.suggest_int(name, int(limits.low), int(limits.high), step=step, log=limits.log)
        return self._trial.suggest_float(name, limits.low, limits.high, step=limits.step, log=limits.log)

    @property
    def coordinates(self) -> dict[str, Any]:
        """The values drawn so far, by parameter."""
        return dict(self._trial.params)


class _Seeded(BaseSampler):
    """A sampler of Optuna whose every draw is seeded by (seed, trial number, parameter).

    None of these samplers does anything before or after a trial when constraints are set on trials.
    """

    def __init__(self, kind: Sampler, seed: int, distributions: Mapping[str, BaseDistribution]) -> None:
        self._kind, self._seed, self._distributions = kind, seed, distributions

    def _for(self, trial: FrozenTrial, what: str) -> BaseSampler:
        text = f"{self._seed}/{trial.number}/{what}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
        if self._kind.kind == "tpe":
            return TPESampler(seed=seed, n_startup_trials=self._kind.startup)
        if self._kind.kind == "nsga2":
            return NSGAIISampler(seed=seed, population_size=self._kind.population)
        if self._kind.kind == "gp":
            return GPSampler(seed=seed, n_startup_trials=self._kind.startup, warn_independent_sampling=False)
        if self._kind.kind == "qmc":
            return _Sequence(trial.number, self._seed, self._distributions)
        return RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the parameters that are drawn together."""
        return self._for(trial, "together").infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw them."""
        return self._for(trial, "together").sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one parameter."""
        return self._for(trial, param_name).sample_independent(study, trial, param_name, param_distribution)


class _Sequence(QMCSampler):
    """Point ``number`` of a scrambled Sobol sequence over all parameters, conditional ones included.

    Optuna's own counts its draws in the study, which a kill between counting and drawing would shift, and leaves
    conditional parameters to chance.
    """

    def __init__(self, number: int, seed: int, distributions: Mapping[str, BaseDistribution]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            super().__init__(scramble=True, seed=seed)
        self._number, self._distributions = number, distributions

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return every parameter of the space."""
        return dict(self._distributions)

    def _find_sample_id(self, study: Study, search_space: dict[str, BaseDistribution]) -> int:
        return self._number


def _grown(study: Study, distributions: Mapping[str, BaseDistribution]) -> Study:
    """Return the study in which these distributions can be drawn from: this one, or the copy for a space that grew.

    Optuna keeps a parameter's values fixed within a study. So a space that grew continues in another study of the same
    storage, ``<name> (grown 1)``, which holds every trial so far under the wider distributions. A copy that a kill cut
    short is completed.
    """
    storage, name, generation = study._storage, study.study_name, 0
    names = set(optuna.get_all_study_names(storage))
    while f"{name} (grown {generation + 1})" in names or not _fits(study, distributions):
        generation += 1
        grown = optuna.create_study(
            storage=storage,
            study_name=f"{name} (grown {generation})",
            directions=study.directions,
            load_if_exists=True,
        )
        done = len(grown.get_trials(deepcopy=False))
        for trial in study.get_trials(deepcopy=False)[done:]:
            wider = {each: distributions.get(each, old) for each, old in trial.distributions.items()}
            grown.add_trial(
                create_trial(
                    state=trial.state,
                    values=trial.values,
                    params=trial.params,
                    distributions=wider,
                    user_attrs=trial.user_attrs,
                    system_attrs=trial.system_attrs,
                )
            )
        study = grown
    return study


def _fits(study: Study, distributions: Mapping[str, BaseDistribution]) -> bool:
    """Say whether no trial was drawn from other distributions than these."""
    found: dict[str, BaseDistribution] = {}
    for trial in study.get_trials(deepcopy=False):
        found.update(trial.distributions)
    return all(distributions.get(name, known) == known for name, known in found.items())


@cache
def distribution(values: Values) -> BaseDistribution:
    """Return Optuna's form of a parameter's values."""
    if isinstance(values, tuple):
        return CategoricalDistribution(values)
    if values.whole:
        return IntDistribution(int(values.low), int(values.high), values.log, int(values.step or 1))
    return FloatDistribution(values.low, values.high, values.log, values.step)
