"""delta_rule's Triton kernels against fp64: under the interpreter (fp32, fp16) and, marked gpu, on a card.

bf16 stays on the card: bf16 products are wrong under Triton's interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from archspec import launches
from archspec.errors import UnsupportedError
from archspec.kernels import delta_rule
from archspec.launches import SweepConfig

Inputs = Callable[..., dict[str, Tensor]]
Check = Callable[..., None]


@pytest.fixture
def random_inputs(random_inputs: Inputs) -> Inputs:
    """Inputs of the delta rule: unit keys, strengths up to 2."""
    return functools.partial(random_inputs, delta=True)


@pytest.fixture
def long_keys(random_inputs: Inputs) -> Inputs:
    """Return a function that draws inputs with keys whose products pass fp16's largest number, 65,504."""

    def make(T: int, dims: tuple[int, int], gate: str, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Keys and values of about 1000, keys up to four times shorter or longer; strengths that contract."""
        inputs = random_inputs(T, (1, 1), dims, gate, dtype, device, 1, 1)
        generator = torch.Generator(device).manual_seed(T)
        factor = 1000 * 4 ** (2 * torch.rand(1, T, 1, 1, generator=generator, device=device) - 1)
        inputs["k"] = (inputs["k"] * factor).to(dtype)
        inputs["beta"] = inputs["beta"] / inputs["k"].float().square().sum(-1)
        inputs["v"] = (inputs["v"] * 1000).to(dtype)
        return inputs

    return make


@pytest.mark.interpreter
def test_interpreted_like_keys(triton_agrees: Check, random_inputs: Inputs) -> None:
    """Keys that are all but equal make the inverse's power series cancel; joined blocks do not."""
    inputs = random_inputs(64, (1, 1), (16, 16), "none", torch.float32, "cpu", 1, 1)
    inputs["k"] = torch.nn.functional.normalize(inputs["k"] + 10 * inputs["k"][:, :1], dim=-1)
    triton_agrees(delta_rule, inputs)


@pytest.mark.interpreter
@pytest.mark.parametrize("gate", ["none", "token"])
def test_interpreted_long_keys(gate: str, long_keys: Inputs, triton_agrees: Check) -> None:
    inputs = long_keys(70, (16, 16), gate, torch.float16, "cpu")
    triton_agrees(delta_rule, inputs)


@pytest.mark.interpreter
def test_interpreted_without_outputs(random_inputs: Inputs, triton_agrees: Check) -> None:
    """A scale of zero leaves gradients through the last state alone."""
    inputs = random_inputs(70, (1, 1), (16, 16), "token", torch.float32, "cpu", 1, 1)
    triton_agrees(functools.partial(delta_rule, scale=0.0), inputs)


SERIAL = sorted(
    {
        (gate, way.config.block, way.config.num_warps, way.config.num_stages)
        for ways in (launches._FORWARD, launches._BACKWARD)
        for gate, candidates in zip(("none", "token", "key"), ways, strict=True)
        for way in candidates
    }
)


@pytest.mark.gpu
@pytest.mark.parametrize(("gate", "block", "num_warps", "num_stages"), SERIAL)
def test_on_the_card_serial_tiles(
    gate: str, block: int, num_warps: int, num_stages: int, random_inputs: Inputs, triton_agrees: Check,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every tile that the rule chooses between, whatever it would choose here."""
    from archspec.kernels.delta import fused

    config = SweepConfig(block, num_warps, num_stages)
    monkeypatch.setattr(fused, "serial_config", lambda *_, **__: config)
    for dims in ((128, 128), (60, 96)):
        triton_agrees(delta_rule, random_inputs(300, (2, 2), dims, gate, torch.bfloat16, "cuda", 2, 2))


def test_serial_tiles_follow_the_number_of_heads() -> None:
    """On 132 multiprocessors: narrow tiles for few heads, two programs each for many, and no gap between."""
    by_heads = [launches.serial_config(128, 128, 2, 0, heads, 132, reverse=False) for heads in (1, 16, 33, 64, 512)]
    assert [(config.block, config.num_stages) for config in by_heads] == [(16, 3), (16, 3), (32, 3), (32, 2), (32, 2)]


UNSERVED = [
    ({"order": "together"}, "order='together'"),
    ({"read_key": torch.ones(1, 3, 1, 16)}, "a separate read_key"),
    ({"erase_key": torch.ones(1, 3, 1, 16)}, "a separate erase_key"),
    ({"write_beta": torch.ones(1, 3, 1)}, "a separate write_beta"),
    ({"beta": torch.ones(1, 3, 1, 16)}, "a beta per key channel"),
]


@pytest.mark.interpreter
@pytest.mark.parametrize(("change", "named"), UNSERVED)
def test_what_the_kernel_does_not_serve(change: dict[str, object], named: str, random_inputs: Inputs) -> None:
    inputs = random_inputs(3, (1, 1), (16, 16), "none", torch.float32, "cpu", 1, 1) | change
    with pytest.raises(UnsupportedError, match=f"the Triton kernel does not serve {named}; use backend='chunked'"):
        delta_rule(**inputs, backend="triton")  # type: ignore[arg-type]
    found, _ = delta_rule(**inputs)  # type: ignore[arg-type]
    wanted, _ = delta_rule(**inputs, backend="chunked")  # type: ignore[arg-type]
    assert torch.equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["none", "token", "key"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_the_card_long_keys(gate: str, dtype: torch.dtype, long_keys: Inputs, triton_agrees: Check) -> None:
    inputs = long_keys(1000, (128, 128), gate, dtype, "cuda")
    triton_agrees(delta_rule, inputs)
