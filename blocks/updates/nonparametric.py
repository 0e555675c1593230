"""No weights move: the tokens themselves are kept, and read by kernel regression (softmax attention)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from archspec.families import Update


class Nonparametric(Update, kind="nonparametric"):
    """o_t = sum_j softmax_j(scale q_t . k_j) v_j: Nadaraya-Watson regression over what the memory keeps.

    Source: Vaswani et al. (arXiv:1706.03762); as regression, Miras (arXiv:2504.13173), section 3.
    """

    parametric: ClassVar[bool] = False

    @model_validator(mode="after")
    def _has_no_step(self) -> Nonparametric:
        written = self.departures(("step_size", "write_size", "anchor"))
        if written:
            raise PydanticCustomError(
                "nonparametric_step",
                "the nonparametric update takes no step: remove {names}.",
                {"names": ", ".join(written)},
            )
        return self
