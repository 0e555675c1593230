"""The decay of state-space models: exp(-rate * step), rate learned, step of the token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from archspec.families import Gate, Part, Per, gate_size, joint_granularity
from archspec.initial import Initial, Offset, Parameter, Parameters
from archspec.shapes import HeadDims

if TYPE_CHECKING:
    from torch import Tensor


class Rate(Part):
    """The learned rate A > 0, stored as its logarithm: per head unless it says otherwise."""

    per: Per = "head"
    init: Initial = Initial(uniform=(1.0, 16.0))

    @model_validator(mode="after")
    def _is_positive(self) -> Rate:
        if not self.init.is_positive:
            raise PydanticCustomError(
                "rate_law", "a rate is stored as its logarithm: its law must draw numbers above zero only."
            )
        return self


class Ssd(Gate, kind="ssd"):
    """alpha = exp(-A softplus(z)), A > 0 learned.

    Args:
        rate: where A varies and the law it starts from.
        step: a gate that takes the place of softplus(z) (name it under ``gates:`` to share it with the step size).

    Presets: ``gdn`` A ~ U(0, 16) per head (Gated DeltaNet, arXiv:2412.06464); ``kda`` per key channel with rank
    value_dim (Kimi Delta Attention, arXiv:2510.26692); ``s6`` per value channel, A per state from 1, 2, ... (Mamba,
    arXiv:2312.00752). The plain kind is Mamba-2's (arXiv:2405.21060).
    """

    rate: Rate = Rate()
    step: Gate | None = None
    offset: Offset = Initial(law="dt")

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gdn": {"rate": {"init": {"uniform": [0.0, 16.0]}}},
        "kda": {"per": "key", "rank": {"ratio": 1.0, "of": "value_dim"}},
        "s6": {
            "per": "value",
            "rank": {"ratio": 0.0625},
            "rate": {"per": "state", "init": {"arange": 1.0}},
        },
    }

    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    @property
    def has_source(self) -> bool:  # type: ignore[override]
        """With a step of its own, the gate reads no token: the step does."""
        return self.step is None

    @property
    def granularity(self) -> Per:
        return self.rate.per if self.step is not None else joint_granularity(self.per, self.rate.per)

    def parameters(self, dims: HeadDims) -> Parameters:
        shape = (dims.num_heads, *gate_size(self.rate.per, dims))
        return {"log_rate": Parameter(shape, self.rate.init, logarithm=True)}

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return self.log_value(z, known).exp()

    def log_value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return -known["log_rate"].exp() * self.token_step(z, known)

    def token_step(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """Return Delta, the token's step: softplus(z), or the gate named by ``step``."""
        from torch.nn.functional import softplus

        return known["step"] if "step" in known else softplus(z)
