"""online_memory: chunks and steps against the token loop, and both against the linear rules they contain."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, normalize

from archspec.errors import ShapeError, UnsupportedError
from archspec.kernels import delta_rule, linear_attention, online_memory, online_memory_step
from archspec.kernels.online import Linear, OnlineState, start_state

Agree = Callable[..., None]

B, H, K, F = 2, 2, 4, 6
LENGTHS = [1, 63, 100, 257]
SHARES = torch.linspace(0.7, -0.1, 16, dtype=torch.float64).clamp(min=0)
"""Some of them zero: what a token reads is then the anchor, and later tokens the sum all the same."""


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


def mlp(norm_scale: Tensor) -> Callable[[Linear, Tensor], Tensor]:
    """x + LN(w2 gelu(w1 x + b1)): residual, normalisation and an offset around two layers.

    The large eps keeps the dynamics from being chaotic where a decay has brought weights near zero: with 1e-5 two
    fp64 runs of 2000 tokens that differ in one rounding end up uncorrelated.
    """

    def network(linear: Linear, x: Tensor) -> Tensor:
        inner = gelu(linear("w1", x) + linear("b1", x.new_ones(1).expand(*x.shape[:-1], 1)))
        return x + layer_norm(linear("w2", inner), (K,), eps=0.1) * norm_scale

    return network


def matrix(linear: Linear, x: Tensor) -> Tensor:
    return linear("w", x)


def l2(prediction: Tensor, value: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    return prediction - value


def huber(prediction: Tensor, value: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    bound = inputs["threshold"]
    return (prediction - value).minimum(bound).maximum(-bound)


def dot(prediction: Tensor, value: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    return -value


def make(
    T: int, gates: str = "head", decay: bool = True, momentum: bool = False, mild: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Random fp64 inputs by name; gates named ``<gate>.<weight>`` where they differ by weight."""
    torch.manual_seed(seed)
    inputs: dict[str, Any] = {
        "q": normalize(real(B, T, H, K), dim=-1),
        "k": normalize(real(B, T, H, K), dim=-1),
        "v": real(B, T, H, K),
    }
    shapes = {"w1": (K, F), "w2": (F, K), "b1": (1, F)}
    for name, shape in shapes.items():
        inputs[f"weights.{name}"] = real(B, H, *shape) / shape[0] ** 0.5
    inputs["norm_scale"] = 0.5 + uniform(H, 1, K)
    inputs["error.threshold"] = 0.5 + uniform(B, T, H, 1)
    laws: dict[str, Callable[..., Tensor]] = {"step_size": lambda *shape: 0.1 * uniform(*shape)}
    if decay:
        laws["log_decay"] = lambda *shape: -0.04 * uniform(*shape)
    if momentum:
        laws["momentum"] = uniform
    # The model-sized axis of each matrix, as channel-wise test-time memories use it, and its other axis.
    axes = {
        "key": {"w1": (K, 1), "w2": (1, K), "b1": (1, 1)},
        "inner": {"w1": (1, F), "w2": (F, 1), "b1": (1, F)},
        "mixed": {"w1": (1, 1), "w2": (F, 1), "b1": (1, F)},
        "crossed": {"w1": (1, F), "w2": (F, 1), "b1": (1, 1)},
    }
    for gate, law in laws.items():
        if gates == "head":
            inputs[gate] = law(B, T, H)
            continue
        of_gate = axes["key" if gates == "crossed" and gate == "step_size" else gates]
        for name in shapes:
            inputs[f"{gate}.{name}"] = law(B, T, H, *of_gate[name])
    if mild:
        return inputs
    # Some heads forget nearly all and all (a network with all weights zero stays there), others go on.
    for name in inputs:
        if name.startswith("log_decay"):
            inputs[name][0, T // 2, 0] = -20.0
            inputs[name][0, 3 * T // 4, 0] = -torch.inf
        if name.startswith("momentum"):
            inputs[name][:, T // 2] = 0.0
    return inputs


def group(inputs: Mapping[str, Tensor], gate: str) -> Any:
    named = {name.removeprefix(f"{gate}."): x for name, x in inputs.items() if name.startswith(f"{gate}.")}
    return named or inputs.get(gate)


def run(backend: str, error: Any = huber, chunk_size: int = 16, **inputs: Any) -> tuple[Tensor | None, ...]:
    """Call online_memory on the inputs that ``make`` names; outputs and every tensor of the state."""
    options = {name: inputs.pop(name) for name in ("order", "reduce", "read", "shares", "state") if name in inputs}
    o, state = online_memory(
        *(inputs[name] for name in "qkv"),
        group(inputs, "weights"),
        network=mlp(inputs["norm_scale"]),
        error=error,
        error_inputs=group(inputs, "error"),
        step_size=group(inputs, "step_size"),
        log_decay=group(inputs, "log_decay"),
        momentum=group(inputs, "momentum"),
        read_key=inputs.get("read_key"),
        chunk_size=chunk_size,
        output_final_state=True,
        backend=backend,
        **options,
    )
    assert state is not None
    return (o, *flat(state))


def flat(state: OnlineState) -> list[Tensor]:
    """Every tensor of a state, in a fixed order."""
    return [x[name] for x in state[:3] if x is not None for name in sorted(x)]


chunked = functools.partial(run, "chunked")
reference = functools.partial(run, "reference")


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_agrees_with_the_token_loop(agree: Agree, T: int, momentum: bool) -> None:
    agree(chunked, reference, make(T, momentum=momentum))


@pytest.mark.slow
def test_long_sequence(agree: Agree) -> None:
    agree(chunked, reference, make(2000, momentum=True))


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("gates", ["key", "inner", "mixed", "crossed"])
def test_gates_per_channel(agree: Agree, gates: str, momentum: bool) -> None:
    agree(chunked, reference, make(45, gates, momentum=momentum))


@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("order", ["decay_first", "together", "step_first"])
@pytest.mark.parametrize("gates", ["head", "key", "inner"])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("mild", [False, True])
def test_orders_and_reads(agree: Agree, mild: bool, momentum: bool, gates: str, order: str, read: str) -> None:
    options: Any = {"order": order, "read": read}
    inputs = make(25, gates, momentum=momentum, mild=mild)
    agree(functools.partial(chunked, **options), functools.partial(reference, **options), inputs)


@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("gates", ["head", "key"])
def test_mean_steps(agree: Agree, gates: str, read: str) -> None:
    options: Any = {"reduce": "mean", "read": read}
    inputs = make(45, gates, decay=False)
    agree(functools.partial(chunked, **options), functools.partial(reference, **options), inputs)


@pytest.mark.parametrize("read", ["after", "before"])
@pytest.mark.parametrize("gates", ["head", "key"])
def test_shares_of_a_mean(agree: Agree, gates: str, read: str) -> None:
    options: Any = {"reduce": "mean", "read": read}
    inputs = make(45, gates, decay=False) | {"shares": SHARES}
    agree(functools.partial(chunked, **options), functools.partial(reference, **options), inputs)


def test_shares_of_one_over_i_are_the_mean() -> None:
    inputs = make(45, decay=False)
    shares = 1 / torch.arange(1, 17, dtype=torch.float64)
    for form in (chunked, reference):
        plain, shared = form(reduce="mean", **inputs), form(reduce="mean", shares=shares, **inputs)
        for x, y in zip(plain, shared, strict=False):  # the shared one keeps sums too
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_read_key_and_no_decay(agree: Agree) -> None:
    inputs = make(45, decay=False) | {"read_key": real(B, 45, H, K)}
    agree(chunked, reference, inputs)


@pytest.mark.parametrize("options", [{}, {"momentum": True}, {"gates": "key"}, {"decay": False}], ids=str)
def test_gradcheck(options: dict[str, Any]) -> None:
    inputs = make(5, **options)
    for name, x in inputs.items():
        if name.startswith("weights"):
            inputs[name] = x[:1, :1]
        elif name == "norm_scale":
            inputs[name] = x[:1]
        else:
            inputs[name] = x[:1, :, :1]
        if name.startswith("log_decay"):
            inputs[name] = inputs[name].clamp(min=-2)  # finite differences need a finite, smooth region
    names = list(inputs)

    def of(*tensors: Tensor) -> Any:
        return chunked(**dict(zip(names, tensors, strict=True)), error=l2, chunk_size=3)

    assert torch.autograd.gradcheck(of, tuple(x.contiguous().requires_grad_() for x in inputs.values()))


def stepped(inputs: dict[str, Any], state: OnlineState, t: int, **options: Any) -> Any:
    def at(x: Any) -> Any:
        return x[:, t] if isinstance(x, Tensor) else None if x is None else {name: y[:, t] for name, y in x.items()}

    return online_memory_step(
        *(at(inputs[name]) for name in "qkv"),
        state,
        network=mlp(inputs["norm_scale"]),
        error=huber,
        error_inputs=at(group(inputs, "error")),
        step_size=at(group(inputs, "step_size")),
        log_decay=at(group(inputs, "log_decay")),
        momentum=at(group(inputs, "momentum")),
        chunk_size=16,
        **options,
    )


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(
    ("make_options", "options"),
    [
        ({"momentum": True}, {}),
        ({"gates": "key"}, {"order": "step_first", "read": "before"}),
        ({"decay": False}, {"reduce": "mean"}),
        ({"decay": False}, {"reduce": "mean", "read": "before"}),
        ({"decay": False}, {"reduce": "mean", "shares": SHARES}),
    ],
    ids=str,
)
def test_split_sequence_and_steps_equal_the_whole(
    backend: str, make_options: dict[str, Any], options: dict[str, Any]
) -> None:
    """Cut in mid-chunk twice, then token by token from a mid-chunk state: the phase and the anchor travel along."""
    T = 60
    inputs = make(T, **make_options)
    whole, *last = run(backend, **inputs, **options)
    state: OnlineState | None = None
    parts = []
    for start, end in ((0, 21), (21, 27), (27, 41)):
        part = {name: x if name.startswith(("weights", "norm")) else x[:, start:end] for name, x in inputs.items()}
        o, state = online_memory(
            *(part[name] for name in "qkv"),
            group(part, "weights"),
            network=mlp(part["norm_scale"]),
            error=huber,
            error_inputs=group(part, "error"),
            step_size=group(part, "step_size"),
            log_decay=group(part, "log_decay"),
            momentum=group(part, "momentum"),
            chunk_size=16,
            state=state,
            output_final_state=True,
            backend=backend,
            **options,
        )
        parts.append(o)
    assert state is not None
    assert state.phase == 41 % 16
    for t in range(41, T):
        o, state = stepped(inputs, state, t, **options)
        parts.append(o.unsqueeze(1))
    # fp64: only rounding differs with where the sequence is cut
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-11)
    for x, y in zip(flat(state), last, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


def test_steps_from_the_start_state() -> None:
    inputs = make(20, momentum=True)
    whole, *last = chunked(**inputs)
    state = start_state(group(inputs, "weights"), momentum=True)
    for t in range(20):
        o, state = stepped(inputs, state, t)
        torch.testing.assert_close(o, whole[:, t], rtol=1e-9, atol=1e-11)  # type: ignore[index]
    for x, y in zip(flat(state), last, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


def test_a_matrix_anchored_at_every_token_is_the_delta_rule(agree: Agree) -> None:
    """chunk_size=1, l2: W_t = alpha W_{t-1} - theta k (W_{t-1}^T k - v)^T, decay and step together."""
    inputs = make(50)
    names = {"q": "q", "k": "k", "v": "v", "beta": "step_size", "g": "log_decay"}
    shared = {name: inputs[source] for name, source in names.items()} | {"start": real(B, H, K, K)}

    def online(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, start: Tensor) -> Any:
        o, state = online_memory(
            q, k, v, {"w": start}, network=matrix, error=l2, step_size=beta, log_decay=g, chunk_size=1,
            output_final_state=True, backend="chunked",
        )  # fmt: skip
        return o, None if state is None else state.weights["w"]

    def delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, start: Tensor) -> Any:
        return delta_rule(q, k, v, beta, g, 1.0, start, True, backend="reference", order="together")

    agree(online, delta, shared)


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_a_matrix_with_dot_error_is_linear_attention(agree: Agree, chunk_size: int) -> None:
    """With l = -<M(k), v> the gradient is -k v^T wherever it is taken: every chunk size is linear attention."""
    inputs = make(50)
    shared = {name: inputs[name] for name in ("q", "k", "v")} | {"g": inputs["log_decay"], "start": real(B, H, K, K)}

    def online(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor) -> Any:
        o, state = online_memory(
            q, k, v, {"w": start}, network=matrix, error=dot, step_size=torch.ones_like(g), log_decay=g,
            chunk_size=chunk_size, output_final_state=True, backend="chunked",
        )  # fmt: skip
        return o, None if state is None else state.weights["w"]

    def linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor) -> Any:
        return linear_attention(q, k, v, g, 1.0, start, True, backend="reference")

    agree(online, linear, shared)


def test_the_chunk_size_is_part_of_the_function() -> None:
    inputs = make(40)
    fine, coarse = chunked(**inputs, chunk_size=4)[0], chunked(**inputs, chunk_size=16)[0]
    assert fine is not None
    assert coarse is not None
    torch.testing.assert_close(fine[:, :4], coarse[:, :4])
    assert float((fine - coarse).norm() / coarse.norm()) > 1e-3


def test_no_grad_gives_the_same_and_keeps_no_graph() -> None:
    inputs = {name: x.requires_grad_() for name, x in make(40, momentum=True).items()}
    with_tape = chunked(**inputs)
    with torch.no_grad():
        without = chunked(**inputs)
    for x, y in zip(with_tape, without, strict=True):
        assert x is not None
        assert y is not None
        assert not y.requires_grad
        assert torch.equal(x, y)


def test_half_precision_keeps_an_fp32_state() -> None:
    inputs = make(60)
    exact = reference(**inputs)[0]
    half = {name: x.bfloat16() if name in "qkv" else x.float() for name, x in inputs.items()}
    o, *state = chunked(**half)
    assert o is not None
    assert exact is not None
    assert o.dtype == torch.bfloat16
    assert all(x is not None and x.dtype == torch.float32 for x in state)
    # bf16 inputs carry 2^-9 and the output is rounded to it again
    assert float((o.double() - exact).norm() / exact.norm()) < 0.02


def test_gates_along_both_axes_run_on_the_reference() -> None:
    inputs = make(9, "key")
    inputs["log_decay.w1"] = -0.1 * uniform(B, 9, H, K, F)
    exact, found = reference(**inputs)[0], run(backend="auto", **inputs)[0]
    assert exact is not None
    assert found is not None
    assert torch.equal(found, exact)
    with pytest.raises(UnsupportedError, match="gates of 'w1' vary along both axes of the weight; use backend='ref"):
        chunked(**inputs)


def test_errors_say_what_is_wrong() -> None:
    inputs = make(5)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        (
            {"step_size": uniform(B, H, 5)[:, :1]},
            ShapeError,
            r"step_size has shape \[2, 1, 5\]; required is \[B=2, T=5",
        ),
        ({"order": "decay"}, UnsupportedError, "unknown order 'decay'"),
        ({"reduce": "mean"}, UnsupportedError, "leave out log_decay and momentum"),
        ({"chunk_size": 0}, ShapeError, "chunk_size=0; at least 1"),
        ({"error.threshold": uniform(B, 4, H, 1)}, ShapeError, r"error_inputs\['threshold'\] has shape \[2, 4, 2, 1\]"),
        ({"weights.w3": uniform(B, H, K, K)}, UnsupportedError, "the network does not use w3"),
        ({"weights.w1": uniform(H, K, F)}, ShapeError, r"weights\['w1'\] has shape \[2, 4, 6\]"),
        ({"state": OnlineState({}, {}, {}, 0)}, ShapeError, "the state holds a momentum buffer"),
        ({"state": OnlineState({}, {}, None, 16)}, ShapeError, "phase is 16; required is 0 to chunk_size - 1 = 15"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            chunked(**(inputs | change))
    with pytest.raises(UnsupportedError, match="no Triton kernel"):
        run("triton", **inputs)
    with pytest.raises(ShapeError, match=r"step_size names \['w2'\]; required are the weights"):
        chunked(
            **{name: x for name, x in inputs.items() if name != "step_size"} | {"step_size.w2": uniform(B, 5, H, 1, 1)}
        )


def test_a_weight_used_twice_is_an_error() -> None:
    x = real(1, 3, 1, K)
    with pytest.raises(UnsupportedError, match="uses weight 'w' more than once"):
        online_memory(
            x, x, x, {"w": real(1, 1, K, K)}, network=lambda linear, y: linear("w", linear("w", y)), error=l2,
            step_size=uniform(1, 3, 1), chunk_size=2, backend="chunked",
        )  # fmt: skip


def test_shares_that_do_not_fit_are_refused() -> None:
    inputs = make(5, decay=False)
    with pytest.raises(UnsupportedError, match="shares are of a mean; use reduce='mean', or leave them out"):
        run("chunked", shares=SHARES, **inputs)
    with pytest.raises(ShapeError, match=r"shares has shape \[16\]; required is \[chunk_size=4\]"):
        run("chunked", reduce="mean", shares=SHARES, chunk_size=4, **inputs)
