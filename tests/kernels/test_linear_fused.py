"""linear_attention's Triton kernels against fp64: under the interpreter (fp32, fp16) and, marked gpu, on a card.

bf16 stays on the card: bf16 products are wrong under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from archspec import launches
from archspec.kernels import linear_attention, linear_attention_step

Inputs = Callable[..., dict[str, Tensor]]
Check = Callable[..., None]

# As in conftest.py: bf16's rounding of outputs, and fp32's under the interpreter.
OUTPUT_TOLERANCE, FP32_TOLERANCE = 0.005, 1e-4


def rms_ratio(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm().clamp(min=1e-30))


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


@pytest.mark.interpreter
@pytest.mark.parametrize("gate", ["none", "token", "key"])
@pytest.mark.parametrize("lengths", [(530,), (300, 1, 229)], ids=["one sequence", "packed"])
def test_interpreted_segments(
    gate: str, lengths: tuple[int, ...], random_inputs: Inputs, triton_agrees: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments that run side by side, as on a card with more multiprocessors than heads."""
    from archspec.kernels.linear import call

    def in_segments(*sizes: object) -> launches.Plan:
        return launches.Plan(64, 3, 3.0, "three segments")

    monkeypatch.setattr(call, "plan", in_segments)
    inputs = random_inputs(sum(lengths), (1, 1), (16, 16), gate, torch.float32, "cpu", len(lengths), 1)
    bounds = None if len(lengths) == 1 else [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    triton_agrees(linear_attention, inputs, bounds)


def test_segments_fill_the_multiprocessors() -> None:
    """One program each without gates, two with, and no segment shorter than it pays for."""
    few, gated, short = (
        launches.plan(1, length, 16, 128, 128, 2, gated, 132).num_segments
        for length, gated in ((32_768, False), (32_768, True), (1500, True))
    )
    assert (few, gated, short) == (4, 8, 1)


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
