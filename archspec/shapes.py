"""Shapes and sizes shared by the whole package: the letters of the notation and the dimensions of a head.

Letters: B batch, T time, H heads, K key dim, V value dim, D model dim, C chunk length, N chunks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadDims:
    """Sizes of one memory mixer: what its components need to know to lay out their parameters.

    Args:
        model_dim: D, width of the residual stream.
        num_heads: H, number of memories side by side.
        key_dim: K, size of one head's key and query (after the feature map).
        value_dim: V, size of one head's value.
    """

    model_dim: int
    num_heads: int
    key_dim: int
    value_dim: int
