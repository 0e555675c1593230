"""Each metric measures what its name says, on models whose answer is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from archspec.catalog import load_search
from archspec.component import FAMILIES
from archspec.errors import ArchspecError
from archspec.search.families import Metric, MetricContext
from archspec.search.metrics.hidden_covariance import HiddenCovariance, correlation_score
from archspec.search.metrics.memory_capacity import MemoryCapacity
from archspec.search.metrics.recall_at_init import RecallAtInit
from archspec.search.metrics.state_covariance import StateCovariance
from archspec.shapes import HeadDims

VOCAB = 64


@dataclass
class Mixer:
    """A memory of one kind, on 2 heads."""

    kind: str
    key_dim: int = 32
    value_dim: int = 32
    noise: Tensor = field(default_factory=lambda: torch.zeros(1))

    @property
    def dims(self) -> HeadDims:
        return HeadDims(model_dim=64, num_heads=2, key_dim=self.key_dim, value_dim=self.value_dim)

    def associate(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        if self.kind == "constant":
            return values.mean((0, 1), keepdim=True).expand(len(keys), queries.shape[1], -1, -1) + self.noise
        scores = torch.einsum("bmhk,bnhk->bhmn", queries, keys)
        if self.kind == "dictionary":  # the last pair with the key asked
            latest = torch.arange(keys.shape[1]) * 1e-3
            weights = torch.nn.functional.one_hot(
                (scores / keys.norm(dim=-1)[0, 0, 0] + latest).argmax(-1), keys.shape[1]
            )
        elif self.kind == "additive":
            weights = scores
        else:
            weights = (scores / math.sqrt(self.key_dim)).softmax(-1)
        return torch.einsum("bhmn,bnhv->bmhv", weights.to(values.dtype), values)


class Model(nn.Module):
    """Features by rule: a delay line, independent channels, correlated channels, or constants."""

    def __init__(self, rule: str, seed: int, mixers: Sequence[Mixer] = (), depth: int = 6, dim: int = 64) -> None:
        super().__init__()
        self.rule, self.depth, self.mixers = rule, depth, list(mixers)
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCAB, dim, generator=generator))
        self.mix = nn.Parameter(torch.randn(4, dim, generator=generator))

    def features(self, tokens: Tensor) -> list[Tensor]:
        if self.rule == "delay":
            padded = nn.functional.pad(tokens, (self.depth, 0))
            windows = padded.unfold(1, self.depth + 1, 1)  # [B, T, depth + 1], the last one is the current token
            return [nn.functional.one_hot(windows, VOCAB).float().flatten(2)]
        states = self.table[tokens]
        if self.rule == "noise":
            states = torch.randn(*tokens.shape, 64, generator=torch.Generator().manual_seed(0))
        if self.rule == "correlated":
            states = states[..., :4] @ self.mix + 0.1 * states
        if self.rule == "constant":
            states = torch.ones_like(states)
        return [states]

    def memory_states(self, tokens: Tensor) -> list[Tensor]:
        if self.rule == "memoryless":
            return []
        return [self.features(tokens)[0][:, -1], self.features(tokens)[0][:, 0]]

    def memory_mixers(self) -> list[Mixer]:
        return self.mixers


def context(rule: str = "noise", mixers: Sequence[Mixer] = (), depth: int = 6, dim: int = 64) -> MetricContext:
    return MetricContext(lambda seed: Model(rule, seed, mixers, depth, dim), VOCAB)


def value(metric: Metric, where: MetricContext) -> float:
    return metric.measure(where)[metric.kind]


@pytest.mark.parametrize("depth", [3, 8])
def test_memory_capacity_of_a_delay_line_is_the_number_of_lags_it_holds(depth: int) -> None:
    metric = MemoryCapacity(num_symbols=16)
    held = sum(lag <= depth for lag in metric.lags)
    # Lags beyond the line are decoded by chance: each accuracy has a standard error of sqrt(.0625 * .9375 / 1536).
    assert value(metric, context("delay", depth=depth)) == pytest.approx(held, abs=0.08)


@pytest.mark.parametrize("rule", ["noise", "memoryless", "constant"])
def test_memory_capacity_without_memory_is_chance(rule: str) -> None:
    # Ten lags, each with a standard error of sqrt(.0625 * .9375 / 1536) = .0062 in accuracy: 5 errors of the sum.
    assert value(MemoryCapacity(num_symbols=16), context(rule)) == pytest.approx(
        0, abs=5 * 0.0062 * math.sqrt(10) * 16 / 15
    )


def test_correlation_score_of_two_channels_is_the_closed_form() -> None:
    angle = math.acos(0.6)
    basis = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    states = basis @ torch.tensor([[1.0, math.cos(angle)], [0, math.sin(angle)]], dtype=torch.float64) + 7
    expected = -sum(math.log(1 + rho + 1e-5) + 1 / (1 + rho + 1e-5) for rho in (0.6, -0.6))
    assert correlation_score(states) == pytest.approx(expected, rel=1e-9)


def test_hidden_covariance_falls_with_correlation_and_with_collapse() -> None:
    metric = HiddenCovariance()
    independent, correlated, constant = (value(metric, context(rule)) for rule in ("noise", "correlated", "constant"))
    # Sampling spreads the eigenvalues by about sqrt(d / n) = .13 around 1, which costs d * .13^2 / 2 = .25.
    assert independent == pytest.approx(-32, abs=0.5)
    assert correlated < independent - 5
    assert constant == pytest.approx(-32 * (math.log(1e-5) + 1e5))


def test_hidden_covariance_refuses_models_narrower_than_its_projection() -> None:
    with pytest.raises(ArchspecError, match="model_dim=16 is under num_dims=32; lower num_dims"):
        HiddenCovariance().measure(context("plain", dim=16))


def test_state_covariance_ranks_states_like_hidden_covariance() -> None:
    metric = StateCovariance()
    order = [value(metric, context(rule)) for rule in ("noise", "correlated", "constant", "memoryless")]
    assert order[0] > order[1] > order[2] == order[3]


def test_recall_at_init_of_a_dictionary_is_one() -> None:
    assert value(RecallAtInit(), context(mixers=[Mixer("dictionary")])) == pytest.approx(1, abs=1e-6)


def test_recall_at_init_of_a_constant_memory_is_nil() -> None:
    # Cosines with independent values of 32 dimensions: sd 1/sqrt(32) each, over 8 sets of 4 to 64 pairs and 2 heads;
    # the mean of the values written keeps a cosine of 1/sqrt(2N) with each of them, hence the constant's noise.
    mixer = Mixer("constant", noise=1e3 * torch.randn(32, generator=torch.Generator().manual_seed(1)))
    assert value(RecallAtInit(), context(mixers=[mixer])) == pytest.approx(0, abs=0.05)


def test_recall_at_init_of_an_additive_memory_with_orthogonal_keys() -> None:
    metric = RecallAtInit(num_pairs=(2,), num_sets=64)
    found = value(metric, context(mixers=[Mixer("additive", key_dim=4096, value_dim=256)]))
    # Plain and distracted pairs come back; an overwritten one comes back as old + new, at cosine 1/sqrt(2).
    # Keys of 4096 dimensions overlap by 1/64, which costs a cosine of a few times 1/4096.
    assert found == pytest.approx((2 + math.sqrt(0.5)) / 3, abs=5e-3)


def test_recall_at_init_orders_memories() -> None:
    kinds = ["dictionary", "softmax", "additive", "constant"]
    scores = [value(RecallAtInit(), context(mixers=[Mixer(kind)])) for kind in kinds]
    assert scores == sorted(scores, reverse=True)
    both = value(RecallAtInit(), context(mixers=[Mixer("dictionary"), Mixer("additive")]))
    assert both == pytest.approx((scores[0] + scores[2]) / 2)
    assert value(RecallAtInit(), context(mixers=[])) == 0


def test_metrics_repeat_exactly_and_report_the_spread_over_seeds() -> None:
    mixers = [Mixer("softmax")]
    for metric in (MemoryCapacity(), HiddenCovariance(), StateCovariance(), RecallAtInit()):
        first, second = metric.measure(context("correlated", mixers)), metric.measure(context("correlated", mixers))
        assert first == second
        assert set(first) == {metric.kind, f"{metric.kind}_spread"}
    assert HiddenCovariance().measure(context("correlated"))["hidden_covariance_spread"] > 0


def test_models_are_built_once_per_seed() -> None:
    built: list[int] = []

    def make(seed: int) -> Model:
        built.append(seed)
        return Model("correlated", seed)

    where = MetricContext(make, VOCAB)
    for metric in (HiddenCovariance(), MemoryCapacity()):
        metric.measure(where)
    assert built == [0, 1, 2]


def test_controls_read_predicted_figures_and_say_what_is_missing() -> None:
    where = MetricContext(lambda seed: Model("noise", seed), VOCAB, {"state_size": 12})
    load_search()
    assert Metric.parse("state_size").measure(where) == {"state_size": 12.0}
    with pytest.raises(ArchspecError, match="metric flops_per_token: the context's figures are state_size"):
        Metric.parse("flops_per_token").measure(where)


def test_the_catalogue_finds_every_task_and_metric() -> None:
    load_search()
    assert {"recall", "text"} <= set(FAMILIES["task"].members)
    assert {
        "non_embedding_parameters",
        "flops_per_token",
        "state_size",
        "hidden_covariance",
        "state_covariance",
        "memory_capacity",
        "recall_at_init",
    } <= set(FAMILIES["metric"].members)
