"""What ``archspec explain`` says of launches is what calls launch, and a call compiles few kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import archspec
from archspec.launches import NO_GATE, ROW_GATE, TOKEN_GATE, launches

# In a process of its own, where launches are recorded instead of made.
RECORD = """
import json, aot
found = []
for op in ("linear", "delta"):
    for gate in ("none", "token", "key"):
        for B, T, H, K, V in (
            (1, 4096, 16, 128, 128), (4, 2048, 16, 128, 128), (8, 2048, 8, 256, 256), (8, 2048, 9, 64, 96)
        ):
            made = aot.record(aot.Case(op, "bfloat16", gate, (B, T, H, H, K, V), ""))
            kernels = []
            for launch in made:
                if (launch.fn.__name__, aot._key(launch)) not in kernels:
                    kernels.append((launch.fn.__name__, aot._key(launch)))
            tiles = [
                [launch.fn.__name__, launch.arguments["BZ"], launch.options["num_warps"], launch.options["num_stages"]]
                for launch in made
                if launch.fn.__name__ in ("_sweep", "_delta_forward", "_delta_backward")
            ]
            found.append({"call": [op, gate, B, T, H, K, V], "kernels": len(kernels), "tiles": tiles})
print(json.dumps(found))
"""
GATES = {"none": NO_GATE, "token": TOKEN_GATE, "key": ROW_GATE}
MOST_KERNELS = {"linear": 14, "delta": 9}  # of a forward and backward pass: each takes seconds to compile


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, Any]]:
    """What calls of both recurrences launch."""
    run = [sys.executable, "-c", RECORD]
    done = subprocess.run(run, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_launches_are_those_that_calls_make(recorded: list[dict[str, Any]]) -> None:
    assert {kernel for entry in recorded for kernel, *_ in entry["tiles"]} == {
        "_sweep", "_delta_forward", "_delta_backward"
    }  # fmt: skip
    for entry in recorded:
        op, gate, B, T, H, K, V = entry["call"]
        for kernel, *tile in entry["tiles"]:
            if kernel == "_sweep" and K != V:
                continue  # sweeps for dq and dk cut the other dim
            told = launches(op, GATES[gate], B, T, H, K, V, 132)[kernel == "_delta_backward"]
            assert [told.tile.block, told.tile.num_warps, told.tile.num_stages] == tile, (entry["call"], kernel)


def test_a_call_compiles_few_kernels(recorded: list[dict[str, Any]]) -> None:
    assert all(entry["kernels"] <= MOST_KERNELS[entry["call"][0]] for entry in recorded), recorded


def test_explain_tells_a_launch_and_its_reason() -> None:
    text = str(archspec.explain("kda", device="cuda", batch=16))
    assert "launch: walk forward over chunks of 64 rows: 128 programs of 32 value channels, 4 warps, 3 stages" in text
    assert "since a chunk of every head takes 2.7 us (channels x warps x stages: 64x4x2 4.0, 16x4x3 4.7)" in text
    text = str(archspec.explain("gla", device="cuda", batch=8))
    assert "2 wanted on each of 132 multiprocessors: 2 of 1024 rows" in text
    assert "launch:" not in str(archspec.explain("kda"))
    assert "launch:" not in str(archspec.explain("rwkv7", device="cuda"))
