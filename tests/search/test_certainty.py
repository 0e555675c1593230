"""Standing by intervals: dominated only where they separate, on the front only where nothing may dominate."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from archspec.search.certainty import Standing, loss_interval, standings
from archspec.search.names import Objective
from archspec.search.trial import Trial

ACCURACY = Objective("recall/accuracy", "recall/accuracy", "maximize")
STATE = Objective("state_bytes@64", "state_bytes", "minimize", at_length=64)


def trial(number: int, low: float, high: float, state: float = 1.0, **more: Any) -> Trial:
    score = {"mean": (low + high) / 2, "spread": 0.1, "interval": [low, high], "n": 3}
    return Trial(number, scores={"recall/accuracy": score}, figures={"state_bytes@64": state}, **more)


def test_a_trial_is_dominated_only_where_the_intervals_separate() -> None:
    trials = [trial(0, 0.8, 0.9), trial(1, 0.85, 0.95), trial(2, 0.5, 0.79), trial(3, 0.1, 0.2, state=0.5)]
    assert standings(trials, [ACCURACY, STATE], [0, 1, 2, 3]) == {
        0: Standing("undecided", (1,)),
        1: Standing("undecided", (0,)),
        2: Standing("dominated", (0, 1)),
        3: Standing("front", ()),
    }


def test_touching_ends_separate_and_equal_exact_values_do_not() -> None:
    touching = [trial(0, 0.8, 0.9, state=0.5), trial(1, 0.7, 0.8)]
    assert standings(touching, [ACCURACY, STATE], [1])[1].verdict == "dominated"
    tied = [trial(0, 0.8, 0.9), trial(1, 0.7, 0.8)]  # both may be 0.8 in truth, and then neither dominates
    assert standings(tied, [ACCURACY, STATE], [1])[1].verdict == "undecided"
    same = [trial(0, 0.8, 0.8), trial(1, 0.8, 0.8)]
    assert [item.verdict for item in standings(same, [ACCURACY, STATE], [0, 1]).values()] == ["front", "front"]
    assert standings(same, [ACCURACY, STATE], []) == {}


def test_fresh_seeds_stand_before_those_a_trial_was_found_by() -> None:
    fresh = {"recall/accuracy": {"mean": 0.7, "spread": 0.0, "interval": [0.68, 0.72], "n": 3}}
    assert loss_interval(trial(0, 0.8, 0.9, rechecked=fresh), ACCURACY) == (-0.72, -0.68)
    assert loss_interval(trial(0, 0.8, 0.9), ACCURACY) == (-0.9, -0.8)


def test_what_is_not_known_excludes_nothing() -> None:
    one_seed = trial(0, 0.8, 0.9)
    one_seed.scores["recall/accuracy"]["interval"] = None
    failed = trial(1, 0.8, 0.9, recheck_failed="TrialDiverged: loss")
    for unknown in (one_seed, failed):
        assert loss_interval(unknown, ACCURACY) == (-math.inf, math.inf)
        verdicts = standings([unknown, trial(2, 0.99, 1.0)], [ACCURACY, STATE], [unknown.number, 2])
        assert {item.verdict for item in verdicts.values()} == {"undecided"}


def test_costs_and_metrics_have_their_own_ends() -> None:
    cost = {"train_step_ms": {"median": 5.0, "p20": 4.0, "p80": 7.0}}
    found = trial(0, 0.1, 0.2, cost=cost, training_free={"capacity": {"mean": 3.0, "spread": 0.5}})
    assert loss_interval(found, Objective("train_step_ms", "train_step_ms", "minimize")) == (4.0, 7.0)
    assert loss_interval(found, Objective("capacity", "capacity", "maximize")) == (-3.5, -2.5)
    assert loss_interval(found, STATE) == (1.0, 1.0)


@pytest.mark.parametrize("seed", range(3))
def test_verdicts_agree_with_values_drawn_from_the_intervals(seed: int) -> None:
    """Whatever values the intervals allow, what is surely dominated is, and so is what is surely on the front."""
    generator = random.Random(seed)
    trials = []
    for number in range(25):
        middle, half = generator.random(), 0.1 * generator.random()
        trials.append(trial(number, middle - half, middle + half, state=generator.randint(1, 6)))
    found = standings(trials, [ACCURACY, STATE], range(25))
    assert {item.verdict for item in found.values()} == {"front", "undecided", "dominated"}
    for _ in range(50):
        rows = []
        for item in trials:
            low, high = loss_interval(item, ACCURACY)
            rows.append((generator.uniform(low, high), item.figures["state_bytes@64"]))
        for number, row in enumerate(rows):
            beaten = any(other[0] <= row[0] and other[1] <= row[1] and other != row for other in rows)
            if found[number].verdict != "undecided":
                assert beaten == (found[number].verdict == "dominated")
