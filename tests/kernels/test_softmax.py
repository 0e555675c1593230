"""softmax_attention: blocks and steps against the token loop, and against attention written out with a T x T mask."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from archspec.errors import ShapeError, UnsupportedError
from archspec.kernels import KvCache, softmax_attention, softmax_attention_step

Agree = Callable[..., None]

B, HQ, HK, K, V = 2, 4, 2, 6, 5
WINDOWS = [None, 1, 7, 150]
DECAYS = ["none", "head", "token"]


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def make(T: int, decay: str = "none", cached: int = 0, seed: int = 0) -> dict[str, Any]:
    """Random fp64 inputs, mild and strong decays with one alpha = 0, and the tensors of a cache."""
    torch.manual_seed(seed)
    inputs: dict[str, Any] = {"q": real(B, T, HQ, K), "k": real(B, T, HK, K), "v": real(B, T, HK, V)}
    if decay == "head":
        inputs["g"] = -torch.rand(HQ, dtype=torch.float64)
    if decay == "token":
        inputs["g"] = -torch.rand(B, T, HQ, dtype=torch.float64)
        inputs["g"] *= torch.tensor([0.05, 20.0])[torch.randint(0, 2, (B, T, 1))]
        inputs["g"][:, T // 2, 0] = -torch.inf
    if cached:
        inputs |= {"old_keys": real(B, cached, HK, K), "old_values": real(B, cached, HK, V)}
        if decay != "none":
            inputs["old_decay"] = -torch.rand(B, cached, HQ, dtype=torch.float64).cumsum(1).flip(1)
    return inputs


def run(backend: str, window: int | None = None, **inputs: Any) -> tuple[Tensor, ...]:
    """Call the op; the output and the tensors of the cache, its log decays cut where nothing is left of a score."""
    old = [inputs.pop(name, None) for name in ("old_keys", "old_values", "old_decay")]
    cache = None if old[0] is None else KvCache(*old)
    o, last = softmax_attention(**inputs, window=window, initial_state=cache, output_final_state=True, backend=backend)
    assert last is not None
    tensors = (last.keys, last.values) if last.log_decay is None else (*last[:2], last.log_decay.clamp(min=-50))
    return (o, *tensors)


chunked = functools.partial(run, "chunked")
reference = functools.partial(run, "reference")


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("T", [1, 63, 100, 257])
def test_chunked_agrees_with_the_token_loop(agree: Agree, T: int, window: int | None, decay: str) -> None:
    both = (functools.partial(form, window=window) for form in (chunked, reference))
    agree(*both, make(T, decay))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("T", [1, 40])
def test_continuation_from_a_cache(agree: Agree, T: int, window: int | None, decay: str) -> None:
    both = (functools.partial(form, window=window) for form in (chunked, reference))
    agree(*both, make(T, decay, cached=30))


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 200])
def test_long_sequence(agree: Agree, window: int | None) -> None:
    both = (functools.partial(form, window=window) for form in (chunked, reference))
    agree(*both, make(2000, "token"))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("window", [None, 3])
def test_gradcheck(window: int | None, decay: str) -> None:
    inputs = make(5, decay, cached=2)
    if "g" in inputs:
        inputs["g"] = inputs["g"].clamp(min=-2)  # finite differences need a finite, smooth region
    names = list(inputs)

    def of(*tensors: Tensor) -> Any:
        return chunked(window=window, **dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(of, tuple(x.requires_grad_() for x in inputs.values()))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("decay", DECAYS)
def test_split_sequence_and_steps_equal_the_whole(decay: str, window: int | None, backend: str) -> None:
    inputs = make(40, decay)
    whole, *last = run(backend, window, **inputs)
    attend = functools.partial(softmax_attention, window=window, output_final_state=True, backend=backend)

    def part(tokens: slice | int) -> dict[str, Any]:
        return {name: x if x.ndim == 1 else x[:, tokens] for name, x in inputs.items()}

    first, cache = attend(**part(slice(0, 17)))
    second, cache = attend(**part(slice(17, 30)), initial_state=cache)
    parts = [first, second]
    for t in range(30, 40):
        o, cache = softmax_attention_step(**part(t), cache=cache, window=window)
        parts.append(o.unsqueeze(1))
    assert cache is not None
    # fp64: only rounding differs with where the sequence is cut
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)
    for x, y in zip(cache, last, strict=False):
        assert x is not None
        torch.testing.assert_close(x.clamp(min=-50), y.clamp(min=-50), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [None, 9])
def test_steps_from_nothing(window: int | None) -> None:
    inputs = make(25)
    whole, keys, _ = chunked(window, **inputs)
    cache = None
    for t in range(25):
        o, cache = softmax_attention_step(**{name: x[:, t] for name, x in inputs.items()}, cache=cache, window=window)
        torch.testing.assert_close(o, whole[:, t], rtol=1e-10, atol=1e-12)
    assert cache is not None
    assert torch.equal(cache.keys, keys)
    assert keys.shape[1] == (25 if window is None else window - 1)


@pytest.mark.parametrize("window", [None, 5])
def test_the_formula_written_out(window: int | None) -> None:
    """Against softmax(scale q k^T - slope (t - j)) under the full mask: ALiBi with grouped heads."""
    T = 30
    inputs = make(T)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0], dtype=torch.float64)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    keys, values = (inputs[name].repeat_interleave(2, dim=2) for name in "kv")
    scores = 0.3 * torch.einsum("bthk,bshk->bhts", inputs["q"], keys) - slopes[:, None, None] * distance
    hidden = (distance < 0) | (distance >= (window or T))
    wanted = torch.einsum("bhts,bshv->bthv", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
    for backend in ("chunked", "reference"):
        o, _ = softmax_attention(**inputs, g=-slopes, scale=0.3, window=window, backend=backend)
        torch.testing.assert_close(o, wanted)


def test_more_value_heads_than_key_heads(agree: Agree) -> None:
    agree(chunked, reference, {"q": real(B, 33, 2, K), "k": real(B, 33, 2, K), "v": real(B, 33, 6, V)})


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_packed_sequences_equal_separate_ones(backend: str, window: int | None) -> None:
    inputs = {name: x[:1] for name, x in make(60, "token").items()}
    attend = functools.partial(softmax_attention, window=window, backend=backend)
    packed, _ = attend(**inputs, cu_seqlens=torch.tensor([0, 1, 40, 60]))
    for start, end in ((0, 1), (1, 40), (40, 60)):
        o, _ = attend(**{name: x[:, start:end] for name, x in inputs.items()})
        assert torch.equal(packed[:, start:end], o)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("window", [None, 20])
def test_lower_precision(window: int | None, decay: str, dtype: torch.dtype) -> None:
    inputs = make(150, decay)
    lower = {name: x.to(dtype) if name in "qkv" else x.float() for name, x in inputs.items()}
    exact = reference(window, **{name: x.double() for name, x in lower.items()})[0]
    o = chunked(window, **lower)[0]
    assert o.dtype == dtype
    # The inputs are the same numbers; bf16 rounds the weights or the output to 2^-9, fp32 to 2^-24.
    bound = 0.01 if dtype == torch.bfloat16 else 1e-6
    assert float((o.double() - exact).norm() / exact.norm()) < bound


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the size of the largest tensor that any operation returns, backward ones included."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        self.num_elements = max(self.num_elements, *sizes, 0)
        return out


def test_windowed_attention_of_a_long_sequence_needs_no_square() -> None:
    T = 8000
    x = torch.randn(1, T, 1, 4, requires_grad=True)
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        softmax_attention(x, x, x, window=64)[0].sum().backward()
    assert T * 4 <= largest.num_elements < 20 * T


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.rand(B, 4, 3, K), "v": torch.rand(B, 4, 3, V)}, ShapeError, "q has 4, k has 3, v has 3 heads"),
        ({"window": 0}, ShapeError, "window=0; at least 1"),
        ({"g": torch.rand(B, 4, 3)}, ShapeError, r"g has shape \[2, 4, 3\]; required is \[B=2, T=4, HO=4\]"),
        ({"v": torch.rand(B, 4, HK, V).half()}, ShapeError, "one dtype is required"),
        (
            {"initial_state": KvCache(torch.rand(B, 3, HK, K), torch.rand(B, 2, HK, V), None)},
            ShapeError,
            r"initial_state.values has shape \[2, 2, 2, 5\]; required is \[B=2, S=3",
        ),
        (
            {"g": torch.rand(HQ), "initial_state": KvCache(torch.rand(B, 3, HK, K), torch.rand(B, 3, HK, V), None)},
            ShapeError,
            "log_decay and g must both be given",
        ),
        ({"backend": "triton"}, UnsupportedError, "no Triton kernel"),
    ],
)
def test_errors_say_what_is_wrong(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = {name: x.float() for name, x in make(4).items()}
    with pytest.raises(error, match=message):
        softmax_attention(**(inputs | change))


def test_packed_sequences_have_no_states() -> None:
    inputs = {name: x[:1] for name, x in make(4).items()}
    with pytest.raises(UnsupportedError, match="caches of packed sequences differ in length"):
        softmax_attention(**inputs, cu_seqlens=torch.tensor([0, 4]), output_final_state=True)
