"""The scale of a quick search: what a model under 100k parameters learns in seconds on one core.

Measured with the models below, one thread, three seeds: recall (8 pairs, 32 tokens, vocabulary 32) in 512,000
tokens at rate 2e-3, accuracy 1.00, 11 core-seconds (the jump comes between 250k and 350k tokens; 300k tokens are
not enough for every seed); the same model without its mixers .06. Text (128 bytes) in 154,000 tokens at
rate 3e-3: 3.4 bits per byte, 5 core-seconds. With a short convolution on the queries, keys and values, which sees
the token before, recall needs 160,000 tokens at rate 3e-3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from archspec.search.recipe import Recipe
from archspec.search.tasks.recall import Recall
from archspec.search.tasks.text import TextModelling
from archspec.search.training import train

QUICK_RECALL = Recall(vocab_size=32, sequence_length=32, num_kv_pairs=8, random_non_queries=False)
QUICK_TEXT = TextModelling(sequence_length=128)


@dataclass
class Output:
    logits: Tensor
    state: None = None
    auxiliary_loss: None = None


class Attention(nn.Module):
    """Causal softmax attention with rotary positions."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, K]
        read = scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        joined: Tensor = self.out(read.transpose(1, 2).flatten(2))
        return joined


class Swiglu(nn.Module):
    """The feed-forward layer."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        mapped: Tensor = self.down(silu(gate) * value)
        return mapped


class Transformer(nn.Module):
    """Two blocks of width 64 with tied embeddings; without ``attention``, nothing passes between tokens."""

    def __init__(self, vocab_size: int, hidden_dim: int, attention: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 64)
        layers = [[Attention(64, 2)] * attention + [Swiglu(64, hidden_dim)] for _ in range(2)]
        self.layers = nn.ModuleList(layer for block in layers for layer in block)
        self.norms = nn.ModuleList(nn.RMSNorm(64) for _ in range(len(self.layers) + 1))
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.1)

    def forward(self, tokens: Tensor, state: None = None) -> Output:
        x = self.embedding(tokens)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x))
        return Output(self.norms[-1](x) @ self.embedding.weight.T)


def rotated(x: Tensor) -> Tensor:
    """Rotate pairs of channels of x [B, H, T, K] by angles that grow with the position."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 1e4 ** (-torch.arange(half) / half)  # [T, K / 2]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], -1)


def small(make: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    assert sum(parameter.numel() for parameter in make().parameters()) < 100_000
    return lambda seed: make()


@pytest.mark.slow
def test_attention_solves_the_quick_recall() -> None:
    recipe = Recipe(learning_rates=(2e-3,), batch_size=16, eval_tokens=8192)
    result = train(small(lambda: Transformer(32, 128)), QUICK_RECALL, recipe, 512_000, 0)
    assert result.test["recall/accuracy"] > 0.9


def test_without_memory_the_quick_recall_stays_at_chance() -> None:
    recipe = Recipe(learning_rates=(2e-3,), batch_size=16, eval_tokens=8192)
    result = train(small(lambda: Transformer(32, 128, attention=False)), QUICK_RECALL, recipe, 100_000, 0)
    # Sixteen values are possible: 1/16, with 2048 queries a standard error of .005.
    assert result.test["recall/accuracy"] == pytest.approx(1 / 16, abs=0.03)


def test_the_quick_text_is_learnt_below_four_and_a_half_bits() -> None:
    recipe = Recipe(learning_rates=(5e-3,), batch_size=4, eval_tokens=4096)
    result = train(small(lambda: Transformer(256, 96)), QUICK_TEXT, recipe, 40_000, 0)
    # Byte frequencies alone are worth 4.55 bits per byte on this text.
    assert 2.0 < result.test["text/bits_per_byte"] < 4.5
    assert math.isfinite(result.tokens_per_s)
