"""windowed_delta_rule: a loss over the last tokens; chunks against the token loop, and against plain equations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from archspec.errors import ShapeError, UnsupportedError
from archspec.kernels import delta_rule, windowed_delta_rule
from archspec.kernels.delta.inputs import Order

Agree = Callable[..., None]

B, H, K, V = 2, 2, 6, 5
ORDERS = ("decay_first", "together", "step_first")


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def make(T: int, window: int, *, decay: bool = True, read_key: bool = False) -> dict[str, Any]:
    """Random fp64 inputs: unit keys, strengths that add up to 2 at most, mild and very strong decays."""
    torch.manual_seed(0)
    reached = T + window - 1
    inputs: dict[str, Any] = {
        "q": real(B, T, H, K),
        "k": torch.nn.functional.normalize(real(B, reached, H, K), dim=-1),
        "v": real(B, reached, H, V),
        "weights": torch.rand(B, reached, H, dtype=torch.float64),
        "step": 2 / window * torch.rand(B, T, H, dtype=torch.float64),
        "initial_state": real(B, H, K, V),
    }
    if decay:
        mild_or_strong = torch.tensor([0.05, 20.0])[torch.randint(0, 2, (B, T, 1))]
        inputs["g"] = -torch.rand(B, T, H, dtype=torch.float64) * mild_or_strong
        inputs["g"][:, T // 2, 0] = -torch.inf
    if read_key:
        inputs["read_key"] = 0.5 * inputs["k"] + 0.05 * real(B, reached, H, K)
    return inputs


chunked = functools.partial(windowed_delta_rule, output_final_state=True, backend="chunked")
reference = functools.partial(windowed_delta_rule, output_final_state=True, backend="reference")


def written_out(inputs: dict[str, Any], order: Order) -> tuple[Tensor, Tensor]:
    """The equations for one token after another and one key of a window after another."""
    state, window = inputs["initial_state"], inputs["k"].shape[1] - inputs["q"].shape[1] + 1
    outputs = []
    for t in range(inputs["q"].shape[1]):
        alpha = inputs["g"][:, t, :, None, None].exp()
        seen = alpha * state if order == "decay_first" else state
        step = torch.zeros_like(state)
        for i in range(t, t + window):
            key, value, weight = (inputs[name][:, i] for name in ("k", "v", "weights"))
            error = torch.einsum("bhk,bhkv->bhv", inputs.get("read_key", inputs["k"])[:, i], seen) - value
            strength = (inputs["step"][:, t] * weight)[..., None, None]
            step = step - strength * torch.einsum("bhk,bhv->bhkv", key, error)
        state = alpha * (state + step) if order == "step_first" else alpha * state + step
        outputs.append(K**-0.5 * torch.einsum("bhk,bhkv->bhv", inputs["q"][:, t], state))
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", [chunked, reference], ids=["chunked", "reference"])
def test_it_is_its_equations(agree: Agree, form: Any, order: Order) -> None:
    names = list(make(21, 4, read_key=True))

    def plain(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        assert list(inputs) == names
        return written_out(inputs, order)

    agree(functools.partial(form, order=order), plain, make(21, 4, read_key=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("decay", [False, True], ids=["no decay", "decay"])
@pytest.mark.parametrize(("T", "window"), [(1, 3), (7, 9), (50, 1), (67, 2), (67, 5), (5, 40)])
def test_chunked_agrees_with_the_token_loop(agree: Agree, T: int, window: int, decay: bool, order: Order) -> None:
    inputs = make(T, window, decay=decay)
    agree(functools.partial(chunked, order=order), functools.partial(reference, order=order), inputs)


def test_a_window_of_one_is_the_delta_rule() -> None:
    inputs = make(40, 1)
    one = {**inputs, "beta": inputs["step"] * inputs["weights"]}
    del one["step"], one["weights"]
    found, last = chunked(**inputs)
    wanted, end = delta_rule(**one, output_final_state=True, backend="reference")
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(last, end)


def test_split_sequence_and_steps_equal_the_whole() -> None:
    inputs, window = make(30, 4, read_key=True), 4
    state = inputs.pop("initial_state")
    reaching = ("k", "v", "weights", "read_key")
    run = functools.partial(windowed_delta_rule, output_final_state=True, order="together")

    def part(first: int, end: int) -> dict[str, Any]:
        return {name: x[:, first : end + (window - 1 if name in reaching else 0)] for name, x in inputs.items()}

    whole, last = run(**inputs, initial_state=state)
    head, middle = run(**part(0, 13), initial_state=state)
    tail, end = run(**part(13, 30), initial_state=middle)
    # fp64, 30 tokens: rounding differs with where the sequence is cut
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(end, last, rtol=1e-10, atol=1e-11)
    for t in range(30):
        o, state = run(**part(t, t + 1), initial_state=state)
        torch.testing.assert_close(o[:, 0], whole[:, t], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-11)


def test_fp32_is_close_to_fp64(fp32_is_close: Callable[..., None]) -> None:
    fp32_is_close(chunked, reference, make(130, 4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": torch.rand(B, 4, H)}, ShapeError, r"weights has shape \[2, 4, 2\]; required is"),
        (
            {"q": torch.rand(B, 9, H, K), "step": torch.rand(B, 9, H), "g": None},
            ShapeError,
            "6 keys for 9 queries",
        ),
        ({"read_key": torch.rand(B, 6, 3, K)}, ShapeError, "read_key has shape"),
        ({"q": torch.rand(B, 4, H, K).half()}, ShapeError, "one dtype is required, found q torch.float16"),
        ({"order": "decayfirst"}, UnsupportedError, "unknown order 'decayfirst'.*Did you mean 'decay_first'"),
        ({"backend": "triton"}, UnsupportedError, "windowed_delta_rule: .*use backend='chunked'"),
    ],
)
def test_errors_say_what_is_wrong(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = {name: x.float() for name, x in make(4, 3).items()}
    with pytest.raises(error, match=message):
        windowed_delta_rule(**(inputs | change))
