"""linear_attention's Triton kernels against fp64: under the interpreter (fp32, fp16) and, marked gpu, on a card.

bf16 stays on the card: bf16 products are wrong under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from archspec.kernels import linear_attention, linear_attention_step

Inputs = Callable[..., dict[str, Tensor]]
Check = Callable[..., None]

# As in conftest.py: bf16's rounding of outputs, and fp32's under the interpreter.
OUTPUT_TOLERANCE, FP32_TOLERANCE = 0.005, 1e-4


def rms_ratio(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm().clamp(min=1e-30))


SMALL = [
    ("none", 70, (1, 2), (20, 24)),
    ("head", 70, (1, 1), (16, 16)),
    ("token", 100, (1, 2), (20, 24)),
    ("token", 530, (1, 1), (16, 16)),
    ("key", 100, (1, 2), (20, 24)),
    ("key", 530, (1, 1), (16, 16)),
    ("key", 1, (1, 1), (16, 16)),
    ("none", 1, (1, 1), (16, 80)),
]


@pytest.mark.interpreter
@pytest.mark.parametrize(("gate", "T", "heads", "dims"), SMALL)
def test_interpreted_fp32(
    gate: str, T: int, heads: tuple[int, int], dims: tuple[int, int], triton_agrees: Check, random_inputs: Inputs
) -> None:
    inputs = random_inputs(T, heads, dims, gate, torch.float32, "cpu", 1, 1)
    triton_agrees(linear_attention, inputs)


@pytest.mark.interpreter
@pytest.mark.parametrize("gate", ["none", "token", "key"])
def test_interpreted_fp16(gate: str, triton_agrees: Check, random_inputs: Inputs) -> None:
    inputs = random_inputs(70, (1, 1), (16, 16), gate, torch.float16, "cpu", 1, 1)
    triton_agrees(linear_attention, inputs)


@pytest.mark.interpreter
@pytest.mark.parametrize("gate", ["token", "key"])
def test_interpreted_strong_decay(gate: str, triton_agrees: Check, random_inputs: Inputs) -> None:
    inputs = random_inputs(100, (1, 1), (16, 16), gate, torch.float32, "cpu", 1, 1, strong=True)
    triton_agrees(linear_attention, inputs)


@pytest.mark.interpreter
@pytest.mark.parametrize("gate", ["none", "token", "key"])
def test_interpreted_packed(gate: str, triton_agrees: Check, random_inputs: Inputs) -> None:
    inputs = random_inputs(150, (1, 1), (16, 16), gate, torch.float32, "cpu", 3, 1)
    triton_agrees(linear_attention, inputs, (0, 70, 75, 150))


@pytest.mark.interpreter
@pytest.mark.parametrize("gate", ["none", "head", "token", "key"])
def test_interpreted_step(gate: str, random_inputs: Inputs) -> None:
    check_step(random_inputs, gate, "cpu", torch.float32, FP32_TOLERANCE)


def check_step(random_inputs: Inputs, gate: str, device: str, dtype: torch.dtype, tolerance: float) -> None:
    inputs = random_inputs(3, (2, 4), (20, 24), gate, dtype, device, 2, 2)
    wanted, last = linear_attention(
        **{name: x.double() for name, x in inputs.items()}, output_final_state=True, backend="reference"
    )
    state = inputs.pop("initial_state")
    outputs = []
    for at in (slice(0, 1), slice(1, 3)):
        part = {name: x[:, at] if x.ndim > 1 else x for name, x in inputs.items()}
        o, new = linear_attention_step(**part, state=state, inplace=True, backend="triton")
        assert new is state
        outputs.append(o)
    assert last is not None
    assert rms_ratio(torch.cat(outputs, 1), wanted) < tolerance
    assert rms_ratio(state, last) < tolerance


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
        triton_agrees(linear_attention, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["none", "head", "token", "key"])
def test_on_the_card_grouped_and_packed(gate: str, triton_agrees: Check, random_inputs: Inputs) -> None:
    inputs = random_inputs(3000, (2, 4), (128, 128), gate, torch.bfloat16, "cuda", 3, 1)
    triton_agrees(linear_attention, inputs, (0, 1, 1250, 3000))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["token", "key"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_the_card_strong_decay(gate: str, dtype: torch.dtype, triton_agrees: Check, random_inputs: Inputs) -> None:
    inputs = random_inputs(2000, (2, 2), (128, 128), gate, dtype, "cuda", 2, 2, strong=True)
    triton_agrees(linear_attention, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["none", "token", "key"])
def test_on_the_card_a_million_tokens(gate: str, random_inputs: Inputs) -> None:
    """Offsets past 2^31 elements: the last tokens are what a run over them alone finds from the state before them."""
    T, tail = 1_048_576, 1024
    inputs = random_inputs(T, (2, 18), (32, 128), gate, torch.bfloat16, "cuda", 1, 1)
    assert inputs["v"].numel() > 2**31
    start = inputs.pop("initial_state")
    with torch.no_grad():
        o, last = linear_attention(**inputs, initial_state=start, output_final_state=True)
        head = {name: x[:, :-tail] for name, x in inputs.items()}
        _, state = linear_attention(**head, initial_state=start, output_final_state=True)
        del head
        end = {name: x[:, -tail:].double() for name, x in inputs.items()}
        assert state is not None
        assert last is not None
        wanted, wanted_last = linear_attention(
            **end, initial_state=state.double(), output_final_state=True, backend="chunked"
        )
    assert wanted_last is not None
    assert rms_ratio(o[:, -tail:], wanted) < OUTPUT_TOLERANCE
    assert rms_ratio(last, wanted_last) < OUTPUT_TOLERANCE
    assert bool(o.isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["none", "token", "key"])
def test_on_the_card_results_repeat(gate: str, random_inputs: Inputs) -> None:
    inputs = random_inputs(2000, (2, 4), (128, 128), gate, torch.bfloat16, "cuda", 2, 2)
    runs = []
    for _ in range(2):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        o, last = linear_attention(**leaves, output_final_state=True)
        assert last is not None
        runs.append([o, last, *torch.autograd.grad(o.float().square().sum() + last.sum(), list(leaves.values()))])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["none", "token", "key"])
def test_on_the_card_compiled_without_graph_breaks(gate: str, random_inputs: Inputs) -> None:
    inputs = random_inputs(300, (2, 2), (64, 64), gate, torch.bfloat16, "cuda", 2, 2)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    compiled = torch.compile(linear_attention, fullgraph=True)
    results = []
    for call in (compiled, linear_attention):
        o, last = call(**leaves, output_final_state=True)
        assert last is not None
        results.append([o, *torch.autograd.grad(o.float().square().sum() + last.sum(), list(leaves.values()))])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["none", "head", "token", "key"])
def test_on_the_card_step(gate: str, random_inputs: Inputs) -> None:
    check_step(random_inputs, gate, "cuda", torch.bfloat16, OUTPUT_TOLERANCE)


@pytest.mark.gpu
def test_on_the_card_step_in_a_graph(random_inputs: Inputs) -> None:
    inputs = random_inputs(1, (2, 4), (64, 64), "token", torch.bfloat16, "cuda", 2, 2)
    state = inputs.pop("initial_state")
    start = state.clone()
    linear_attention_step(**inputs, state=state.clone(), inplace=True)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = linear_attention_step(**inputs, state=state, inplace=True)
    state.copy_(start)
    graph.replay()
    wanted, last = linear_attention_step(**inputs, state=start, backend="chunked")
    assert rms_ratio(o, wanted.double()) < OUTPUT_TOLERANCE
    assert rms_ratio(state, last.double()) < OUTPUT_TOLERANCE
