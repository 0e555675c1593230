"""What a drawn value does to a figure: the share of its rank variance, and whether that is more than chance.

For one parameter, trials are grouped by its value (whole and real numbers with more than four values by quarters), and
the figure is replaced by its average ranks r. The share is eta^2 = sum_g n_g (mean_g - mean)^2 / sum_i (r_i - mean)^2,
between 0 and 1; it is Kruskal and Wallis's H / (n - 1). With k groups chance alone gives (k - 1) / (n - 1) on average,
so the share stands beside a p: how often shuffled ranks reach it, or for many trials the chi-squared tail of H with
k - 1 degrees of freedom. A verdict needs ``ENOUGH`` trials and a p
under 0.05 over the number of parameters looked at (Bonferroni).

Beside it stands PED-ANOVA (Watanabe, Bansal and Hutter, IJCAI 2023; Optuna's), which asks what tells the best tenth
from the rest rather than what moves the mean; it is computed over parameters that every trial drew.

Trials of a ladder's last rung were selected, and a sampler prefers what did well: none of this is the effect of a
choice in itself.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from archspec.search.correlation import ENOUGH, average_ranks
from archspec.search.names import Objective
from archspec.search.records import Run
from archspec.search.trial import Trial

Verdict = Literal["matters", "not enough evidence", "always the same"]
QUARTERS = 4
PERMUTATIONS = 1999
MANY_TRIALS = 500  # beyond, H follows chi-squared closely, and shuffling is slow


@dataclass(frozen=True)
class Influence:
    """One parameter's hold on one figure.

    Fields:
        share: of the rank variance, 0 to 1; None when the parameter or the figure does not vary.
        p: of a share as large by chance.
        best: the value whose trials have the best mean rank, and how many there are.
        ped_anova: share of PED-ANOVA's importance, None where it could not be computed.
    """

    parameter: str
    n: int
    num_values: int
    share: float | None
    p: float | None
    best: tuple[str, int] | None
    ped_anova: float | None
    verdict: Verdict


def known_for(run: Run, goal: Objective) -> list[tuple[Trial, float]]:
    """Return the sampled trials with the figure, and it as a loss."""
    late = {score for task in run.tasks.values() for score in task["scores"]}
    states = ("trained",) if goal.metric in late else ("trained", "evaluated")
    trials = [trial for trial in run if trial.origin == "sampled" and trial.state in states]
    return [(trial, goal.loss(value)) for trial in trials if (value := trial.value(goal.name)) is not None]


def influences(run: Run, goal: Objective, *, ped_anova: bool = True) -> list[Influence]:
    """Return every drawn parameter's influence on a figure, the greatest first."""
    known = known_for(run, goal)
    names = list(dict.fromkeys(name for trial, _ in known for name in trial.coordinates))
    other = _ped_anova(known) if ped_anova and len(known) >= ENOUGH else {}
    found = [_influence(name, known, len(names), other.get(name)) for name in names]
    return sorted(found, key=lambda item: (-(item.share or 0.0), item.parameter))


def share_and_p(groups: Sequence[Hashable], losses: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the share of the rank variance that lies between the groups, and the permutation p of it.

    None and None unless both vary. The shuffles are always the same.
    """
    import numpy as np

    labels = {group: at for at, group in enumerate(dict.fromkeys(groups))}
    ranks = np.asarray(average_ranks(losses)) if losses else np.zeros(0)
    total = float(((ranks - ranks.mean()) ** 2).sum()) if len(ranks) else 0.0
    if len(labels) < 2 or total == 0:
        return None, None
    codes = np.asarray([labels[group] for group in groups])
    sizes = np.bincount(codes)

    def between(values: Any) -> float:
        means = np.bincount(codes, weights=values) / sizes
        return float((sizes * (means - ranks.mean()) ** 2).sum()) / total

    share = between(ranks)
    if len(ranks) > MANY_TRIALS:
        return share, chi_squared_tail(share * (len(ranks) - 1), len(labels) - 1)
    generator = np.random.default_rng(0)
    reached = sum(between(generator.permutation(ranks)) >= share - 1e-12 for _ in range(PERMUTATIONS))
    return share, (reached + 1) / (PERMUTATIONS + 1)


def chi_squared_tail(x: float, degrees: int) -> float:
    """Return P(X > x) for chi-squared: Abramowitz and Stegun, 26.4.4 (odd degrees) and 26.4.5 (even degrees)."""
    half = x / 2
    if half == 0:
        return 1.0
    first = 1.0 if degrees % 2 else 0.5  # the terms are half^(i - 1/2) / gamma(i + 1/2), or half^i / i!
    powers = [first + at - 0.5 for at in range(degrees // 2)]
    terms = math.fsum(math.exp(power * math.log(half) - half - math.lgamma(power + 1)) for power in powers)
    return terms + (math.erfc(math.sqrt(half)) if degrees % 2 else 0.0)


def verdict(p: float | None, n: int, num_looks: int) -> Verdict:
    """Say whether a share is more than chance, having looked ``num_looks`` times."""
    return "matters" if p is not None and n >= ENOUGH and p * num_looks < 0.05 else "not enough evidence"


def _influence(name: str, known: Sequence[tuple[Trial, float]], num_looks: int, other: float | None) -> Influence:
    rows = [(trial.coordinates[name], loss) for trial, loss in known if name in trial.coordinates]
    groups = _grouped([value for value, _ in rows])
    losses = [loss for _, loss in rows]
    share, p = share_and_p(groups, losses)
    ranks = average_ranks(losses)
    means: dict[str, list[float]] = {}
    for group, rank in zip(groups, ranks, strict=True):
        means.setdefault(group, []).append(rank)
    best = min(means, key=lambda group: (sum(means[group]) / len(means[group]), group)) if share is not None else None
    told = None if best is None else (best.rpartition(":")[2], len(means[best]))
    said: Verdict = verdict(p, len(rows), num_looks) if len(means) > 1 else "always the same"
    return Influence(name, len(rows), len(means), share, p, told, other, said)


def _grouped(values: Sequence[Any]) -> list[str]:
    """Return each value's group: itself, or its quarter where numbers take many values."""
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    distinct = sorted(set(values)) if numeric else []
    if len(distinct) <= QUARTERS:
        return [str(value) for value in values]
    ordered = sorted(values)
    cuts = [ordered[len(ordered) * quarter // QUARTERS] for quarter in range(1, QUARTERS)]
    ends = [ordered[0], *cuts, ordered[-1]]
    quarters = [sum(value >= cut for cut in cuts) for value in values]
    return [f"{ends[quarter]:g} to {ends[quarter + 1]:g}" for quarter in quarters]


def _ped_anova(known: Sequence[tuple[Trial, float]]) -> Mapping[str, float]:
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    names = set.intersection(*(set(trial.coordinates) for trial, _ in known))
    kinds = {name: _distribution([trial.coordinates[name] for trial, _ in known]) for name in sorted(names)}
    kinds = {name: kind for name, kind in kinds.items() if kind is not None}
    if not kinds or len({loss for _, loss in known}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    for trial, loss in known:
        params = {name: trial.coordinates[name] for name in kinds}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, value=loss))
    return dict(get_param_importances(study, evaluator=PedAnovaImportanceEvaluator()))


def _distribution(values: Sequence[Any]) -> Any:
    """Return what Optuna takes the values for; None when they do not vary."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if len(set(values)) < 2:
        return None
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return IntDistribution(min(values), max(values))
    if all(isinstance(value, float) for value in values):
        return FloatDistribution(min(values), max(values))
    return CategoricalDistribution(sorted(set(values), key=str))
