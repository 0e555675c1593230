"""diagonal_scan: the scan, the convolution and the step against the token loop, real and complex."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from archspec.errors import ShapeError, UnsupportedError
from archspec.kernels import diagonal_scan, diagonal_scan_step

Agree = Callable[..., None]

B, D, N = 2, 3, 4


def make(T: int, *, turns: bool, constant: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Random fp64 inputs, mild and very strong decays, and where they vary one alpha = 0."""
    torch.manual_seed(seed)
    dtype = torch.complex128 if turns else torch.float64
    tokens = 1 if constant else T
    inputs = {"x": torch.randn(B, T, D, N, dtype=dtype), "initial_state": torch.randn(B, D, N, dtype=dtype)}
    inputs["g"] = -torch.rand(1 if constant else B, tokens, D, N, dtype=torch.float64)
    inputs["g"] = inputs["g"] * torch.tensor([0.05, 20.0])[torch.randint(0, 2, (D, N))]
    if not constant:
        inputs["g"][:, T // 2, 0] = -torch.inf
    if turns:
        inputs["phase"] = torch.randn(1, tokens, 1, N, dtype=torch.float64)
    return inputs


run = {name: functools.partial(diagonal_scan, backend=name) for name in ("auto", "chunked", "fft", "reference")}


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("T", [1, 2, 63, 100])
def test_scan_agrees_with_the_token_loop(agree: Agree, T: int, turns: bool) -> None:
    agree(run["chunked"], run["reference"], make(T, turns=turns))


@pytest.mark.parametrize("form", ["chunked", "fft"])
@pytest.mark.parametrize("turns", [False, True])
def test_constant_factors(agree: Agree, form: str, turns: bool) -> None:
    agree(run[form], run["reference"], make(70, turns=turns, constant=True))


@pytest.mark.parametrize("turns", [False, True])
def test_gradients_of_first_and_second_order(turns: bool) -> None:
    inputs = make(5, turns=turns)
    inputs["g"] = inputs["g"].clamp(min=-2)  # finite differences need a finite, smooth region
    names = list(inputs)

    def op(*tensors: Tensor) -> Any:
        return run["chunked"](**dict(zip(names, tensors, strict=True)))

    leaves = tuple(x.requires_grad_() for x in inputs.values())
    assert torch.autograd.gradcheck(op, leaves)
    assert torch.autograd.gradgradcheck(op, leaves)


@pytest.mark.parametrize("form", ["chunked", "reference"])
@pytest.mark.parametrize("turns", [False, True])
def test_split_sequence_and_steps_equal_the_whole(form: str, turns: bool) -> None:
    inputs = make(50, turns=turns)
    state = inputs.pop("initial_state")
    whole, last = run[form](**inputs, initial_state=state)
    parts = [{name: y[:, tokens] for name, y in inputs.items()} for tokens in (slice(19), slice(19, None))]
    first, middle = run[form](**parts[0], initial_state=state)
    second, end = run[form](**parts[1], initial_state=middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-13)
    for t in range(50):
        state = diagonal_scan_step(**{name: y[:, t] for name, y in inputs.items()}, state=state)
        torch.testing.assert_close(state, whole[:, t], rtol=1e-12, atol=1e-13)


def test_fp32_loses_nothing_over_long_strong_decays() -> None:
    inputs = make(1000, turns=False)
    wanted, _ = run["reference"](**inputs)
    found, _ = run["auto"](**{name: y.float() for name, y in inputs.items()})
    # fp32 rounds at 6e-8, and states are sums of at most some twenty terms of one size
    assert float((found.double() - wanted).norm() / wanted.norm()) < 1e-6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"g": torch.rand(B, 3, D, N)}, ShapeError, r"g has shape \[2, 3, 3, 4\]; required are the axes of x"),
        ({"g": torch.rand(B, 4, D, N).double()}, ShapeError, "g has dtype torch.float64 .*required is torch.float32"),
        ({"phase": torch.rand(B, 4, D, N)}, ShapeError, "a phase needs a complex x, and a complex x a phase"),
        ({"initial_state": torch.rand(B, N)}, ShapeError, r"required is torch.float32 \[2, 3, 4\]"),
        ({"x": torch.rand(B, 0, D, N)}, ShapeError, "at least one token"),
        ({"backend": "fft"}, UnsupportedError, "needs factors that are the same for all tokens"),
        ({"backend": "triton"}, UnsupportedError, "diagonal_scan: has no Triton kernel; use backend='chunked'"),
    ],
)
def test_errors_say_what_is_wrong(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = {name: y.float() for name, y in make(4, turns=False).items()}
    with pytest.raises(error, match=message):
        diagonal_scan(**(inputs | change))
