"""The tokens themselves: a growing (or sliding) store of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from archspec.component import Count, Integer
from archspec.errors import UnsupportedError
from archspec.families import Linear, Memory, Scale
from archspec.initial import Parameters
from archspec.shapes import HeadDims

if TYPE_CHECKING:
    from torch import Tensor


class Kv(Memory, kind="kv"):
    """Every key and value, or the last ``window`` tokens of them, the current one included, and a few older ones.

    Args:
        scale: the factor on q . k inside the softmax; ``rsqrt`` is K^-1/2.
        window: how many tokens are kept; absent keeps all.
        sinks: the first tokens of the sequence stay, however far the window is (learned ones under ``prefix`` count).
        stride: beyond the window, tokens stride - 1, 2 stride - 1, .. of the sequence, counted from 0, stay.
        top_k: of the tokens that are seen, a query reads those with its this many highest scores (ties included).
        cache: ``tokens``; or ``statistics``, the running maximum, weight and weighted value in their place, which will
            do when the scores do not depend on who reads: a query that is the same for every token (Aaren).

    Source: Vaswani et al. (arXiv:1706.03762); the window, Longformer (arXiv:2004.05150); sinks, StreamingLLM
    (arXiv:2309.17453); stride, sparse transformers (arXiv:1904.10509); top_k, arXiv:1912.11637, equation 3.
    """

    scale: Scale = None
    window: Count | None = None
    sinks: Annotated[Integer, Field(ge=0)] = 0
    stride: Count | None = None
    top_k: Count | None = None
    cache: Literal["tokens", "statistics"] = "tokens"

    grows: ClassVar[bool] = True

    @model_validator(mode="after")
    def _has_a_window_to_look_beyond(self) -> Kv:
        written = self.departures(("sinks", "stride"))
        if written and self.window is None:
            raise PydanticCustomError(
                "kv_window",
                "without a window every token is seen: remove {names}, or add 'window' (1 is the token itself).",
                {"names": ", ".join(written)},
            )
        return self

    @property
    def sparse(self) -> bool:
        """Whether tokens beyond the window are seen."""
        return self.sinks > 0 or self.stride is not None

    def weights(self, dims: HeadDims) -> Mapping[str, tuple[int, int]]:
        return {}

    def initial(self, dims: HeadDims) -> Parameters:
        return {}

    def network(self, linear: Linear, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        raise UnsupportedError("memory kv: it stores tokens, not weights; use update 'nonparametric'.")

    def temperature(self, dims: HeadDims) -> float:
        """Return the factor on q . k inside the softmax."""
        return dims.key_dim**-0.5 if self.scale is None else self.scale
