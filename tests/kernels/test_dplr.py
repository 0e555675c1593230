"""dplr_rule: the chunkwise form and the step against the token loop; the delta rule as its special case."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from archspec.errors import ShapeError, UnsupportedError
from archspec.kernels import delta_rule, dplr_rule, dplr_rule_step

Agree = Callable[..., None]

B, H, HV, K, V = 2, 2, 4, 6, 5


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def make(T: int, decay: str = "key", seed: int = 0) -> dict[str, Any]:
    """Random fp64 inputs with a contracting transition, mild and very strong decays, and one alpha = 0."""
    torch.manual_seed(seed)
    eraser = torch.nn.functional.normalize(real(B, T, H, K), dim=-1)
    inputs: dict[str, Any] = {
        "q": real(B, T, H, K),
        "k": real(B, T, H, K),
        "v": real(B, T, HV, V),
        "a": -eraser,
        "b": (eraser * torch.rand(B, T, H, K, dtype=torch.float64)).repeat_interleave(HV // H, 2),
        "initial_state": real(B, HV, K, V),
    }
    if decay != "none":
        g = -torch.rand({"token": (B, T, HV), "head": (HV,)}.get(decay, (B, T, HV, K)), dtype=torch.float64)
        if decay not in ("head", "mild"):
            g = g * torch.tensor([0.05, 20.0])[torch.randint(0, 2, (B, T, *(1,) * (g.ndim - 2)))]
            g[:, T // 2, 0] = -torch.inf
        inputs["g"] = g
    return inputs


chunked = functools.partial(dplr_rule, output_final_state=True, backend="chunked")
reference = functools.partial(dplr_rule, output_final_state=True, backend="reference")


@pytest.mark.parametrize("decay", ["none", "head", "token", "key", "mild"])
@pytest.mark.parametrize("T", [1, 63, 100, 257])
def test_chunked_agrees_with_the_token_loop(agree: Agree, T: int, decay: str) -> None:
    agree(chunked, reference, make(T, decay))


def test_long_sequence(agree: Agree) -> None:
    agree(chunked, reference, make(2000, "key"))


@pytest.mark.parametrize("decay", ["none", "token", "key"])
def test_gradcheck(decay: str) -> None:
    inputs = {name: x[:1, :, :1].contiguous() for name, x in make(5, decay).items() if name != "initial_state"}
    if "g" in inputs:
        inputs["g"] = inputs["g"].clamp(min=-2)  # finite differences need a finite, smooth region
    names = list(inputs)

    def run(*tensors: Tensor) -> Any:
        return chunked(**dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(run, tuple(x.requires_grad_() for x in inputs.values()))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_split_sequence_and_steps_equal_the_whole(backend: str) -> None:
    inputs = make(50)
    state = inputs.pop("initial_state")
    run = functools.partial(dplr_rule, output_final_state=True, backend=backend)
    whole, last = run(**inputs, initial_state=state)
    first, middle = run(**{name: x[:, :19] for name, x in inputs.items()}, initial_state=state)
    second, end = run(**{name: x[:, 19:] for name, x in inputs.items()}, initial_state=middle)
    # fp64, 50 tokens: rounding differs with where the sequence is cut, by 1e-13 at most
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(end, last, rtol=1e-10, atol=1e-11)
    for t in range(50):
        o, state = dplr_rule_step(**{name: x[:, t] for name, x in inputs.items()}, state=state)
        torch.testing.assert_close(o, whole[:, t], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-11)


def test_packed_sequences_equal_separate_ones() -> None:
    inputs = {name: x[:1] for name, x in make(90).items()}
    states = torch.randn(2, HV, K, V, dtype=torch.float64)
    packed, last = chunked(**(inputs | {"initial_state": states}), cu_seqlens=torch.tensor([0, 40, 90]))
    for n, (start, end) in enumerate([(0, 40), (40, 90)]):
        part = {name: x[:, start:end] for name, x in inputs.items()} | {"initial_state": states[n : n + 1]}
        o, state = chunked(**part)
        assert torch.equal(packed[:, start:end], o)
        assert torch.equal(last[n : n + 1], state)


def test_delta_rule_is_the_case_a_minus_decayed_key(agree: Agree) -> None:
    """Gated delta rule = DPLR with a = -alpha k, b = beta k and value beta v (not a = -k)."""
    inputs = make(70, "token")
    inputs = {name: inputs[name] for name in ("q", "k", "v", "g", "initial_state")}
    inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
    inputs["beta"] = torch.rand(B, 70, HV, dtype=torch.float64)

    def as_dplr(q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, beta: Tensor) -> Any:
        keys = k.repeat_interleave(HV // H, 2)
        a, b = -g.exp()[..., None] * keys, beta[..., None] * keys
        return chunked(q=q, k=k, v=beta[..., None] * v, a=a, b=b, g=g, initial_state=initial_state)

    agree(as_dplr, functools.partial(delta_rule, output_final_state=True, backend="reference"), inputs)


def test_rwkv7_layout_in_delta_rule(agree: Agree) -> None:
    """RWKV-7: a = -kappa, b = kappa * strength per channel, decay and step together."""
    inputs = make(70)
    strength = torch.rand(B, 70, HV, K, dtype=torch.float64)
    names = ("q", "k", "v", "g", "initial_state")
    shared = {name: inputs[name] for name in names} | {"kappa": -inputs["a"], "beta": strength}

    def as_dplr(q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, kappa: Tensor, beta: Tensor) -> Any:
        eraser = kappa.repeat_interleave(HV // H, 2)
        return chunked(q=q, k=k, v=v, a=-eraser, b=eraser * beta, g=g, initial_state=initial_state)

    def as_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor, kappa: Tensor, beta: Tensor) -> Any:
        return delta_rule(
            q, k, v, beta, g, None, initial_state, True, backend="chunked",
            write_beta=torch.ones(B, 70, HV, dtype=torch.float64), read_key=kappa, erase_key=kappa, order="together",
        )  # fmt: skip

    agree(as_delta, as_dplr, shared)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.rand(B, 4, 3, K)}, ShapeError, r"a has shape \[2, 4, 3, 6\]; required is \[B=2, T=4, HV=4, K=6\]"),
        ({"b": torch.rand(B, 4, HV, K).int()}, ShapeError, "b has dtype torch.int32"),
        ({"backend": "triton"}, UnsupportedError, "dplr_rule: has no Triton kernel; use backend='chunked'"),
        ({"backend": "cuda"}, UnsupportedError, "unknown backend 'cuda'; known: auto, chunked, reference, triton"),
    ],
)
def test_errors_say_what_is_wrong(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = {name: x.float() for name, x in make(4).items()}
    with pytest.raises(error, match=message):
        dplr_rule(**(inputs | change))
