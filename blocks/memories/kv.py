"""The tokens themselves: a growing (or sliding) store of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.component import Count
from archspec.errors import UnsupportedError
from archspec.families import Linear, Memory, Scale
from archspec.initial import Parameters
from archspec.shapes import HeadDims

if TYPE_CHECKING:
    from torch import Tensor


class Kv(Memory, kind="kv"):
    """Every key and value, or the last ``window`` tokens of them, the current one included.

    Args:
        scale: the factor on q . k inside the softmax; ``rsqrt`` is K^-1/2.
        window: how many tokens are kept; absent keeps all.

    Source: Vaswani et al. (arXiv:1706.03762); the window, Longformer (arXiv:2004.05150).
    """

    scale: Scale = None
    window: Count | None = None

    grows: ClassVar[bool] = True

    def weights(self, dims: HeadDims) -> Mapping[str, tuple[int, int]]:
        return {}

    def initial(self, dims: HeadDims) -> Parameters:
        return {}

    def network(self, linear: Linear, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        raise UnsupportedError("memory kv: it stores tokens, not weights; use update 'nonparametric'.")

    def temperature(self, dims: HeadDims) -> float:
        """Return the factor on q . k inside the softmax."""
        return dims.key_dim**-0.5 if self.scale is None else self.scale
