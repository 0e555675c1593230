"""Tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from archspec.ends import Input
from archspec.errors import ShapeError
from archspec.initial import Initial, Parameter, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class Tokens(Input, kind="tokens"):
    """Whole numbers [B, T] below the vocabulary's size, each with a learned vector.

    Args:
        scale: what vectors are multiplied by where they enter, not where they make logits: nothing, or sqrt(D), which
            makes them as large as codes of position (arXiv:1706.03762, section 3.4).
    """

    scale: Literal["none", "sqrt_dim"] = "none"

    def parameters(self, model_dim: int, vocab_size: int) -> Parameters:
        return {"weight": Parameter((vocab_size, model_dim), Initial(normal=model_dim**-0.5))}

    def embed(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        if x.ndim != 2 or x.is_floating_point() or x.is_complex():
            raise ShapeError(f"input: found {x.dtype} {list(x.shape)}; tokens are whole numbers [B, T].")
        embedded = parameters["weight"][x]
        return embedded * math.sqrt(embedded.shape[-1]) if self.scale == "sqrt_dim" else embedded

    def idle(self) -> tuple[str, ...]:
        return (*super().idle(), *(["scale"] if self.scale == "none" else []))
