"""A search of a few seconds: real specs of width 16, a real task, a real worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from archspec.search.searchfile import SearchFile, load_search_file
from benchmarks.postgresql import server

TINY = """
study: tiny
seed: 3
space:
  model_dim: {choice: [16, 24]}
  blocks:
    main:
      mixer:
        num_heads: 2
        key_dim: {var: head_dim}
        value_dim: {var: head_dim}
        memory: matrix
        bias: {choice: [dot, l2]}
        retention: {choice: [none, {kind: decay, gate: sigmoid}]}
        update: {kind: gradient_descent, step_size: sigmoid}
      feed_forward: {kind: swiglu, expansion: 2.0}
    attention:
      mixer: {num_heads: 2, memory: kv, update: nonparametric}
  layout: {choice: [main, attention, [main, attention]]}
variables:
  head_dim: {choice: [8, 16]}
context: 64
tasks:
  recall: {kind: recall, vocab_size: 16, sequence_length: 16, num_kv_pairs: 2}
training: {learning_rates: [1e-3], batch_size: 4, eval_tokens: 256}
constraints: {non_embedding_parameters: {max: 9_000}}
objectives:
  - {metric: recall/accuracy, reference: 0.0}
  - {metric: state_bytes, reference: 10_000}
ladder:
  - rung: training_free
    candidates: 6
    init_seeds: 1
    metrics:
      - non_embedding_parameters
      - {kind: memory_capacity, lags: [1, 2], num_sequences: 8, positions: 8}
      - {kind: recall_at_init, num_pairs: [4], num_sets: 2}
    promote: {count: 3, by: [recall_at_init, memory_capacity], random: 1}
  - {rung: short_train, tokens: 640}
cost: {repeats: 3, limit_s: 0.1}
baselines: [transformer]
"""

Load = Callable[..., SearchFile]


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """The tiny search."""
    return TINY


@pytest.fixture
def tiny_file(tmp_path: Path, tiny_text: str) -> Path:
    """The tiny search as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_text)
    return path


@pytest.fixture
def load_tiny(tiny_file: Path) -> Load:
    """Load the tiny search with overrides."""

    def load(*overrides: str, **options: Any) -> SearchFile:
        return load_search_file(tiny_file, overrides, **options)

    return load


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a real PostgreSQL server of the tests' own; where it is not installed they fail: none is skipped."""
    with server() as url:
        yield url
