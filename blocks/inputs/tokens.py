"""Tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.ends import Input
from archspec.errors import ShapeError
from archspec.initial import Initial, Parameter, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class Tokens(Input, kind="tokens"):
    """Whole numbers [B, T] below the vocabulary's size, each with a learned vector."""

    def parameters(self, model_dim: int, vocab_size: int) -> Parameters:
        return {"weight": Parameter((vocab_size, model_dim), Initial(normal=model_dim**-0.5))}

    def embed(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        if x.ndim != 2 or x.is_floating_point() or x.is_complex():
            raise ShapeError(f"input: found {x.dtype} {list(x.shape)}; tokens are whole numbers [B, T].")
        return parameters["weight"][x]
