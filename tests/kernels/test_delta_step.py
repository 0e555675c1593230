"""Decoding with the delta rule: blocks and single tokens, in place, and the Triton step against the recurrence."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from archspec.errors import ShapeError, UnsupportedError
from archspec.kernels import delta_rule, delta_rule_step

# RMS of the error over RMS of the exact result from the same rounded inputs: fp32 sums over at most 20 channels;
# the state is fp32 whatever the inputs, so that only the outputs are rounded to bf16.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 3e-3}

CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "token": {"gate": "token"},
    "key": {"gate": "key"},
    "key together": {"gate": "key", "order": "together"},
    "token step first": {"gate": "token", "order": "step_first"},
    "strengths per key": {"gate": "key", "beta": "key", "write": "key"},
    "own keys": {"gate": "token", "write": "token", "read_key": 2, "erase_key": 4},
    "read key": {"gate": "token", "read_key": 4},
    "erase key": {"erase_key": 2, "order": "together", "gate": "key"},
}


def make(case: str, dtype: torch.dtype, device: str, T: int = 3) -> tuple[dict[str, Tensor], Tensor, str]:
    """Random inputs of T tokens, a start state, and the order."""
    choice = CASES[case]
    B, H, HV, K, V = 2, 2, 4, 20, 24
    real = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)

    def strength(kind: str) -> Tensor:
        return real(B, T, HV, *((K,) if kind == "key" else ())).sigmoid()

    def unit(heads: int) -> Tensor:
        return torch.nn.functional.normalize(real(B, T, heads, K), dim=-1).to(dtype)

    inputs = {"q": unit(H), "k": unit(H), "v": real(B, T, HV, V).to(dtype), "beta": strength(choice.get("beta", ""))}
    if "gate" in choice:
        inputs["g"] = strength(choice["gate"]).log()
    if "write" in choice:
        inputs["write_beta"] = strength(choice["write"])
    for name in ("read_key", "erase_key"):
        if name in choice:
            inputs[name] = unit(choice[name])
    return inputs, real(B, HV, K, V), choice.get("order", "decay_first")


def rms_ratio(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def check(case: str, dtype: torch.dtype, device: str, backend: str) -> None:
    """One token without a time axis, then a block of two, in place, against the recurrence in fp64."""
    inputs, state, order = make(case, dtype, device)
    exact = {name: x.double() for name, x in inputs.items()}
    wanted, last = delta_rule(
        **exact, initial_state=state.double(), output_final_state=True, backend="reference", order=order
    )
    call = functools.partial(delta_rule_step, state=state, order=order, inplace=True, backend=backend)
    first, new = call(**{name: x[:, 0] for name, x in inputs.items()})
    assert new is state
    others, new = call(**{name: x[:, 1:] for name, x in inputs.items()})
    assert new is state
    assert last is not None
    assert first.dtype == dtype
    assert rms_ratio(torch.cat([first[:, None], others], 1), wanted) < TOLERANCE[dtype]
    assert rms_ratio(state, last) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("case", CASES)
def test_the_torch_step(case: str) -> None:
    check(case, torch.float32, "cpu", "auto")


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_interpreted(case: str, dtype: torch.dtype) -> None:
    check(case, dtype, "cpu", "triton")


@pytest.mark.interpreter
def test_interpreted_without_touching_the_state_given() -> None:
    inputs, state, _ = make("token", torch.float32, "cpu")
    before = state.clone()
    transposed = state.transpose(-1, -2).contiguous().transpose(-1, -2)
    with torch.no_grad():
        o, new = delta_rule_step(**inputs, state=transposed)
    wanted, last = delta_rule_step(**inputs, state=state, backend="chunked")
    assert torch.equal(transposed, before)
    torch.testing.assert_close(o, wanted)
    torch.testing.assert_close(new, last)


@pytest.mark.interpreter
def test_interpreted_in_place_where_the_state_is_not_contiguous() -> None:
    inputs, state, _ = make("token", torch.float32, "cpu")
    wanted, last = delta_rule_step(**inputs, state=state.clone(), backend="chunked")
    transposed = state.transpose(-1, -2).contiguous().transpose(-1, -2)
    o, new = delta_rule_step(**inputs, state=transposed, inplace=True, backend="triton")
    assert new is transposed
    torch.testing.assert_close(o, wanted)
    torch.testing.assert_close(new, last)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_on_the_card(case: str, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda", "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["none", "token", "key"])
def test_on_the_card_in_a_graph(case: str) -> None:
    inputs, state, order = make(case, torch.bfloat16, "cuda", T=1)
    start = state.clone()
    delta_rule_step(**inputs, state=state.clone(), inplace=True, order=order)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = delta_rule_step(**inputs, state=state, inplace=True, order=order)
    state.copy_(start)
    graph.replay()
    wanted, last = delta_rule_step(**inputs, state=start, backend="chunked", order=order)
    assert rms_ratio(o, wanted.double()) < 2 * TOLERANCE[torch.bfloat16]  # both are rounded
    assert rms_ratio(state, last.double()) < TOLERANCE[torch.float32]


def test_errors_say_what_is_required() -> None:
    inputs, state, _ = make("token", torch.float32, "cpu")
    with pytest.raises(ShapeError) as raised:
        delta_rule_step(**inputs | {"g": inputs["g"][:, 0]}, state=state)
    assert str(raised.value) == (
        "delta_rule_step: g has shape [2, 4]; required is [B=2, T=3, HV=4]. Layout is time before heads."
    )
    with pytest.raises(ShapeError, match=r"delta_rule_step: state has shape \[1, 4, 20, 24\]; required is \[B=2, "):
        delta_rule_step(**inputs, state=state[:1])
    with pytest.raises(UnsupportedError, match="delta_rule_step: unknown order 'later'"):
        delta_rule_step(**inputs, state=state, order="later")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="delta_rule_step: the Triton kernel needs CUDA tensors, found cpu"):
        delta_rule_step(**inputs, state=state, backend="triton")
