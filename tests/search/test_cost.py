"""Measured cost: memory counted exactly, times in the right order, and everything needed to read them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from archspec.search.cost import DECODED_TOKENS, Cost, _LiveBytes, _summary, measure_cost

VOCAB = 32


@dataclass
class Output:
    logits: Tensor
    state: Tensor | None
    auxiliary_loss: Tensor | None = None


class Averager(nn.Module):
    """Logits from the running sum of embeddings; ``pause_s`` makes a step as slow as one likes."""

    def __init__(self, dim: int, pause_s: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, dim)
        self.output = nn.Linear(dim, VOCAB, bias=False)
        self.pause_s = pause_s
        self.steps = 0

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> Output:
        sums = self.embedding(tokens).cumsum(1)
        return Output(self.output(sums), sums[:, -1])

    def step(self, token: Tensor, state: Tensor) -> Output:
        assert token.shape == (len(state),)
        self.steps += 1
        time.sleep(self.pause_s)
        sums = state + self.embedding(token)
        return Output(self.output(sums), sums)


def test_live_bytes_of_a_chain_are_the_closed_form() -> None:
    start = torch.zeros(1000)  # 4000 bytes
    with _LiveBytes([start]) as live:
        first = start + 1  # 8000
        second = first + 1  # 12000
        view = second.view(10, 100)  # a view holds no new bytes
        del first  # 8000
        third = view * 2  # 12000
    assert live.peak == 12_000
    assert live.now == 12_000
    del second, view, third
    assert live.now == 4000


def test_peak_memory_is_exact_and_repeats() -> None:
    costs = [
        measure_cost(lambda seed: Averager(64), VOCAB, batch_size=4, sequence_length=16, repeats=3) for _ in range(2)
    ]
    peak = costs[0].peak_memory_bytes
    assert peak == costs[1].peak_memory_bytes
    assert peak.p20 == peak.median == peak.p80
    parameters = 2 * VOCAB * 64 * 4
    # At least the parameters, their gradients, the logits with their gradient, and the sums kept for the backward.
    assert peak.median > 2 * parameters + 2 * 64 * VOCAB * 4 + 64 * 64 * 4
    assert peak.median < 4 * (2 * parameters + 2 * 64 * VOCAB * 4 + 64 * 64 * 4)


def test_memory_grows_with_the_batch_and_time_with_the_work() -> None:
    small = measure_cost(lambda seed: Averager(32), VOCAB, batch_size=2, sequence_length=16, repeats=5)
    large = measure_cost(lambda seed: Averager(512), VOCAB, batch_size=64, sequence_length=256, repeats=5)
    assert large.peak_memory_bytes.median > 64 * small.peak_memory_bytes.median
    assert large.train_step_ms.median > small.train_step_ms.median
    assert large.train_step_ms.median > large.prefill_ms.median


def test_decoding_is_timed_per_token() -> None:
    built: list[Averager] = []

    def make(seed: int) -> nn.Module:
        built.append(Averager(16, pause_s=2e-3))
        return built[-1]

    cost = measure_cost(make, VOCAB, decode_batch_size=3, repeats=4, warmup=1)
    assert built[0].steps == 5 * DECODED_TOKENS
    assert 2.0 <= cost.decode_ms_per_token.median < 20.0  # 2 ms of sleep in each step; the rest is slack for a busy CPU


def test_a_slow_model_is_repeated_three_times_only() -> None:
    cost = measure_cost(lambda seed: Averager(16, pause_s=1e-3), VOCAB, repeats=50, limit_s=0.0)
    assert cost.decode_ms_per_token.repeats == 3


def test_cost_says_where_it_was_measured_and_survives_json() -> None:
    cost = measure_cost(lambda seed: Averager(16), VOCAB, batch_size=2, sequence_length=8, repeats=3)
    assert (cost.device, cost.threads, cost.precision) == ("cpu", torch.get_num_threads(), "fp32")
    assert (cost.batch_size, cost.sequence_length, cost.decode_batch_size) == (2, 8, 1)
    assert Cost.model_validate_json(cost.model_dump_json()) == cost
    assert set(cost.figures()) == {"train_step_ms", "prefill_ms", "decode_ms_per_token", "peak_memory_bytes"}
    assert cost.figures()["prefill_ms"] == cost.prefill_ms.median


def test_spread_is_the_20th_and_80th_percentile() -> None:
    measured = _summary([5.0, 1.0, 2.0, 4.0, 3.0, 0.0])
    assert (measured.p20, measured.median, measured.p80, measured.repeats) == pytest.approx((1.0, 2.5, 4.0, 6))


@pytest.mark.gpu
def test_a_gpu_reports_its_name_its_allocator_peak_and_bf16() -> None:
    cost = measure_cost(lambda seed: Averager(256), VOCAB, batch_size=32, sequence_length=512, device="cuda")
    assert cost.device == torch.cuda.get_device_name()
    assert cost.precision == "bf16"
    # The running sums, 32 * 512 * 256 numbers of at least two bytes, are kept for the backward pass.
    assert cost.peak_memory_bytes.median > 32 * 512 * 256 * 2
    assert 0 < cost.decode_ms_per_token.median < cost.train_step_ms.median * 100
