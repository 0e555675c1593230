"""column_delta_rule: gates of value channels; chunks against the token loop, and against delta_rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from archspec.errors import ShapeError, UnsupportedError
from archspec.kernels import column_delta_rule, delta_rule
from archspec.kernels.delta.inputs import Order

Agree = Callable[..., None]

B, H, K, V = 2, 2, 6, 5
ORDERS = ("decay_first", "together", "step_first")


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def make(T: int, decay: int, strength: int, *extra: str) -> dict[str, Any]:
    """Random fp64 inputs with gates of 1 or V channels (0: none): unit keys, mild and very strong decays."""
    torch.manual_seed(0)
    inputs: dict[str, Any] = {
        "q": real(B, T, H, K),
        "k": torch.nn.functional.normalize(real(B, T, H, K), dim=-1),
        "v": real(B, T, H, V),
        "beta": 2 * torch.rand(B, T, H, strength, dtype=torch.float64),
        "initial_state": real(B, H, K, V),
    }
    if decay:
        mild_or_strong = torch.tensor([0.05, 20.0])[torch.randint(0, 2, (B, T, 1, 1))]
        inputs["g"] = -torch.rand(B, T, H, decay, dtype=torch.float64) * mild_or_strong
        inputs["g"][:, T // 2, 0] = -torch.inf
    if "read_key" in extra:
        inputs["read_key"] = 0.5 * inputs["k"] + 0.05 * real(B, T, H, K)
    if "write_beta" in extra:
        inputs["write_beta"] = torch.rand(B, T, H, V, dtype=torch.float64)
    return inputs


chunked = functools.partial(column_delta_rule, output_final_state=True, backend="chunked")
reference = functools.partial(column_delta_rule, output_final_state=True, backend="reference")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("decay", "strength"), [(0, V), (1, V), (V, 1), (V, V)])
@pytest.mark.parametrize("T", [1, 5, 67])
def test_chunked_agrees_with_the_token_loop(agree: Agree, T: int, decay: int, strength: int, order: Order) -> None:
    inputs = make(T, decay, strength)
    agree(functools.partial(chunked, order=order), functools.partial(reference, order=order), inputs)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("extra", [("read_key",), ("write_beta",), ("read_key", "write_beta")], ids="+".join)
def test_variants_agree_with_the_token_loop(agree: Agree, extra: tuple[str, ...], order: Order) -> None:
    inputs = make(33, V, V, *extra)
    agree(functools.partial(chunked, order=order), functools.partial(reference, order=order), inputs)


@pytest.mark.parametrize("order", ORDERS)
def test_every_column_is_a_delta_rule(order: Order) -> None:
    inputs = make(40, V, V, "read_key", "write_beta")
    found, last = chunked(**inputs, order=order)
    assert last is not None
    for j in range(V):
        gates = {name: inputs[name][..., j] for name in ("beta", "g", "write_beta")}
        column = {**inputs, **gates, "v": inputs["v"][..., j : j + 1]}
        column["initial_state"] = inputs["initial_state"][..., j : j + 1]
        wanted, end = delta_rule(**column, output_final_state=True, backend="reference", order=order)
        assert end is not None
        torch.testing.assert_close(found[..., j : j + 1], wanted)
        torch.testing.assert_close(last[..., j : j + 1], end)


def test_split_sequence_and_steps_equal_the_whole(split_and_stepped: Callable[..., None]) -> None:
    split_and_stepped(
        functools.partial(column_delta_rule, output_final_state=True, order="together"), make(30, V, V, "read_key")
    )


def test_fp32_is_close_to_fp64(fp32_is_close: Callable[..., None]) -> None:
    fp32_is_close(chunked, reference, make(130, V, V))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": torch.rand(B, 4, H, 2)}, ShapeError, r"beta has shape \[2, 4, 2, 2\]; required is"),
        ({"g": torch.rand(B, 4, H)}, ShapeError, r"g has shape \[2, 4, 2\]; required is"),
        ({"read_key": torch.rand(B, 4, 3, K)}, ShapeError, "read_key has shape"),
        ({"q": torch.rand(B, 4, H, K).half()}, ShapeError, "one dtype is required, found q torch.float16"),
        ({"order": "decayfirst"}, UnsupportedError, "unknown order 'decayfirst'.*Did you mean 'decay_first'"),
        ({"backend": "triton"}, UnsupportedError, "column_delta_rule: .*use backend='chunked'"),
    ],
)
def test_errors_say_what_is_wrong(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = {name: x.float() for name, x in make(4, V, V).items()}
    with pytest.raises(error, match=message):
        column_delta_rule(**(inputs | change))
