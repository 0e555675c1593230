"""Measured cost of a compiled module: time of a training step, of a prefill, of a decoded token; peak memory.

Times are wall-clock medians after warm-up, with the 20th and 80th percentiles as spread; on CUDA they are taken
between events, with the device idle before each repeat. They are measurements: two runs differ, and no seed fixes them.

Peak memory is that of one training step, forward and backward: parameters, buffers, gradients and activations,
without optimizer state. On CUDA it is the allocator's peak. On a CPU there is no allocator to ask (the resident size
counts what the allocator keeps for later), so the bytes of every live storage that an operation returns are summed,
forward and backward, and the largest sum is reported. That is exact and repeatable, but leaves out scratch space
inside an operation.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from archspec.search.families import ModelFactory
from archspec.search.recipe import Recipe

DECODED_TOKENS = 16  # per repeat of the decoding measurement
LEAST_REPEATS = 3


class Measured(BaseModel):
    """Repeated measurements of one quantity: their median, 20th and 80th percentile, and number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    median: float
    p20: float
    p80: float
    repeats: int


class Cost(BaseModel):
    """What a module costs on one machine; the unit is in each name.

    Args:
        train_step_ms: forward and backward of batch_size sequences of sequence_length tokens.
        prefill_ms: forward without gradients of the same batch.
        decode_ms_per_token: one ``step`` for decode_batch_size sequences, after sequence_length tokens.
        peak_memory_bytes: of one training step; see the module's docstring.
        device: the GPU's name, or ``cpu``.
        threads: torch's intra-operation threads.
        precision: fp32 or bf16 (autocast).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    train_step_ms: Measured
    prefill_ms: Measured
    decode_ms_per_token: Measured
    peak_memory_bytes: Measured
    device: str
    threads: int
    precision: str
    batch_size: int
    sequence_length: int
    decode_batch_size: int

    def figures(self) -> dict[str, float]:
        """Return the median of every quantity by its name, for objectives and constraints."""
        return {
            name: measured.median
            for name in type(self).model_fields
            if isinstance(measured := getattr(self, name), Measured)
        }


def measure_cost(
    model_factory: ModelFactory,
    vocab_size: int,
    *,
    batch_size: int = 8,
    sequence_length: int = 128,
    decode_batch_size: int = 1,
    device: torch.device | str = "cpu",
    precision: str = "auto",
    repeats: int = 10,
    warmup: int = 2,
    limit_s: float = 10.0,
    seed: int = 0,
) -> Cost:
    """Build the model and measure it.

    Args:
        model_factory: builds the model from a seed.
        vocab_size: the range of the random tokens it reads.
        batch_size, sequence_length: B and T of the training step and the prefill.
        decode_batch_size: sequences decoded side by side.
        device, precision: where and in what; precision as in ``Recipe``.
        repeats, warmup: measured and unmeasured repeats of each quantity.
        limit_s: stop repeating a quantity after this time, at three repeats or more.
        seed: of the model and the tokens.
    """
    device = torch.device(device)
    torch.manual_seed(seed)
    model = model_factory(seed).to(device)
    autocast = Recipe.model_validate({"precision": precision}).autocast(device)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (batch_size, sequence_length), generator=generator).to(device)

    train_step = _train_step(model, tokens, autocast)

    @torch.no_grad()
    def prefill() -> None:
        with autocast:
            model(tokens)

    def repeated(action: Callable[[], None]) -> Measured:
        return _summary(_times_ms(action, device, repeats, warmup, limit_s))

    model.train()
    train_step_ms = repeated(train_step)
    peak_memory_bytes = _summary([_peak_memory(train_step, model, tokens) for _ in range(LEAST_REPEATS)])
    model.eval()
    prefill_ms = repeated(prefill)
    decode = _decoder(model, tokens[:1].expand(decode_batch_size, -1), autocast)
    return Cost(
        train_step_ms=train_step_ms,
        prefill_ms=prefill_ms,
        decode_ms_per_token=_scaled(repeated(decode), 1 / DECODED_TOKENS),
        peak_memory_bytes=peak_memory_bytes,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        precision="bf16" if autocast._enabled else "fp32",
        batch_size=batch_size,
        sequence_length=sequence_length,
        decode_batch_size=decode_batch_size,
    )


def _train_step(model: nn.Module, tokens: Tensor, autocast: torch.autocast) -> Callable[[], None]:
    """Return what takes one forward and backward pass."""

    def step() -> None:
        with autocast:
            output = model(tokens)
        loss = cross_entropy(output.logits.float().flatten(0, 1), tokens.flatten())
        if output.auxiliary_loss is not None:
            loss = loss + output.auxiliary_loss
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    return step


def _decoder(model: nn.Module, prompt: Tensor, autocast: torch.autocast) -> Callable[[], None]:
    """Return what decodes ``DECODED_TOKENS`` tokens after the prompt, from the same state each time."""
    with torch.no_grad(), autocast:
        state = model(prompt).state

    @torch.no_grad()
    def decode() -> None:
        current = state
        with autocast:
            for place in range(DECODED_TOKENS):
                current = model.step(prompt[:, place % prompt.shape[1]], current).state  # type: ignore[operator]

    return decode


def _times_ms(
    action: Callable[[], None], device: torch.device, repeats: int, warmup: int, limit_s: float
) -> list[float]:
    times: list[float] = []
    started = time.perf_counter()
    for number in range(warmup + repeats):
        elapsed = _time_ms(action, device)
        if number >= warmup:
            times.append(elapsed)
        if len(times) >= LEAST_REPEATS and time.perf_counter() - started > limit_s:
            break
    return times


def _time_ms(action: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        start.record()
        action()
        stop.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(stop))
    started = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - started)


def _peak_memory(action: Callable[[], None], model: nn.Module, tokens: Tensor) -> float:
    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)
        torch.cuda.reset_peak_memory_stats(tokens.device)
        action()
        return float(torch.cuda.max_memory_allocated(tokens.device))
    held = [*model.parameters(), *model.buffers(), tokens]
    with _LiveBytes(held) as live:
        action()
    return float(live.peak)


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of live storages: those given at the start, and every one an operation returns."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: set[int] = set()
        self.now = self.peak = 0
        for tensor in held:
            self._hold(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._hold(leaf)
        return result

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        self.live.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size


def _summary(values: Sequence[float]) -> Measured:
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    p20, median, p80 = quantiles.tolist()
    return Measured(median=median, p20=p20, p80=p80, repeats=len(values))


def _scaled(measured: Measured, factor: float) -> Measured:
    return Measured(
        median=measured.median * factor,
        p20=measured.p20 * factor,
        p80=measured.p80 * factor,
        repeats=measured.repeats,
    )
