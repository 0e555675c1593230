"""Promotion: ranks within bins of equal size, the random share, and what it depends on."""

from __future__ import annotations

import random
from typing import Any

import pytest

from archspec.search.ladder import Contender, Pool, aggregate, bins, promote
from archspec.search.settings import Promote

BY: dict[str, Any] = {"good": "maximize", "bad": "minimize"}


def contender(number: int, size: float, good: float | None, bad: float | None = 0.0, **more: Any) -> Contender:
    return Contender(number, size, {"good": good, "bad": bad}, **more)


def rule(**fields: Any) -> Promote:
    return Promote.model_validate(fields)


def test_bins_span_at_most_their_width() -> None:
    members = [contender(i, size, 0.0) for i, size in enumerate([100, 125, 126, 150, 200, 90])]
    found = [[c.size for c in each] for each in bins(members, 1.25)]
    assert found == [[90, 100], [125, 126, 150], [200]]


def test_the_aggregate_is_the_mean_place_within_the_bin() -> None:
    members = [contender(0, 100, 3.0, 1.0), contender(1, 100, 2.0, 3.0), contender(2, 100, 1.0, 2.0)]
    found = aggregate(members, BY, 1.25)
    assert found == pytest.approx({0: 1 / 6, 1: 4 / 6, 2: 4 / 6})


@pytest.mark.parametrize("by", [BY, {"good": "maximize"}, {**BY, "third": "minimize", "fourth": "maximize"}])
def test_tables_find_the_best_that_the_aggregate_finds(by: dict[str, Any]) -> None:
    draw, pool, members = random.Random(0), Pool(by, 1.25), list[Contender]()
    for number in range(300):  # across several growths of the table, with ties, gaps and what is not a number
        values = {name: draw.choice([None, float("nan"), *map(float, range(6))]) for name in by}
        members.append(Contender(number * 7 % 300, float(draw.randrange(100, 1000, 10)), values))
        pool.add(members[-1])
        without = {each.number for each in draw.sample(members, len(members) // 3)}
        aggregates = aggregate(members, by, 1.25)
        rest = [each.number for each in members if each.number not in without]
        best = sorted(rest, key=lambda number: (aggregates[number], number))
        assert pool.best(1 + number % 5, without) == best[: 1 + number % 5]


def test_size_does_not_buy_promotion() -> None:
    """A metric that grows with size alone gives every bin the same places."""
    members = [contender(i, size, size) for i, size in enumerate([100, 110, 1000, 1100])]
    found = promote(members, rule(count=2, random=0), {"good": "maximize"}, (0, 0, 0))
    assert sorted(found.rank) == [1, 3]


def test_what_is_not_a_number_ranks_last() -> None:
    members = [contender(0, 100, None), contender(1, 100, float("nan")), contender(2, 100, -5.0)]
    found = promote(members, rule(count=1, random=0), {"good": "maximize"}, (0, 0, 0))
    assert found.rank == [2]


def test_the_random_share_is_part_of_the_count_drawn_from_all_and_first() -> None:
    members = [contender(i, 100, float(i)) for i in range(48)]
    found = promote(members, rule(count=8, random=4), {"good": "maximize"}, (7, 0, 0))
    assert len(found.random) == 4
    assert len(found.rank) == 4
    assert not set(found.rank) & set(found.random)
    assert found.rank == [number for number in range(47, -1, -1) if number not in found.random][:4]
    again = promote(members[::-1], rule(count=8, random=4), {"good": "maximize"}, (7, 0, 0))
    assert again == found


def test_over_many_seeds_the_random_share_is_uniform() -> None:
    members = [contender(i, 100, float(i)) for i in range(10)]
    hits = [0] * 10
    for seed in range(1000):
        for number in promote(members, rule(count=2, random=2), {"good": "maximize"}, (seed, 0, 0)).random:
            hits[number] += 1
    # 200 expected; a binomial of 1000 draws at 0.2 has standard deviation 12.6, and five of them are allowed.
    assert all(abs(count - 200) < 63 for count in hits)


def test_on_a_later_rung_lot_falls_among_those_whom_lot_brought() -> None:
    members = [contender(i, 100, float(i), by_lot=i < 3) for i in range(10)]
    found = promote(members, rule(count=4, random=2), {"good": "maximize"}, (0, 0, 1))
    assert set(found.random) < {0, 1, 2}
    assert found.rank == [9, 8]


def test_few_contenders_are_all_promoted() -> None:
    members = [contender(i, 100, float(i)) for i in range(2)]
    found = promote(members, rule(count=8, random=4), {"good": "maximize"}, (0, 0, 0))
    assert sorted([*found.rank, *found.random]) == [0, 1]


def test_a_bare_number_is_the_count_and_a_quarter_of_it_is_random() -> None:
    assert (rule(count=8).numbers(48), Promote.model_validate(16).count) == ((8, 2), 16)
    with pytest.raises(ValueError, match="random: 9 is more than count: 8"):
        rule(count=8, random=9)
