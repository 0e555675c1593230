"""What the benchmarks' tuning shares between head counts and workers, on a kernel that is called but never launched."""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from benchmarks.tuning import Choices, compiling_only, sharing_choices

CONFIGS = [triton.Config({"BLOCK": block}, num_warps=warps) for block in (16, 32, 64) for warps in (2, 4)]


@triton.jit
def _copy(x, y, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < H * K), mask=at < H * K)


@pytest.fixture
def tuned() -> Autotuner:
    """A tuner whose choices no other test has made."""
    made: Autotuner = triton.autotune(CONFIGS, key=["H", "K"])(_copy)
    return made


@pytest.fixture
def called() -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of every call that would compile, or launch, a kernel."""
    calls: list[dict[str, Any]] = []

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(kwargs)

    with patch.object(JITFunction, "run", run):
        yield calls


def call(tuner: Autotuner, heads: int, key_dim: int = 64) -> None:
    x = torch.empty(heads * key_dim, device="meta")
    tuner[(1,)](x, x, H=heads, K=key_dim)


def test_workers_split_a_tuners_configurations_and_launch_nothing(
    tuned: Autotuner, called: list[dict[str, Any]]
) -> None:
    shares = []
    for part in range(4):
        called.clear()
        with compiling_only(part, 4, {}):
            call(tuned, 16)
            call(tuned, 16)  # what was counted is not counted again
        assert all(kwargs["warmup"] for kwargs in called)
        shares.append({(kwargs["BLOCK"], kwargs["num_warps"]) for kwargs in called})
    assert sum(map(len, shares)) == len(CONFIGS)
    assert set.union(*shares) == {(c.kwargs["BLOCK"], c.num_warps) for c in CONFIGS}


def test_a_choice_is_made_once_a_head_dim(tuned: Autotuner, called: list[dict[str, Any]]) -> None:
    choices: Choices = {}
    tried = []

    def bench(self: Any, *args: Any, config: triton.Config, **kwargs: Any) -> list[float]:
        tried.append(config)
        return [float(config != CONFIGS[3])]

    with sharing_choices(choices), patch.object(Autotuner, "_bench", bench):
        call(tuned, 16)
        assert (len(tried), len(choices)) == (len(CONFIGS), 1)
        call(tuned, 96)
        assert (len(tried), len(choices)) == (len(CONFIGS) + 1, 1)
        call(tuned, 16, key_dim=128)
        assert (len(tried), len(choices)) == (2 * len(CONFIGS) + 1, 2)
    assert all(kwargs["BLOCK"] == CONFIGS[3].kwargs["BLOCK"] for kwargs in called)
    called.clear()
    with compiling_only(0, 1, choices):
        call(tuned, 32)
    assert [(kwargs["BLOCK"], kwargs["num_warps"]) for kwargs in called] == [
        (CONFIGS[3].kwargs["BLOCK"], CONFIGS[3].num_warps)
    ]
