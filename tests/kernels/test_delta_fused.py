"""delta_rule's Triton kernels against fp64: under the interpreter (fp32, fp16) and, marked gpu, on a card.

bf16 stays on the card: bf16 products are wrong under Triton's interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from archspec.errors import UnsupportedError
from archspec.kernels import delta_rule

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


SMALL = [
    ("none", 63, (1, 2), (20, 24)),
    ("none", 1, (1, 1), (16, 80)),
    ("head", 70, (1, 1), (16, 16)),
    ("token", 1, (1, 1), (16, 16)),
    ("token", 100, (1, 2), (60, 96)),
    ("token", 200, (1, 1), (16, 16)),
    ("key", 1, (1, 1), (16, 16)),
    ("key", 63, (1, 1), (16, 16)),
    ("key", 100, (1, 2), (20, 24)),
    ("key", 200, (1, 1), (16, 16)),
]


@pytest.mark.interpreter
@pytest.mark.parametrize(("gate", "T", "heads", "dims"), SMALL)
def test_interpreted_fp32(
    gate: str, T: int, heads: tuple[int, int], dims: tuple[int, int], triton_agrees: Check, random_inputs: Inputs
) -> None:
    inputs = random_inputs(T, heads, dims, gate, torch.float32, "cpu", 1, 1)
    triton_agrees(delta_rule, inputs)


@pytest.mark.interpreter
@pytest.mark.parametrize("gate", ["none", "token", "key"])
def test_interpreted_fp16(gate: str, triton_agrees: Check, random_inputs: Inputs) -> None:
    inputs = random_inputs(70, (1, 1), (16, 16), gate, torch.float16, "cpu", 1, 1)
    triton_agrees(delta_rule, inputs)


@pytest.mark.interpreter
@pytest.mark.parametrize("gate", ["token", "key"])
def test_interpreted_strong_decay(gate: str, triton_agrees: Check, random_inputs: Inputs) -> None:
    inputs = random_inputs(100, (1, 1), (16, 16), gate, torch.float32, "cpu", 1, 1, strong=True)
    triton_agrees(delta_rule, inputs)


@pytest.mark.interpreter
@pytest.mark.parametrize("gate", ["none", "token", "key"])
def test_interpreted_packed(gate: str, triton_agrees: Check, random_inputs: Inputs) -> None:
    inputs = random_inputs(150, (1, 1), (16, 16), gate, torch.float32, "cpu", 3, 1)
    triton_agrees(delta_rule, inputs, (0, 70, 75, 150))


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


DIMS = [(16, 16), (32, 64), (60, 96), (64, 64), (100, 100), (128, 128), (128, 64), (64, 256), (256, 256)]


@pytest.mark.gpu
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("gate", ["none", "token", "key"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_the_card(
    gate: str, dims: tuple[int, int], dtype: torch.dtype, triton_agrees: Check, random_inputs: Inputs
) -> None:
    for T in (1, 63, 100, 2000, 8192):
        inputs = random_inputs(T, (2, 2), dims, gate, dtype, "cuda", 2, 2)
        triton_agrees(delta_rule, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["none", "head", "token", "key"])
def test_on_the_card_grouped_and_packed(gate: str, triton_agrees: Check, random_inputs: Inputs) -> None:
    inputs = random_inputs(3000, (2, 4), (128, 128), gate, torch.bfloat16, "cuda", 3, 1)
    triton_agrees(delta_rule, inputs, (0, 1, 1250, 3000))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["token", "key"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_the_card_strong_decay(gate: str, dtype: torch.dtype, triton_agrees: Check, random_inputs: Inputs) -> None:
    inputs = random_inputs(2000, (2, 2), (128, 128), gate, dtype, "cuda", 2, 2, strong=True)
    triton_agrees(delta_rule, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["none", "token", "key"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_the_card_long_keys(gate: str, dtype: torch.dtype, long_keys: Inputs, triton_agrees: Check) -> None:
    inputs = long_keys(1000, (128, 128), gate, dtype, "cuda")
    triton_agrees(delta_rule, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["none", "token", "key"])
def test_on_the_card_results_repeat(gate: str, random_inputs: Inputs) -> None:
    inputs = random_inputs(2000, (2, 4), (128, 128), gate, torch.bfloat16, "cuda", 2, 2)
    runs = []
    for _ in range(2):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        o, last = delta_rule(**leaves, output_final_state=True)
        assert last is not None
        runs.append([o, last, *torch.autograd.grad(o.float().square().sum() + last.sum(), list(leaves.values()))])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["none", "token", "key"])
def test_on_the_card_compiled_without_graph_breaks(gate: str, random_inputs: Inputs) -> None:
    inputs = random_inputs(300, (2, 2), (64, 64), gate, torch.bfloat16, "cuda", 2, 2)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    compiled = torch.compile(delta_rule, fullgraph=True)
    results = []
    for call in (compiled, delta_rule):
        o, last = call(**leaves, output_final_state=True)
        assert last is not None
        results.append([o, *torch.autograd.grad(o.float().square().sum() + last.sum(), list(leaves.values()))])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
