"""delta_rule: the chunkwise form and the step against the token loop, and both against what is known by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from archspec.errors import ShapeError, UnsupportedError
from archspec.kernels import delta_rule, delta_rule_step
from archspec.kernels.delta.inputs import Order

Agree = Callable[..., None]

B, H, HV, K, V = 2, 2, 4, 6, 5
ORDERS = ("decay_first", "together", "step_first")
DECAYS = ("none", "head", "token", "key", "mild")


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def unit(*shape: int) -> Tensor:
    return torch.nn.functional.normalize(real(*shape), dim=-1)


def make(T: int, decay: str = "token", *extra: str, seed: int = 0) -> dict[str, Any]:
    """Random fp64 inputs: unit keys, strengths up to 2, mild and very strong decays, one alpha = 0.

    Decay "mild" is per key channel without the very strong ones, which a form of its own serves on CPUs.
    """
    torch.manual_seed(seed)
    inputs: dict[str, Any] = {
        "q": real(B, T, H, K),
        "k": unit(B, T, H, K),
        "v": real(B, T, HV, V),
        "beta": 2 * torch.rand(B, T, HV, dtype=torch.float64),
        "initial_state": real(B, HV, K, V),
    }
    gates = {"head": (HV,), "token": (B, T, HV), "key": (B, T, HV, K), "mild": (B, T, HV, K)}
    if decay != "none":
        g = -torch.rand(gates[decay], dtype=torch.float64)
        if decay not in ("head", "mild"):
            g = g * torch.tensor([0.05, 20.0])[torch.randint(0, 2, (B, T, *(1,) * (g.ndim - 2)))]
            g[:, T // 2, 0] = -torch.inf
        inputs["g"] = g
    # A read key near k keeps the transition close to a contraction.
    makers: dict[str, Callable[[], Tensor]] = {
        "write_beta": lambda: 2 * torch.rand(B, T, HV, dtype=torch.float64),
        "write_beta_key": lambda: 2 * torch.rand(B, T, HV, K, dtype=torch.float64),
        "beta_key": lambda: torch.rand(B, T, HV, K, dtype=torch.float64),
        "read_key": lambda: 0.5 * inputs["k"] + 0.05 * real(B, T, H, K),
        "erase_key": lambda: unit(B, T, HV, K) * 0.3,
    }
    for name in extra:
        inputs[name.removesuffix("_key") if name.endswith("beta_key") else name] = makers[name]()
    return inputs


chunked = functools.partial(delta_rule, output_final_state=True, backend="chunked")
reference = functools.partial(delta_rule, output_final_state=True, backend="reference")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 63, 100, 257])
def test_chunked_agrees_with_the_token_loop(agree: Agree, T: int, decay: str, order: Order) -> None:
    agree(functools.partial(chunked, order=order), functools.partial(reference, order=order), make(T, decay))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "extra",
    [
        ("write_beta",),
        ("read_key",),
        ("beta_key",),
        ("read_key", "erase_key"),
        ("beta_key", "write_beta_key", "read_key", "erase_key"),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("decay", ["token", "key", "mild"])
def test_variants_agree_with_the_token_loop(agree: Agree, decay: str, extra: tuple[str, ...], order: Order) -> None:
    inputs = make(70, decay, *extra)
    agree(functools.partial(chunked, order=order), functools.partial(reference, order=order), inputs)


def test_long_sequence(agree: Agree) -> None:
    agree(chunked, reference, make(2000, "key"))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("decay", ["none", "token", "key"])
def test_gradcheck(decay: str, order: Order) -> None:
    inputs = {name: x[:1, :, :1].contiguous() for name, x in make(5, decay).items() if name != "initial_state"}
    if "g" in inputs:
        inputs["g"] = inputs["g"].clamp(min=-2)  # finite differences need a finite, smooth region
    names = list(inputs)

    def run(*tensors: Tensor) -> Any:
        return chunked(**dict(zip(names, tensors, strict=True)), order=order)

    leaves = tuple(x.requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("order", ORDERS)
def test_split_sequence_and_steps_equal_the_whole(order: Order, backend: str) -> None:
    inputs = make(50, "key", "write_beta", "read_key", "erase_key")
    state = inputs.pop("initial_state")
    run = functools.partial(delta_rule, output_final_state=True, backend=backend, order=order)
    whole, last = run(**inputs, initial_state=state)
    first, middle = run(**{name: x[:, :19] for name, x in inputs.items()}, initial_state=state)
    second, end = run(**{name: x[:, 19:] for name, x in inputs.items()}, initial_state=middle)
    # fp64, 50 tokens: rounding differs with where the sequence is cut, by 1e-13 at most
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(end, last, rtol=1e-10, atol=1e-11)
    for t in range(50):
        o, state = delta_rule_step(**{name: x[:, t] for name, x in inputs.items()}, state=state, order=order)
        torch.testing.assert_close(o, whole[:, t], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_packed_sequences_equal_separate_ones(backend: str) -> None:
    inputs = {name: x[:1] for name, x in make(90, "token").items()}
    states = torch.randn(3, HV, K, V, dtype=torch.float64)
    offsets = torch.tensor([0, 1, 40, 90])
    run = functools.partial(delta_rule, output_final_state=True, backend=backend)
    packed, last = run(**(inputs | {"initial_state": states}), cu_seqlens=offsets)
    for n, (start, end) in enumerate([(0, 1), (1, 40), (40, 90)]):
        part = {name: x[:, start:end] for name, x in inputs.items()} | {"initial_state": states[n : n + 1]}
        o, state = run(**part)
        assert torch.equal(packed[:, start:end], o)
        assert torch.equal(last[n : n + 1], state)


def test_full_strength_on_unit_keys_stores_exactly() -> None:
    """With beta = 1 the memory returns each value at its key until another token overwrites that direction."""
    keys = torch.eye(K, dtype=torch.float64)[None, :, None]
    values = torch.randn(1, K, 1, V, dtype=torch.float64)
    beta = torch.ones(1, K, 1, dtype=torch.float64)
    twice = {"k": keys.repeat(1, 2, 1, 1), "v": torch.cat([values.flip(1), values], 1), "beta": beta.repeat(1, 2, 1)}
    o, state = chunked(q=twice["k"], **twice, scale=1.0)
    torch.testing.assert_close(o, twice["v"])
    torch.testing.assert_close(state[0, 0], values[0, :, 0])


@pytest.mark.parametrize("decay", DECAYS)
def test_half_precision_keeps_an_fp32_state(decay: str) -> None:
    inputs = make(100, decay)
    state = inputs.pop("initial_state")
    exact, _ = reference(**inputs, initial_state=state)
    half = {name: x.bfloat16() if name in "qkv" else x.float() for name, x in inputs.items()}
    o, last = chunked(**half, initial_state=state.float())
    assert o.dtype == torch.bfloat16
    assert last is not None
    assert last.dtype == torch.float32
    # bf16 inputs carry 2^-9; the delta rule with strengths up to 2 passes errors on without damping
    assert float((o.double() - exact).norm() / exact.norm()) < 0.02


def test_strong_decays_in_fp32() -> None:
    inputs = {name: x.float() for name, x in make(257, "key").items()}
    exact, _ = reference(**{name: x.double() for name, x in inputs.items()})
    o, _ = chunked(**inputs)
    # fp32 carries 6e-8; a chain of 257 reflections of the state multiplies it by some tens
    assert float((o.double() - exact).norm() / exact.norm()) < 1e-5


def test_no_state_is_returned_unasked() -> None:
    inputs = make(3)
    assert delta_rule(**inputs)[1] is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": torch.rand(B, 9, HV)}, ShapeError, r"beta has shape \[2, 9, 4\]; required is \[B=2, T=4, HV=4\]"),
        ({"v": torch.rand(B, 4, 3, V)}, ShapeError, "v has 3 heads and k 2"),
        ({"g": torch.rand(B, 4)}, ShapeError, r"g has shape \[2, 4\]; required is \[HV\], \[B, T, HV\] or"),
        ({"read_key": torch.rand(B, 4, 3, K)}, ShapeError, "read_key has shape"),
        ({"q": torch.rand(B, 4, H, K).half()}, ShapeError, "one dtype is required, found q torch.float16"),
        ({"order": "decayfirst"}, UnsupportedError, "unknown order 'decayfirst'.*Did you mean 'decay_first'"),
        ({"backend": "triton"}, UnsupportedError, "delta_rule: .*use backend='chunked'"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ShapeError, "found batch 2; use batch 1"),
    ],
)
def test_errors_say_what_is_wrong(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = {name: x.float() for name, x in make(4).items()}
    with pytest.raises(error, match=message):
        delta_rule(**(inputs | change))


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(ShapeError, match="T=0"):
        delta_rule(**{name: x if name == "initial_state" else x[:, :0] for name, x in make(4).items()})
