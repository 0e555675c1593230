"""What the tests of every kernel family share: comparing two forms in outputs and in every gradient."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

Op = Callable[..., Sequence[Tensor | None]]
Agree = Callable[..., None]
Errors = Callable[..., dict[str, float]]
Inputs = Callable[..., dict[str, Tensor]]
Check = Callable[..., None]

# fp64 carries 1.1e-16; sums over some hundred tokens, a triangular solve and the backward pass through both lose
# three to four digits (1e-12 is what is seen), and inputs of size one keep gradients away from cancellation.
RELATIVE_TOLERANCE = 1e-9

# RMS of the error over RMS of the exact result. Rounding of inputs is not counted (the exact result starts from the
# rounded inputs). bf16 has 8 bits: one rounding of a factor, of the scores and of the result give about 0.002
# together; gradients see about twice as many roundings. fp16 and tf32 have three bits more.
OUTPUT_TOLERANCE = 0.005
GRADIENT_TOLERANCE = 0.01
# fp32 under the interpreter is true fp32; log decays of -20 a token summed over a chunk lose four of its 24 bits.
FP32_TOLERANCE = 1e-4


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted| / |wanted| in the Frobenius norm, or |found| where zero is wanted."""
    return float((found - wanted).detach().norm()) / (float(wanted.detach().norm()) or 1.0)


@pytest.fixture
def agree() -> Agree:
    """Return a check that two forms of one op agree in every output and in the gradient of every input."""

    def check(
        fast: Op,
        slow: Op,
        inputs: Mapping[str, Tensor],
        tolerance: float = RELATIVE_TOLERANCE,
    ) -> None:
        leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
        found = [x for x in fast(**leaves) if x is not None]
        wanted = [x for x in slow(**leaves) if x is not None]
        assert [x.shape for x in found] == [x.shape for x in wanted]
        for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
            assert torch.isfinite(y).all()
            assert relative_error(x, y) < tolerance, f"output {i}"
        moving = [i for i, y in enumerate(wanted) if y.requires_grad]
        weights = [torch.randn(wanted[i].shape, dtype=wanted[i].dtype) for i in moving]
        results = [
            torch.autograd.grad([outs[i] for i in moving], list(leaves.values()), grad_outputs=weights)
            for outs in (found, wanted)
        ]
        for name, x, y in zip(leaves, *results, strict=True):
            assert torch.isfinite(y).all()
            assert relative_error(x, y) < tolerance, f"gradient of {name}"

    return check


@pytest.fixture(autouse=True)
def _give_memory_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test on a card, free what torch keeps for later: other processes test on the same card."""
    yield
    if request.node.get_closest_marker("gpu") is not None:
        gc.collect()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _nan_filled(on: bool) -> Iterator[None]:
    """While ``on``, new tensors hold NaN: torch's deterministic mode fills them."""
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def triton_errors() -> Errors:
    """Return a function that compares an op's Triton form with its chunkwise form in fp64."""

    def errors(op: Op, inputs: Mapping[str, Tensor], cu_seqlens: Sequence[int] | None = None) -> dict[str, float]:
        """RMS ratio of every output and gradient. Outputs start as NaN, so that one never written shows."""
        device, dtype = inputs["q"].device, inputs["q"].dtype
        offsets = None if cu_seqlens is None else torch.tensor(cu_seqlens, device=device)
        results: list[dict[str, Tensor]] = []
        for backend in ("triton", "chunked"):
            fast = backend == "triton"
            leaves = {name: (x if fast else x.double()).clone().requires_grad_() for name, x in inputs.items()}
            with _nan_filled(fast):
                outputs = op(**leaves, output_final_state=True, cu_seqlens=offsets, backend=backend)
                o, last = (x for x in outputs if x is not None)
                generator = torch.Generator(device).manual_seed(1)
                weights = [torch.randn(x.shape, generator=generator, device=device).to(dtype) for x in (o, last)]
                loss = sum((x * w.to(x.dtype)).sum() for x, w in zip((o, last), weights, strict=True))
                assert isinstance(loss, Tensor)
                gradients = torch.autograd.grad(loss, list(leaves.values()))
            results.append({"o": o, "last": last} | {f"d{n}": x for n, x in zip(leaves, gradients, strict=True)})
        return {name: relative_error(x.double(), results[1][name]) for name, x in results[0].items()}

    return errors


@pytest.fixture
def triton_agrees(triton_errors: Errors) -> Check:
    """Return a check that an op's Triton form is within its inputs' rounding of fp64, in outputs and gradients."""

    def check(op: Op, inputs: Mapping[str, Tensor], cu_seqlens: Sequence[int] | None = None) -> None:
        q = inputs["q"]
        interpreted = q.dtype == torch.float32 and q.device.type == "cpu"
        found = triton_errors(op, inputs, cu_seqlens)
        for name, error in found.items():
            rounding = GRADIENT_TOLERANCE if name.startswith("d") else OUTPUT_TOLERANCE
            assert error < (FP32_TOLERANCE if interpreted else rounding), f"{name}: {found}"

    return check


@pytest.fixture
def random_inputs() -> Inputs:
    """Return a function that draws q, k, v, an initial state, a decay and, for the delta rule, strengths."""

    def make(
        T: int, heads: tuple[int, int], dims: tuple[int, int], gate: str, dtype: torch.dtype, device: str,
        num_states: int, batch: int, *, strong: bool = False, rate: float = 0.0, delta: bool = False,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Random inputs in ``dtype`` (strengths, gates and state fp32).

        ``strong`` mixes decays to exp(-20) and alpha = 0, ``rate`` is the most that log decays fall by besides;
        ``delta`` gives unit keys and strengths up to 2.
        """
        generator = torch.Generator(device).manual_seed(T)
        real = functools.partial(torch.randn, generator=generator, device=device)
        (H, HV), (K, V) = heads, dims
        inputs = {"q": real(batch, T, H, K), "k": real(batch, T, H, K), "v": real(batch, T, HV, V)}
        if delta:
            inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
        inputs = {name: x.to(dtype) for name, x in inputs.items()}
        if delta:
            inputs["beta"] = 2 * torch.rand(batch, T, HV, generator=generator, device=device)
        inputs["initial_state"] = real(num_states, HV, K, V)
        shape = {"head": (HV,), "token": (batch, T, HV), "key": (batch, T, HV, K)}.get(gate)
        if shape is not None:
            g = torch.nn.functional.logsigmoid(real(*shape) + 3) / 4
            if rate:
                g = g - rate * torch.rand(*shape, generator=generator, device=device)
            if strong:
                g = g * torch.where(real(*shape) > 1, 80.0, 1.0)
                g = g.masked_fill(real(*shape) > 2, -torch.inf)
            inputs["g"] = g
        return inputs

    return make


@pytest.fixture
def fp32_is_close() -> Callable[[Op, Op, dict[str, Tensor]], None]:
    """Return a check that chunks in fp32 are close to the recurrence in fp64, whose inputs are given."""

    def check(chunked: Op, reference: Op, inputs: dict[str, Tensor]) -> None:
        exact, _ = reference(**inputs)
        o, state = chunked(**{name: x.float() for name, x in inputs.items()})
        assert o is not None
        assert exact is not None
        assert state is not None
        assert o.dtype == state.dtype == torch.float32
        # fp32 carries 6e-8; steps that together reflect the state carry errors on
        assert float((o.double() - exact).norm() / exact.norm()) < 1e-4

    return check


@pytest.fixture
def split_and_stepped() -> Callable[[Op, dict[str, Tensor]], None]:
    """Return a check that two stretches, and single tokens, compute what a whole sequence in fp64 does."""

    # Rounding differs with where the sequence is cut.
    near = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)

    def check(op: Op, inputs: dict[str, Tensor]) -> None:
        """``op`` returns the last state; all inputs but ``initial_state`` have time as their second axis."""
        state: Tensor | None = inputs.pop("initial_state")

        def run(tokens: slice, start: Tensor | None) -> tuple[Tensor, Tensor]:
            o, last = op(**{name: x[:, tokens] for name, x in inputs.items()}, initial_state=start)
            assert o is not None
            assert last is not None
            return o, last

        whole, last = run(slice(None), state)
        first, middle = run(slice(13), state)
        second, end = run(slice(13, None), middle)
        near(torch.cat([first, second], 1), whole)
        near(end, last)
        for t in range(whole.shape[1]):
            o, state = run(slice(t, t + 1), state)
            near(o[:, 0], whole[:, t])
        near(state, last)

    return check
