"""Logits over the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.component import Flag
from archspec.ends import Head, projected, weights
from archspec.initial import Parameters

if TYPE_CHECKING:
    from torch import Tensor


class TokenHead(Head, kind="tokens"):
    """Logits [B, T, vocabulary] of the token that follows; ``tied`` uses the embedding's weights."""

    tied: Flag = True

    @property
    def reads_embedding(self) -> bool:
        return self.tied

    def parameters(self, model_dim: int, vocab_size: int) -> Parameters:
        return {} if self.tied else weights(model_dim, vocab_size)

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor], embedding: Tensor) -> Tensor:
        return x @ embedding.t() if self.tied else projected(x, parameters)

    def width(self, vocab_size: int) -> int:
        return vocab_size
