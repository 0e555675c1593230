"""Triton kernels of linear attention and the delta rule against fp64, where both are held to the same.

Under the interpreter (fp32, fp16) and, marked gpu, on a card. bf16 stays on the card: bf16 products are wrong under
Triton's interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from archspec.kernels import delta_rule, linear_attention

Inputs = Callable[..., dict[str, Tensor]]
Check = Callable[..., None]
Op = Callable[..., tuple[Tensor, Tensor | None]]

OPS: dict[str, Op] = {"linear": linear_attention, "delta": delta_rule}
SMALL = [
    ("linear", "none", 70, (1, 2), (20, 24)),
    ("linear", "head", 70, (1, 1), (16, 16)),
    ("linear", "token", 100, (1, 2), (20, 24)),
    ("linear", "token", 530, (1, 1), (16, 16)),
    ("linear", "key", 100, (1, 2), (20, 24)),
    ("linear", "key", 530, (1, 1), (16, 16)),
    ("linear", "key", 1, (1, 1), (16, 16)),
    ("linear", "token", 70, (1, 1), (16, 160)),
    ("linear", "none", 1, (1, 1), (16, 80)),
    ("delta", "none", 63, (1, 2), (20, 24)),
    ("delta", "none", 1, (1, 1), (16, 80)),
    ("delta", "head", 70, (1, 1), (16, 16)),
    ("delta", "token", 1, (1, 1), (16, 16)),
    ("delta", "token", 100, (1, 2), (60, 96)),
    ("delta", "token", 200, (1, 1), (16, 16)),
    ("delta", "key", 1, (1, 1), (16, 16)),
    ("delta", "key", 63, (1, 1), (16, 16)),
    ("delta", "key", 100, (1, 2), (20, 24)),
    ("delta", "key", 200, (1, 1), (16, 16)),
]
DIMS = [(16, 16), (32, 64), (60, 96), (64, 64), (100, 100), (128, 128), (128, 64), (64, 256), (256, 256)]
RATES = [3.2, 6.0, 12.0, 50.0]
"""Up to so much a token, log decays reach half of what one anchor serves in all channels, or in halves of a chunk, in
quarters, in single tokens."""

both = pytest.mark.parametrize("name", OPS)
# NumPy warns where pairs overflow that no one reads: an early reader's with a late writer.
may_overflow = pytest.mark.filterwarnings("ignore:overflow encountered in matmul:RuntimeWarning")


@pytest.fixture
def op(name: str) -> Op:
    """The recurrence of that name."""
    return OPS[name]


@pytest.fixture
def draw(name: str, random_inputs: Inputs) -> Inputs:
    """What draws its inputs: for the delta rule, unit keys and strengths up to 2."""
    return functools.partial(random_inputs, delta=name == "delta")


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "gate", "T", "heads", "dims"), SMALL)
def test_interpreted_fp32(
    gate: str, T: int, heads: tuple[int, int], dims: tuple[int, int], op: Op, draw: Inputs, triton_agrees: Check
) -> None:
    triton_agrees(op, draw(T, heads, dims, gate, torch.float32, "cpu", 1, 1))


@pytest.mark.interpreter
@both
@pytest.mark.parametrize("gate", ["none", "token", "key"])
def test_interpreted_fp16(gate: str, op: Op, draw: Inputs, triton_agrees: Check) -> None:
    triton_agrees(op, draw(70, (1, 1), (16, 16), gate, torch.float16, "cpu", 1, 1))


@pytest.mark.interpreter
@both
@may_overflow
@pytest.mark.parametrize("gate", ["token", "key"])
def test_interpreted_strong_decay(gate: str, op: Op, draw: Inputs, triton_agrees: Check) -> None:
    triton_agrees(op, draw(100, (1, 1), (16, 16), gate, torch.float32, "cpu", 1, 1, strong=True))


@pytest.mark.interpreter
@both
@may_overflow
@pytest.mark.parametrize("rate", RATES)
def test_interpreted_rates(rate: float, op: Op, draw: Inputs, triton_agrees: Check) -> None:
    triton_agrees(op, draw(100, (1, 1), (16, 16), "key", torch.float32, "cpu", 1, 1, rate=rate))


@pytest.mark.interpreter
@both
@pytest.mark.parametrize("gate", ["none", "token", "key"])
def test_interpreted_packed(gate: str, op: Op, draw: Inputs, triton_agrees: Check) -> None:
    triton_agrees(op, draw(150, (1, 1), (16, 16), gate, torch.float32, "cpu", 3, 1), (0, 70, 75, 150))


@pytest.mark.gpu
@both
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("gate", ["none", "token", "key"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_the_card(
    gate: str, dims: tuple[int, int], dtype: torch.dtype, op: Op, draw: Inputs, triton_agrees: Check
) -> None:
    for T in (1, 63, 100, 2000, 8192):
        triton_agrees(op, draw(T, (2, 2), dims, gate, dtype, "cuda", 2, 2))


@pytest.mark.gpu
@both
@pytest.mark.parametrize("gate", ["none", "head", "token", "key"])
def test_on_the_card_grouped_and_packed(gate: str, op: Op, draw: Inputs, triton_agrees: Check) -> None:
    triton_agrees(op, draw(3000, (2, 4), (128, 128), gate, torch.bfloat16, "cuda", 3, 1), (0, 1, 1250, 3000))


@pytest.mark.gpu
@both
@pytest.mark.parametrize("gate", ["token", "key"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_the_card_strong_decay(gate: str, dtype: torch.dtype, op: Op, draw: Inputs, triton_agrees: Check) -> None:
    triton_agrees(op, draw(2000, (2, 2), (128, 128), gate, dtype, "cuda", 2, 2, strong=True))


@pytest.mark.gpu
@both
@pytest.mark.parametrize("rate", RATES)
def test_on_the_card_rates(rate: float, op: Op, draw: Inputs, triton_agrees: Check) -> None:
    triton_agrees(op, draw(2000, (2, 2), (128, 128), "key", torch.bfloat16, "cuda", 2, 2, rate=rate))


def results(call: Op, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return the output, the last state and the gradient of every input."""
    o, last = call(**leaves, output_final_state=True)
    assert last is not None
    return o, last, torch.autograd.grad(o.float().square().sum() + last.sum(), list(leaves.values()))


@pytest.mark.gpu
@both
@pytest.mark.parametrize("gate", ["none", "token", "key"])
def test_on_the_card_results_repeat(gate: str, op: Op, draw: Inputs) -> None:
    inputs = draw(2000, (2, 4), (128, 128), gate, torch.bfloat16, "cuda", 2, 2)
    runs = []
    for _ in range(2):
        o, last, gradients = results(op, {name: x.clone().requires_grad_() for name, x in inputs.items()})
        runs.append([o, last, *gradients])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.gpu
@both
@pytest.mark.parametrize("gate", ["none", "token", "key"])
def test_on_the_card_compiled_without_graph_breaks(gate: str, op: Op, draw: Inputs) -> None:
    inputs = draw(300, (2, 2), (64, 64), gate, torch.bfloat16, "cuda", 2, 2)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    runs = []
    for call in (torch.compile(op, fullgraph=True), op):
        o, _, gradients = results(call, leaves)
        runs.append([o, *gradients])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
