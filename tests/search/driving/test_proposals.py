"""Proposals: every sampler by name, evolution, known points, repair, and what is left of a small space."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from archspec.errors import SpecError
from archspec.search.candidates import Candidate, Rejection, admit, named
from archspec.search.evolution import Parents, crossed, mutated
from archspec.search.points import express, key_of, parameters, points
from archspec.search.proposals import Proposal, Proposer
from archspec.search.records import Run
from archspec.search.searchfile import SearchFile
from archspec.search.study import SearchStudy

Load = Callable[..., SearchFile]
LARGE = (
    "variables.head_dim={choice: [2, 4, 8, 16]}",
    "space.model_dim={choice: [16, 24, 32, 40]}",
    "constraints={non_embedding_parameters: {max: 20000}}",
)


def open_proposer(search: SearchFile, folder: Path) -> tuple[Proposer, SearchStudy]:
    """Return a proposer on a study in a folder, as the driver opens them, without an event log."""
    settings, among = search.settings, parameters(search.space)
    study = SearchStudy(
        folder / "journal.log", settings.study, search.objectives, settings.sampler, settings.seed, among
    )
    return Proposer(search, study, Run(folder), 0, among), study


def climb(search: SearchFile, folder: Path, count: int) -> list[tuple[Proposal, Candidate | Rejection]]:
    """Propose, judge and tell ``count`` times, with (width, -heads' width) as values."""
    proposer, study = open_proposer(search, folder)
    found: list[tuple[Proposal, Candidate | Rejection]] = []
    hashes: set[str] = set()
    while len(found) < count and not proposer.is_exhausted:
        proposal = proposer.next()
        if proposal is None:
            break
        result = admit(named(proposal.document, f"p-{proposal.number}"), search)
        if isinstance(result, Candidate) and result.hash in hashes:
            result = Rejection("duplicate", "", {}, result.hash)
        proposer.hear(proposal, result if isinstance(result, Rejection) else None)
        found.append((proposal, result))
        if isinstance(result, Rejection):
            study.fail(proposal.number, result.excess)
            continue
        hashes.add(result.hash)
        values = [float(result.figures["non_embedding_parameters"]), float(result.figures["state_bytes"])]
        study.complete(proposal.number, values)
        proposer.hear_values(proposal.number, proposal.coordinates, study.losses(values), 0.0)
    return found


@pytest.mark.parametrize("kind", ["random", "qmc", "tpe", "nsga2", "gp", "evolution"])
def test_every_sampler_by_name_proposes_the_same_from_the_same_seed(kind: str, tmp_path: Path, load_tiny: Load) -> None:
    folders = [tmp_path / name for name in ("one", "two", "other")]
    for folder in folders:
        folder.mkdir()
    sampler = f"sampler={{kind: {kind}, startup: 9, population: 4}}"
    search = load_tiny(sampler, *LARGE)
    first, second = ([p.coordinates for p, _ in climb(search, folder, 12)] for folder in folders[:2])
    assert first == second
    other = load_tiny(sampler, *LARGE, "seed=4")
    assert [p.coordinates for p, _ in climb(other, folders[2], 12)] != first
    among = parameters(search.space)
    for point in first:
        assert all(name in among for name in point)


def test_the_quasi_random_sequence_covers_more_evenly_than_chance(tmp_path: Path, load_tiny: Load) -> None:
    """Of 16 Sobol points on a choice of four, each quarter of the axis holds four."""
    search = load_tiny("sampler=qmc", *LARGE)
    widths = [proposal.document["model_dim"] for proposal, _ in climb(search, tmp_path, 16)]
    assert [widths.count(width) for width in (16, 24, 32, 40)] == [4, 4, 4, 4]


def test_points_are_as_many_as_the_space_says_and_all_different(load_tiny: Load) -> None:
    search = load_tiny()
    found = list(points(search.space))
    assert len(found) == search.space.size.settings
    assert len({key_of(point) for point in found}) == len(found)
    assert {name for point in found for name in point} == set(parameters(search.space))


@pytest.mark.parametrize("kind", ["random", "evolution", "tpe"])
def test_a_small_space_is_seen_to_its_last_point_and_nothing_is_accepted_twice(
    kind: str, tmp_path: Path, load_tiny: Load
) -> None:
    search = load_tiny(f"sampler={kind}")
    every = {
        result.hash
        for point in points(search.space)
        if isinstance(result := admit(named(express(search.space, point, "")[0], "x"), search), Candidate)
    }
    found = climb(search, tmp_path, 2000)
    accepted = [result.hash for _, result in found if isinstance(result, Candidate)]
    assert len(accepted) == len(set(accepted))
    assert set(accepted) == every
    # the search's own samplers draw again within a proposal: no point is proposed twice
    if kind != "tpe":
        assert len({key_of(proposal.coordinates) for proposal, _ in found}) == len(found)
        assert sum(proposal.redraws for proposal, _ in found) > 0


def test_known_points_come_first_and_evolution_starts_from_the_base(tmp_path: Path, load_tiny: Load) -> None:
    (tmp_path / "two").mkdir()
    known = "known=[{layout: attention, model_dim: 24}, base]"
    found = [p for p, _ in climb(load_tiny(known, "sampler=tpe"), tmp_path, 3)]
    assert [p.how for p in found] == ["known", "known", "sampler"]
    assert found[0].document["model_dim"] == 24
    assert found[0].coordinates["layout"] == "layout:attention"
    assert found[1].document["model_dim"] == 16
    (first, _), *_ = climb(load_tiny("sampler=evolution"), tmp_path / "two", 1)
    assert (first.how, first.document["model_dim"], first.coordinates["layout"]) == ("known", 16, "layout:main")


def test_a_known_point_that_is_not_in_the_space_is_a_located_error(load_tiny: Load) -> None:
    with pytest.raises(SpecError, match=r"known\[0\]: unknown parameter 'layuot'.*layout"):
        load_tiny("known=[{layuot: main}]")
    with pytest.raises(SpecError, match=r"known\[0\]\.model_dim: no such value.*model_dim:16, model_dim:24"):
        load_tiny("known=[{model_dim: 17}]")


def test_a_repair_changes_one_value_of_the_least_bad_draw(tmp_path: Path, load_tiny: Load) -> None:
    limit = "constraints={non_embedding_parameters: {max: 3500}}"
    (tmp_path / "without").mkdir()
    found = climb(load_tiny("sampler=random", "repair=4", *LARGE[:2], limit), tmp_path, 30)
    repairs = [(before, after) for before, after in pairwise(found) if after[0].how == "repair"]
    assert repairs
    for (before, miss), (after, _) in repairs:
        assert isinstance(miss, Rejection)
        if before.how != "repair":  # the first repair of a draw starts from that draw
            changed = {
                name
                for name in before.coordinates.keys() & after.coordinates.keys()
                if before.coordinates[name] != after.coordinates[name]
            }
            assert len(changed) == 1
    without = climb(load_tiny("sampler=random", *LARGE[:2], limit), tmp_path / "without", 30)
    rate = [sum(isinstance(result, Candidate) for _, result in runs) / len(runs) for runs in (found, without)]
    assert rate[0] > 1.5 * rate[1]


def test_ranks_count_dominators_whatever_the_order_and_soft_constraints_come_before() -> None:
    rows = {0: [0.0, 3.0], 1: [1.0, 1.0], 2: [2.0, 2.0], 3: [3.0, 3.0], 4: [-1.0, -1.0]}
    excess = {4: 0.5}
    orders = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]]
    for order in orders:
        parents = Parents(population=4)
        for number in order:
            parents.add(number, {"n": number}, rows[number], excess.get(number, 0.0))
        # trial 4 dominates all others but is infeasible: it counts as a dominator and is itself last
        assert parents.best() == [{"n": 0}, {"n": 1}, {"n": 2}, {"n": 3}]
    large = Parents(population=3)
    for number in range(200):  # across several doublings of the table
        large.add(number, {"n": number}, [float(number), float(-number if number < 100 else 0)])
    assert [point["n"] for point in large.best()] == [0, 1, 2]


def test_crossing_takes_whole_nodes_and_mutation_changes_one_value() -> None:
    first = {"a": "a:1", "b": "b:x", "b/x.depth": 2}
    second = {"a": "a:2", "b": "b:y", "b/y.width": 8}
    made = [crossed(first, second, random.Random(seed)) for seed in range(30)]
    assert all(("b/x.depth" in point) == (point["b"] == "b:x") for point in made)
    assert all(("b/y.width" in point) == (point["b"] == "b:y") for point in made)
    assert len({key_of(point) for point in made}) == 4
    among = {"a": ("a:1", "a:2"), "b": ("b:x", "b:y")}
    for seed in range(20):
        child = mutated(first, random.Random(seed), among)
        assert child in ({**first, "a": "a:2"}, {"a": "a:1", "b": "b:y"})


def test_evolution_gets_closer_to_the_front_than_chance(tmp_path: Path, load_tiny: Load) -> None:
    """Few parameters and a small state are both wanted: later children lie lower than uniform draws do."""
    objectives = (
        "objectives=[{metric: non_embedding_parameters, reference: 20000}, {metric: state_bytes, reference: 10000}]"
    )
    means = {}
    for kind in ("random", "evolution"):
        (tmp_path / kind).mkdir()
        search = load_tiny(f"sampler={{kind: {kind}, startup: 8, population: 6}}", *LARGE, objectives)
        late = [result for _, result in climb(search, tmp_path / kind, 40)[12:] if isinstance(result, Candidate)]
        means[kind] = sum(result.figures["non_embedding_parameters"] for result in late) / len(late)
    assert means["evolution"] < 0.85 * means["random"]
