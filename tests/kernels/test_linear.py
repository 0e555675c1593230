"""linear_attention: the chunkwise form and the step against the token loop, and what both must refuse."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from archspec.errors import ShapeError, UnsupportedError
from archspec.kernels import linear_attention, linear_attention_step

Agree = Callable[..., None]

B, H, HV, K, V = 2, 2, 4, 6, 5
GATES = ("none", "head", "token", "key")


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def make(T: int, gate: str, seed: int = 0) -> dict[str, Tensor]:
    """Random fp64 inputs; decays from mild to exp(-20) a token, and one alpha = 0."""
    torch.manual_seed(seed)
    inputs = {"q": real(B, T, H, K), "k": real(B, T, H, K), "v": real(B, T, HV, V), "initial_state": real(B, HV, K, V)}
    shape = {"head": (HV,), "token": (B, T, HV), "key": (B, T, HV, K)}.get(gate)
    if shape is not None:
        g = -torch.rand(shape, dtype=torch.float64)
        if gate != "head":
            g = g * torch.tensor([0.05, 20.0])[torch.randint(0, 2, (B, T, *(1,) * (g.ndim - 2)))]
            g[:, T // 2, 0] = -torch.inf
        inputs["g"] = g
    return inputs


def run(backend: str, **fixed: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    return functools.partial(linear_attention, output_final_state=True, backend=backend, **fixed)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", [1, 63, 100, 257])
def test_chunked_is_the_recurrence(agree: Agree, gate: str, T: int) -> None:
    agree(run("chunked"), run("reference"), make(T, gate))


def test_chunked_is_the_recurrence_over_many_chunks(agree: Agree) -> None:
    inputs = make(2000, "key")
    agree(run("chunked"), run("reference"), {name: x[:1] for name, x in inputs.items()})


@pytest.mark.parametrize("gate", ["none", "token", "key"])
def test_gradients_are_the_derivatives(gate: str) -> None:
    inputs = {name: x[:1] for name, x in make(5, gate).items()}
    if gate != "none":
        # A finite difference of alpha = 0 is no derivative; elsewhere e^-20 is below the difference's noise.
        inputs["g"] = inputs["g"].clamp(min=-3.0)
    names = list(inputs)

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        o, last = run("chunked")(**dict(zip(names, values, strict=True)))
        assert last is not None
        return o, last

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs.values()])


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("gate", GATES)
def test_a_sequence_may_be_split(backend: str, gate: str) -> None:
    inputs = make(90, gate)
    whole, last = run(backend)(**inputs)
    timed = [name for name, x in inputs.items() if name != "initial_state" and x.ndim > 1]
    parts = []
    state: Tensor | None = inputs["initial_state"]
    for at in (slice(0, 37), slice(37, 90)):
        assert state is not None
        part = inputs | {name: inputs[name][:, at] for name in timed} | {"initial_state": state}
        o, state = run(backend)(**part)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("inplace", [False, True])
def test_steps_are_the_sequence(gate: str, inplace: bool) -> None:
    inputs = make(7, gate)
    whole, last = run("reference")(**inputs)
    state = inputs.pop("initial_state").clone()
    first = state
    outputs = []
    for at in (slice(0, 1), slice(1, 4), slice(4, 7)):
        part = {name: x[:, at] if x.ndim > 1 else x for name, x in inputs.items()}
        o, state = linear_attention_step(**part, state=state, inplace=inplace)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state, last)
    assert (state is first) == inplace


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("gate", GATES)
def test_packed_sequences_are_separate_calls(backend: str, gate: str) -> None:
    inputs = {name: x[:1] if x.ndim > 1 else x for name, x in make(130, gate).items()}
    inputs["initial_state"] = real(3, HV, K, V)
    offsets = [0, 1, 70, 130]
    o, last = run(backend, cu_seqlens=torch.tensor(offsets))(**inputs)
    assert last is not None
    for n in range(3):
        at = slice(offsets[n], offsets[n + 1])
        part = {name: x[:, at] if x.ndim > 1 else x for name, x in inputs.items()}
        own, own_last = run(backend)(**part | {"initial_state": inputs["initial_state"][n : n + 1]})
        torch.testing.assert_close(o[:, at], own)
        torch.testing.assert_close(last[n : n + 1], own_last)


def test_without_decay_it_is_causal_attention_without_softmax() -> None:
    inputs = make(50, "none")
    del inputs["initial_state"]
    q, k = (inputs[name].repeat_interleave(HV // H, 2).transpose(1, 2) for name in "qk")
    wanted = (q @ k.mT).tril() @ inputs["v"].transpose(1, 2) * K**-0.5
    found, last = linear_attention(**inputs)
    torch.testing.assert_close(found, wanted.transpose(1, 2))
    assert last is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_outputs_keep_the_inputs_dtype_and_states_are_fp32(dtype: torch.dtype) -> None:
    inputs = {name: x if name == "g" else x.to(dtype) for name, x in make(70, "token").items()}
    for backend in ("chunked", "reference"):
        o, last = run(backend)(**inputs)
        assert last is not None
        assert (o.dtype, last.dtype) == (dtype, torch.float32)


def test_results_repeat_bit_for_bit() -> None:
    inputs = {name: x.float() for name, x in make(200, "key").items()}
    first, second = (run("chunked")(**inputs) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True) if x is not None and y is not None)


def test_errors_say_what_to_do() -> None:
    inputs = make(4, "token")
    q, k, v, g = (inputs[name] for name in "qkvg")
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ShapeError, r"linear_attention: k has shape \[2, 3, 2, 6\]; required is \[B=2, T=4, H=2, K=6\]",
         lambda: linear_attention(q, k[:, :3], v)),
        (ShapeError, r"v has 3 heads and k 2; v's must be a positive multiple of k's",
         lambda: linear_attention(q, k, v[:, :, :3])),
        (ShapeError, r"g has shape \[2, 4\]; required is \[HV\], \[B, T, HV\] or \[B, T, HV, K\]",
         lambda: linear_attention(q, k, v, g[:, :, 0])),
        (ShapeError, r"initial_state has shape \[1, 4, 6, 5\]; required is \[N=2, HV=4, K=6, V=5\]",
         lambda: linear_attention(q, k, v, g, initial_state=inputs["initial_state"][:1])),
        (ShapeError, r"cu_seqlens packs sequences into one row, found batch 2",
         lambda: linear_attention(q, k, v, cu_seqlens=torch.tensor([0, 4]))),
        (ShapeError, r"cu_seqlens is \[0, 2, 5\]; required are offsets rising from 0 to T=4",
         lambda: linear_attention(q[:1], k[:1], v[:1], cu_seqlens=torch.tensor([0, 2, 5]))),
        (ShapeError, r"q, k and v are torch.float32, torch.float64 and torch.float64; one dtype",
         lambda: linear_attention(q.float(), k, v)),
        (ShapeError, r"scale=0.0 makes every output zero",
         lambda: linear_attention(q, k, v, scale=0)),
        (UnsupportedError, r"unknown backend 'tritom'.*Did you mean 'triton'",
         lambda: linear_attention(q, k, v, backend="tritom")),
        (UnsupportedError, r"the Triton kernel needs CUDA tensors, found cpu; use backend='chunked'",
         lambda: linear_attention(q, k, v, backend="triton")),
        (ShapeError, r"linear_attention_step: state is torch.float32; torch.float64 is required",
         lambda: linear_attention_step(q, k, v, inputs["initial_state"].float())),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
