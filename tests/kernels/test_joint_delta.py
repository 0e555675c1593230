"""joint_delta_rule: several errors a token at one state; chunks against the token loop, and against delta_rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from archspec.errors import ShapeError, UnsupportedError
from archspec.kernels import delta_rule, joint_delta_rule
from archspec.kernels.delta.inputs import Order

Agree = Callable[..., None]

B, H, HV, K, V = 2, 2, 4, 6, 5
ORDERS = ("decay_first", "together", "step_first")
DECAYS = {"none": None, "head": (HV,), "token": (B, -1, HV), "key": (B, -1, HV, K)}


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def make(T: int, rows: int, decay: str = "token", *extra: str) -> dict[str, Any]:
    """Random fp64 inputs: unit keys, strengths that add up to 2 at most, mild and very strong decays."""
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize(real(B, T, H, rows, K), dim=-1)
    strengths = (B, T, HV, rows, K) if "beta_key" in extra else (B, T, HV, rows)
    inputs: dict[str, Any] = {
        "q": real(B, T, H, K),
        "k": unit,
        "v": real(B, T, HV, rows, V),
        "beta": 2 / rows * torch.rand(strengths, dtype=torch.float64),
        "initial_state": real(B, HV, K, V),
    }
    shape = DECAYS[decay]
    if shape is not None:
        g = -torch.rand([T if size == -1 else size for size in shape], dtype=torch.float64)
        if decay != "head":
            g = g * torch.tensor([0.05, 20.0])[torch.randint(0, 2, (B, T, *(1,) * (g.ndim - 2)))]
            g[:, T // 2, 0] = -torch.inf
        inputs["g"] = g
    if "read_key" in extra:
        inputs["read_key"] = 0.5 * unit + 0.05 * real(B, T, H, rows, K)
    return inputs


chunked = functools.partial(joint_delta_rule, output_final_state=True, backend="chunked")
reference = functools.partial(joint_delta_rule, output_final_state=True, backend="reference")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("T", "rows"), [(1, 3), (7, 4), (33, 1), (70, 3)])
def test_chunked_agrees_with_the_token_loop(agree: Agree, T: int, rows: int, decay: str, order: Order) -> None:
    agree(functools.partial(chunked, order=order), functools.partial(reference, order=order), make(T, rows, decay))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("decay", ["token", "key"])
@pytest.mark.parametrize("extra", [("beta_key",), ("read_key",), ("beta_key", "read_key")], ids="+".join)
def test_variants_agree_with_the_token_loop(agree: Agree, decay: str, extra: tuple[str, ...], order: Order) -> None:
    agree(
        functools.partial(chunked, order=order),
        functools.partial(reference, order=order),
        make(41, 3, decay, *extra),
    )


def test_more_rows_than_a_chunk_holds(agree: Agree) -> None:
    agree(chunked, reference, make(5, 70, "key"))


@pytest.mark.parametrize("order", ORDERS)
def test_one_row_is_the_delta_rule(order: Order) -> None:
    inputs = make(40, 1, "key")
    one = {**inputs, **{name: inputs[name].squeeze(3) for name in ("k", "v", "beta")}}
    found, last = chunked(**inputs, order=order)
    wanted, end = delta_rule(**one, output_final_state=True, backend="reference", order=order)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(last, end)


def test_rows_of_a_token_do_not_see_each_other() -> None:
    """The same key twice at full strength overshoots to -S k + 2 v; one after another it would store v."""
    key = torch.zeros(1, 1, 1, 2, 2, dtype=torch.float64)
    key[..., 0] = 1
    start = torch.tensor([[3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)[None, None]
    inputs: dict[str, Any] = {
        "q": key[..., 0, :],
        "k": key,
        "v": torch.ones_like(key),
        "beta": torch.ones_like(key[..., 0]),
        "initial_state": start,
    }
    for run in (chunked, reference):
        o, state = run(**inputs, scale=1.0)
        assert state is not None
        torch.testing.assert_close(o.flatten(), torch.tensor([-1.0, -2.0], dtype=torch.float64))
        torch.testing.assert_close(state[0, 0, 1], start[0, 0, 1])


def test_split_sequence_and_steps_equal_the_whole(split_and_stepped: Callable[..., None]) -> None:
    split_and_stepped(
        functools.partial(joint_delta_rule, output_final_state=True, order="together"), make(30, 3, "key", "read_key")
    )


def test_fp32_is_close_to_fp64(fp32_is_close: Callable[..., None]) -> None:
    fp32_is_close(chunked, reference, make(130, 4, "key"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta": torch.rand(B, 4, HV, 2)}, ShapeError, r"beta has shape \[2, 4, 4, 2\]; required is"),
        ({"v": torch.rand(B, 4, 3, 3, V)}, ShapeError, "v has 3 heads and k 2"),
        ({"read_key": torch.rand(B, 4, H, 2, K)}, ShapeError, "read_key has shape"),
        ({"q": torch.rand(B, 4, H, K).half()}, ShapeError, "one dtype is required, found q torch.float16"),
        ({"order": "decayfirst"}, UnsupportedError, "unknown order 'decayfirst'.*Did you mean 'decay_first'"),
        ({"backend": "triton"}, UnsupportedError, "joint_delta_rule: .*use backend='chunked'"),
    ],
)
def test_errors_say_what_is_wrong(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = {name: x.float() for name, x in make(4, 3).items()}
    with pytest.raises(error, match=message):
        joint_delta_rule(**(inputs | change))
