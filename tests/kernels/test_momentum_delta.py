"""momentum_delta_rule: the chunkwise form and the step against the token loop; the delta rule at zero momentum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from archspec.errors import ShapeError, UnsupportedError
from archspec.kernels import MomentumDeltaState, delta_rule, momentum_delta_rule, momentum_delta_rule_step

Agree = Callable[..., None]

B, H, HV, K, V = 2, 2, 4, 6, 5


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def share(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


def make(T: int, decay: str = "token", keys: str = "one", seed: int = 0) -> dict[str, Tensor]:
    """Random fp64 inputs with unit keys, a zero momentum and a decay of zero among them."""
    torch.manual_seed(seed)
    inputs = {
        "q": real(B, T, H, K),
        "k": torch.nn.functional.normalize(real(B, T, H, K), dim=-1),
        "v": real(B, T, HV, V),
        "step": 0.5 * share(B, T, HV, K) if keys == "channels" else 0.5 * share(B, T, HV),
        "momentum": 0.9 * share(B, T, HV),
        "S": real(B, HV, K, V),
        "P": real(B, HV, K, V),
    }
    inputs["momentum"][:, T // 3, 0] = 0
    if keys == "apart":
        inputs["read_key"] = torch.nn.functional.normalize(real(B, T, H, K), dim=-1)
        inputs["erase_key"] = inputs["read_key"].clone()
        inputs["write_step"] = share(B, T, HV, K)
    if decay == "head":
        inputs["g"] = -share(HV)
    if decay == "token":
        inputs["g"] = -share(B, T, HV) * torch.tensor([0.05, 20.0])[torch.randint(0, 2, (B, T, 1))]
        inputs["g"][:, T // 2, 0] = -torch.inf
    return inputs


def run(backend: str, order: str = "together") -> Callable[..., tuple[Tensor, ...]]:
    def op(S: Tensor, P: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        state = MomentumDeltaState(S, P)
        rest = {"initial_state": state, "output_final_state": True, "backend": backend, "order": order}
        o, end = momentum_delta_rule(**inputs, **rest)
        assert end is not None
        return o, *end

    return op


@pytest.mark.parametrize("order", ["decay_first", "together", "step_first"])
@pytest.mark.parametrize("T", [1, 63, 100])
def test_chunked_agrees_with_the_token_loop(agree: Agree, T: int, order: str) -> None:
    agree(run("chunked", order), run("reference", order), make(T))


@pytest.mark.parametrize("keys", ["channels", "apart"])
@pytest.mark.parametrize("decay", ["none", "head"])
def test_every_kind_of_gate_and_key(agree: Agree, decay: str, keys: str) -> None:
    agree(run("chunked", "decay_first"), run("reference", "decay_first"), make(63, decay, keys))


def test_gradcheck() -> None:
    inputs = {name: x[:1].contiguous() for name, x in make(4).items()}
    inputs["g"] = inputs["g"].clamp(min=-2)  # finite differences need a finite, smooth region
    names = list(inputs)

    def op(*tensors: Tensor) -> tuple[Tensor, ...]:
        return run("chunked")(**dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(op, tuple(x.requires_grad_() for x in inputs.values()))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("order", ["decay_first", "together", "step_first"])
def test_split_sequence_and_steps_equal_the_whole(backend: str, order: str) -> None:
    inputs = make(50, keys="apart")
    start = {name: inputs.pop(name) for name in ("S", "P")}
    op = run(backend, order)
    whole, *last = op(**inputs, **start)
    first, *middle = op(**{name: x[:, :19] for name, x in inputs.items()}, **start)
    second, *end = op(**{name: x[:, 19:] for name, x in inputs.items()}, S=middle[0], P=middle[1])
    # fp64, 50 tokens: rounding differs with where the sequence is cut, by 1e-13 at most
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)
    close(torch.cat([first, second], 1), whole)
    close(end, last)
    state = MomentumDeltaState(**dict(zip(("weights", "momentum"), start.values(), strict=True)))
    for t in range(50):
        o, state = momentum_delta_rule_step(
            **{name: x[:, t] for name, x in inputs.items()},
            state=state,
            order=order,  # type: ignore[arg-type]
        )
        close(o, whole[:, t])
    close(list(state), last)


def test_without_momentum_it_is_the_delta_rule(agree: Agree) -> None:
    inputs = {name: x for name, x in make(70).items() if name not in ("P", "momentum")}

    def with_momentum(S: Tensor, **rest: Tensor) -> tuple[Tensor, ...]:
        zero = torch.zeros_like(S)
        return run("chunked")(S=S, P=zero, momentum=torch.zeros(B, 70, HV, dtype=torch.float64), **rest)[:2]

    def without(S: Tensor, step: Tensor, **rest: Any) -> Any:
        rest |= {"initial_state": S, "output_final_state": True, "backend": "reference"}
        return delta_rule(beta=step, order="together", **rest)

    agree(with_momentum, without, inputs)


def test_fp32_stays_close_to_fp64() -> None:
    inputs = make(300)
    wanted = run("reference")(**inputs)
    found = run("auto")(**{name: x.float() for name, x in inputs.items()})
    for x, y in zip(found, wanted, strict=True):
        # fp32 rounds at 6e-8; solves and products over chunks of 32 tokens lose about one digit
        assert float((x.double() - y).norm() / y.norm()) < 5e-6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"momentum": torch.rand(B, 4)}, ShapeError, r"momentum has shape \[2, 4\]; required is \[B=2, T=4, HV=4\]"),
        ({"g": torch.rand(B, 4, HV, K)}, ShapeError, r"g has shape .*required is \[B=2, T=4, HV=4\]"),
        ({"order": "first"}, UnsupportedError, "unknown order 'first'; known: decay_first, step_first, together"),
        ({"backend": "triton"}, UnsupportedError, "momentum_delta_rule: has no Triton kernel; use backend='chunked'"),
        (
            {"initial_state": MomentumDeltaState(torch.rand(B, HV, K, V), torch.rand(B, HV, V, K))},
            ShapeError,
            r"initial_state.momentum has shape \[2, 4, 5, 6\]; required is \[B=2, HV=4, K=6, V=5\]",
        ),
    ],
)
def test_errors_say_what_is_wrong(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = {name: x.float() for name, x in make(4).items() if name not in ("S", "P")}
    with pytest.raises(error, match=message):
        momentum_delta_rule(**(inputs | change))
