"""Mixers side by side and one after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import archspec
from archspec.blocks.carry import Carry
from archspec.errors import SpecError

from .laws import ATTENTION, MATRIX, ONLINE, close, document, first_mixer, hold

PAIR = {"keys": MATRIX, "near": {**ATTENTION, "memory": {"kind": "kv", "window": 5}}}


def parallel(of: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return document({"kind": "parallel", "of": of or PAIR, **fields})


def serial(*of: Any, **fields: Any) -> dict[str, Any]:
    return document({"kind": "serial", "of": list(of), **fields})


@pytest.mark.parametrize("combine", ["sum", "mean", "product", "gated", "concat"])
def test_parallel_holds_the_laws(combine: str) -> None:
    hold(parallel(combine=combine, prefix=0 if combine == "sum" else 3))


def test_serial_holds_the_laws() -> None:
    hold(serial(ONLINE, ATTENTION, prefix=3))


def test_nested_compositions_hold_the_laws() -> None:
    hold(serial({"kind": "parallel", "of": PAIR, "prefix": 2}, {"kind": "serial", "of": [MATRIX, ATTENTION]}))


@pytest.mark.parametrize("combine", ["sum", "mean", "product", "gated", "concat"])
def test_parallel_combines_its_mixers_outputs(combine: str) -> None:
    mixer = first_mixer(parallel(combine=combine))
    x = torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    a, b = (module(x, Carry(None, 0)) for module in mixer.of)
    weight = mixer.values().get("weight")
    gates = torch.exp(x @ weight) if combine == "gated" else x
    gates = gates / gates.sum(-1, keepdim=True)
    wanted = {
        "sum": lambda: a + b,
        "mean": lambda: (a + b) / 2,
        "product": lambda: a * b,
        "gated": lambda: gates[..., :1] * a + gates[..., 1:] * b,
        "concat": lambda: a @ weight[:16] + b @ weight[16:],
    }[combine]()
    assert close(mixer(x, Carry(None, 0)), wanted)


def test_serial_feeds_each_mixer_what_the_one_before_returns() -> None:
    mixer = first_mixer(serial(MATRIX, ATTENTION))
    x = torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    first, second = mixer.of
    assert close(mixer(x, Carry(None, 0)), second(first(x, Carry(None, 0)), Carry(None, 0)))


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return archspec.architecture_hash(archspec.load(first)) == archspec.architecture_hash(archspec.load(second))


def test_equal_compositions_have_one_hash() -> None:
    renamed = {"a": PAIR["near"], "b": MATRIX}
    assert same(parallel(combine="concat"), parallel(renamed, combine="concat"))
    assert same(serial(MATRIX), document(MATRIX))
    assert same(parallel({"only": MATRIX}, combine="product"), document(MATRIX))
    assert same(serial(MATRIX, {"kind": "serial", "of": [ATTENTION, MATRIX]}), serial(MATRIX, ATTENTION, MATRIX))


def test_different_compositions_have_different_hashes() -> None:
    assert not same(serial(MATRIX, ATTENTION), serial(ATTENTION, MATRIX))
    assert not same(parallel(combine="sum"), parallel(combine="mean"))
    assert not same(parallel({"only": MATRIX}, combine="gated"), document(MATRIX))
    assert not same(parallel(prefix=1), parallel())
    inner = {**PAIR, "keys": {**MATRIX, "num_heads": 4}}
    assert not same(parallel(inner), parallel())


def test_names_do_not_change_what_is_drawn() -> None:
    first, second = (archspec.compile(parallel({name: MATRIX}), seed=7) for name in ("a", "values"))
    for (path, ours), (other, theirs) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert path == other
        assert torch.equal(ours, theirs)


def test_errors_inside_a_composition_name_their_place() -> None:
    bad = {**MATRIX, "memory": "kv"}
    with pytest.raises(SpecError, match=r"blocks\.main\.mixer\.of\[1\]\.of\.deep\.update: memory kv stores tokens"):
        archspec.load(serial(MATRIX, {"kind": "parallel", "of": {"deep": bad}}))
    with pytest.raises(SpecError, match=r"mixer\.of\[0\]\.bias: unknown attentional bias 'l3'"):
        archspec.load(serial({**MATRIX, "bias": "l3"}))
    with pytest.raises(SpecError, match=r"mixer\.combine: found 'sums'; .*Did you mean 'sum'"):
        archspec.load(parallel(combine="sums"))


def test_explain_shows_the_composition_and_every_memory_inside() -> None:
    text = str(archspec.explain(serial({"kind": "parallel", "of": PAIR, "combine": "product"}, ONLINE, prefix=4)))
    assert "serial: 2 mixers, each reading the one before, behind 4 learned tokens" in text
    assert "parallel: product of keys, near" in text
    for path, family in (("of[0].of.keys", "delta"), ("of[0].of.near", "softmax"), ("of[1]", "online")):
        assert f"blocks.main.mixer.{path}  (in 2 layers)" in text
        assert f"runs as {family}" in text
