"""The pieces around a recurrence against their torch forms in fp64: under the interpreter and, marked gpu, on a card.

bf16 stays on the card: bf16 arithmetic is wrong under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from archspec import launches
from archspec.errors import ShapeError, UnsupportedError
from archspec.kernels.pointwise import gated_map, gated_product, gated_rms_norm, l2_norm, log_decay, short_convolution

# RMS of the error over RMS of the exact result, from the same rounded inputs. One rounding of the result is all that
# a 16-bit type loses: 0.0017 for bf16, 0.0002 for fp16; fp32 sums of a few hundred terms stay far below 1e-5.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 3e-3}

Op = Callable[..., tuple[Tensor, ...]]


def convolve(activation: str) -> Op:
    def run(x: Tensor, weight: Tensor, backend: str, **optional: Tensor) -> tuple[Tensor, ...]:
        y, last = short_convolution(
            x, weight, activation=activation, output_final_state=True, backend=backend, **optional
        )
        assert last is not None
        return y, last

    return run


def normalise(activation: str) -> Op:
    def run(x: Tensor, backend: str, gate: Tensor | None = None, weight: Tensor | None = None) -> tuple[Tensor, ...]:
        return (gated_rms_norm(x, gate, weight, activation, backend=backend),)

    return run


def unit(x: Tensor, backend: str) -> tuple[Tensor, ...]:
    return (l2_norm(x, backend=backend),)


def multiply(activation: str) -> Op:
    def run(gate: Tensor, up: Tensor, backend: str) -> tuple[Tensor, ...]:
        return (gated_product(gate, up, activation, backend),)

    return run


def multiply_and_map(gate: Tensor, up: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, ...]:
    return (gated_map(gate, up, weight, backend=backend),)


def decay(z: Tensor, log_rate: Tensor, backend: str, **optional: Tensor) -> tuple[Tensor, ...]:
    return (log_decay(z, log_rate, backend=backend, **optional),)


CASES: dict[str, tuple[Op, dict[str, tuple[int, ...]]]] = {
    "conv": (convolve("none"), {"x": (2, 37, 20), "weight": (20, 4)}),
    "conv silu offset state": (
        convolve("silu"),
        {"x": (2, 37, 70), "weight": (70, 4), "offset": (70,), "initial_state": (2, 3, 70)},
    ),
    "conv silu long": (convolve("silu"), {"x": (1, 300, 20), "weight": (20, 3), "initial_state": (1, 2, 20)}),
    "conv one token": (convolve("silu"), {"x": (3, 1, 20), "weight": (20, 4), "initial_state": (3, 3, 20)}),
    "conv two tokens from nothing": (convolve("silu"), {"x": (3, 2, 20), "weight": (20, 4)}),
    "conv of width one": (convolve("silu"), {"x": (2, 5, 20), "weight": (20, 1)}),
    "conv of width eight": (
        convolve("silu"),
        {"x": (3, 37, 150), "weight": (150, 8), "offset": (150,), "initial_state": (3, 7, 150)},
    ),
    "unit": (unit, {"x": (2, 9, 3, 20)}),
    "rms": (normalise("silu"), {"x": (2, 9, 3, 20), "weight": (20,)}),
    "rms silu": (normalise("silu"), {"x": (2, 150, 3, 20), "gate": (2, 150, 3, 20), "weight": (20,)}),
    "rms sigmoid per head": (normalise("sigmoid"), {"x": (2, 9, 3, 20), "gate": (2, 9, 3, 20), "weight": (3, 20)}),
    "rms silu without weight": (normalise("silu"), {"x": (5, 64), "gate": (5, 64)}),
    "rms wide": (normalise("silu"), {"x": (3, 2100), "weight": (2100,)}),
    "product silu": (multiply("silu"), {"gate": (3, 50, 20), "up": (3, 50, 20)}),
    "product sigmoid": (multiply("sigmoid"), {"gate": (5, 64), "up": (5, 64)}),
    "product and map": (multiply_and_map, {"gate": (3, 50, 20), "up": (3, 50, 20), "weight": (20, 7)}),
    "decay per head": (decay, {"z": (2, 130, 3, 1), "log_rate": (3, 1), "offset": (3, 1)}),
    "decay per key": (decay, {"z": (2, 9, 3, 20), "log_rate": (3, 1), "offset": (3, 20)}),
    "decay and rate per key": (decay, {"z": (2, 9, 3, 50), "log_rate": (3, 50)}),
}


def make(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Random inputs: three times as wide where a gate saturates, so that both its tails are seen."""
    generator = torch.Generator(device).manual_seed(len(shapes))
    found = {
        name: torch.randn(shape, generator=generator, device=device) * (3 if name in ("gate", "z") else 1)
        for name, shape in shapes.items()
    }
    return {name: x.to(dtype) for name, x in found.items()}


def results(op: Op, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = op(**leaves, backend=backend)
    generator = torch.Generator(outputs[0].device).manual_seed(100)
    weights = [torch.randn(y.shape, generator=generator, device=y.device).bfloat16().to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    named = {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {f"output {i}": y.detach() for i, y in enumerate(outputs)} | named


def check(name: str, dtype: torch.dtype, device: str) -> None:
    op, shapes = CASES[name]
    inputs = make(shapes, dtype, device)
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN: an element never written shows
    try:
        found = results(op, inputs, "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    wanted = results(op, {key: x.double() for key, x in inputs.items()}, "reference")
    for key, exact in wanted.items():
        error = float((found[key].double() - exact).norm() / exact.norm().clamp(min=1e-30))
        assert error < TOLERANCE[dtype], f"{key}: {error:.1e}"


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_interpreted(name: str, dtype: torch.dtype) -> None:
    check(name, dtype, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "name", ["conv silu offset state", "conv silu long", "decay per head", "decay per key", "rms silu"]
)
def test_long_walks_interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from archspec.kernels.pointwise import decay_fused, norm_fused

    # So that one program walks many of few tokens, as it does of many.
    monkeypatch.setattr(launches, "WALKS", 1)
    monkeypatch.setattr(decay_fused, "DECAY_TILE", 128)
    monkeypatch.setattr(norm_fused, "NORM_TILE", 128)
    check(name, torch.float32, "cpu")


@pytest.mark.interpreter
def test_log_decays_keep_their_digits_in_both_tails() -> None:
    z = torch.linspace(-40, 40, 401).view(1, -1, 1, 1).requires_grad_()
    log_rate = torch.zeros(1, 1)
    found = log_decay(z, log_rate, backend="triton")
    (slope,) = torch.autograd.grad(found.sum(), z)
    exact = z.detach().double()
    wanted = -(exact.clamp(min=0) + torch.log1p(torch.exp(-exact.abs())))
    torch.testing.assert_close(found.double(), wanted, rtol=5e-7, atol=0)
    torch.testing.assert_close(slope.double(), -exact.sigmoid(), rtol=5e-7, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_on_the_card(name: str, dtype: torch.dtype) -> None:
    check(name, dtype, "cuda")


@pytest.mark.interpreter
def test_what_norms_and_gated_maps_keep() -> None:
    x, weight = torch.randn(4, 20).requires_grad_(), torch.randn(20, 7).requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = l2_norm(x, backend="triton")
        assert [tensor.shape for tensor in kept] == [(4, 20), (4,)]
        assert kept[0].data_ptr() == y.data_ptr()
        kept.clear()
        gated_map(x, x, weight, backend="triton")
        assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr(), x.data_ptr(), weight.data_ptr()]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CASES if name != "product and map"])  # torch's product may differ
def test_on_the_card_compiled_without_graph_breaks(name: str) -> None:
    op, shapes = CASES[name]
    inputs = make(shapes, torch.bfloat16, "cuda")
    compiled = torch.compile(op, fullgraph=True)
    for (key, x), y in zip(
        results(compiled, inputs, "triton").items(), results(op, inputs, "triton").values(), strict=True
    ):
        assert torch.equal(x, y), key


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_torch_forms(name: str) -> None:
    op, shapes = CASES[name]
    inputs = make({key: _small(shape) for key, shape in shapes.items()}, torch.float64, "cpu")
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: op(**dict(zip(inputs, x, strict=True)), backend="reference"), leaves)


def _small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same number of tokens and channels everywhere, few enough for finite differences."""
    return tuple({37: 5, 300: 5, 150: 3, 130: 3, 70: 4, 20: 4, 64: 4, 50: 4, 2100: 6, 9: 3}.get(n, n) for n in shape)


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_a_convolution_continues_where_it_stopped(activation: str) -> None:
    x, weight = torch.randn(2, 11, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    whole, last = short_convolution(x, weight, activation=activation, output_final_state=True)
    state, parts = None, []
    for at in (slice(0, 2), slice(2, 3), slice(3, 11)):
        y, state = short_convolution(x[:, at], weight, None, activation, state, output_final_state=True)
        parts.append(y)
    assert state is not None
    assert last is not None
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert torch.equal(state, last)


ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: short_convolution(torch.randn(1, 5, 4), torch.randn(3, 4)),
        ShapeError,
        "short_convolution: weight has shape [3, 4]; required is [D=4, W]. Layout is time before heads.",
    ),
    (
        lambda: short_convolution(torch.randn(1, 5, 4), torch.randn(4, 4), initial_state=torch.randn(1, 4, 4)),
        ShapeError,
        "short_convolution: initial_state has shape [1, 4, 4]; required is [B=1, W-1=3, D=4]. "
        "Layout is time before heads.",
    ),
    (
        lambda: short_convolution(torch.randn(1, 5, 4), torch.randn(4, 9), backend="triton"),
        UnsupportedError,
        "short_convolution: width is 9, over the Triton kernel's 8; use backend='chunked'.",
    ),
    (
        lambda: gated_map(torch.randn(5, 4), torch.randn(5, 4), torch.randn(3, 4)),
        ShapeError,
        "gated_map: weight has shape [3, 4]; required is [4, N].",
    ),
    (
        lambda: gated_rms_norm(torch.randn(5, 4), torch.randn(5, 1)),
        ShapeError,
        "gated_rms_norm: gate has shape [5, 1]; required is x's, [5, 4].",
    ),
    (
        lambda: gated_rms_norm(torch.randn(5, 4), weight=torch.randn(3)),
        ShapeError,
        "gated_rms_norm: weight has shape [3]; required are the last axes of [5, 4].",
    ),
    (
        lambda: log_decay(torch.randn(1, 5, 2, 4), torch.randn(2, 3)),
        ShapeError,
        "log_decay: log_rate has shape [2, 3]; required is [H=2, K=4]. Layout is time before heads.",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[message[:40] for _, _, message in ERRORS])
def test_errors_say_what_is_required(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as raised:
        call()
    assert str(raised.value) == message


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"short_convolution: unknown activation 'gelu'"):
        short_convolution(torch.randn(1, 5, 4), torch.randn(4, 4), activation="gelu")
