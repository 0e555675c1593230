"""Compositions inside loops, and under search: every kind at once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch

import archspec
from archspec import loading
from archspec.search.space import Range, open_space
from archspec.yamltext import LocatedMap, parse

from .laws import ATTENTION, MATRIX, ONLINE, hold
from .test_cell import GRU

SPACE = """
extends: mom
name: candidate
model_dim: 16
blocks:
  main:
    mixer:
      experts: {choice: [2, 3]}
      always_on: {choice: [0, 1]}
      router: {top_k: {choice: [1, 2]}, renormalize: false}
      of: {num_heads: 2, key_dim: 4, value_dim: 4, bias: {choice: [l2, dot]}}
  both:
    mixer:
      kind: parallel
      combine: {choice: [sum, product, gated]}
      of:
        near: {num_heads: 2, memory: {kind: kv, window: {choice: [4, 8]}}, update: nonparametric}
        far:
          kind: cell
          state: h
          output: h
          nodes: {h: {kind: linear, of: {input: dense, previous.h: {choice: [dense, diagonal]}}, activation: tanh}}
  row:
    mixer:
      kind: serial
      of:
        - {num_heads: 2, memory: matrix, bias: {choice: [l2, dot]}, update: gradient_descent}
        - {num_heads: 2, memory: kv, update: nonparametric}
layout: {choice: [{repeat: 2, of: main}, {loop: {choice: [2, 3]}, of: [both, row], halt: {choice: [none, act]}}]}
"""


def test_compositions_hold_the_laws_inside_a_halting_loop() -> None:
    contextual = {"kind": "memory_as_context", "segment": 5, "persistent": 2, "memory": ONLINE, "attention": ATTENTION}
    routed = {
        "kind": "routed",
        "experts": 3,
        "of": MATRIX,
        "router": {"top_k": 2, "balance_loss": 0.1},
        "share": ["query"],
    }
    blocks = {"context": {"mixer": contextual}, "routed": {"mixer": routed}, "cell": {"mixer": GRU}}
    layout = {"loop": 2, "of": list(blocks), "embed": "coordinates", "halt": {"offset": -1}}
    hold({"name": "together", "model_dim": 16, "blocks": blocks, "layout": layout}, length=13, cuts=(4, 5))


class Chooser:
    """Draws uniformly and writes down what it was asked."""

    def __init__(self, seed: int) -> None:
        self.generator = random.Random(seed)
        self.asked: list[str] = []

    def choose(self, name: str, options: Sequence[str]) -> str:
        self.asked.append(name)
        return self.generator.choice(list(options))

    def number_in(self, name: str, limits: Range) -> float | int:
        raise AssertionError(f"the space has no ranges, and {name} is one")


def test_a_search_space_reaches_inside_compositions() -> None:
    document = parse(SPACE, "space.yaml")
    assert isinstance(document, LocatedMap)
    space = open_space(loading.resolve(document, Path.cwd()), LocatedMap(("space.yaml", 0)))
    asked: set[str] = set()
    for seed in range(8):
        chooser = Chooser(seed)
        model = archspec.compile(loading.validate(space.draw(chooser)), vocab_size=7)
        assert model(torch.zeros(1, 9, dtype=torch.long)).logits.isfinite().all()
        asked.update(chooser.asked)
    assert {
        "blocks.main.mixer.of.bias",
        "blocks.main.mixer.router.top_k",
        "blocks.both.mixer.of.far.nodes.h.of.previous.h",
        "blocks.both.mixer.of.near.memory.window",
        "blocks.row.mixer.of[0].bias",
    } <= asked
