"""No weights move: the tokens themselves are kept, and read by kernel regression (softmax attention)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, GetCoreSchemaHandler, model_validator
from pydantic_core import PydanticCustomError, core_schema

from archspec.component import also
from archspec.families import Gate, Part, Update


class Affine(Part):
    """Fit a plane around each query instead of a constant: o_t = min_b sum_j p_tj |v_j - b - A (k_j - q_t)|^2 + |A|^2.

    ``ridge`` weighs the last term, per head or key channel; the p_tj of a query sum to 1.
    """

    short_forms: ClassVar[tuple[dict[str, Any], ...]] = ({"const": "affine"},)

    kind: Literal["affine"] = "affine"
    ridge: Gate = Field(default_factory=lambda: Gate.parse(1.0))

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


class _Constant:
    """ "constant" means that no slope is fitted."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(
            lambda value: None if value == "constant" else value, handler(source)
        )

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: Any) -> dict[str, Any]:
        return also(handler(schema), {"const": "constant"})


class Nonparametric(Update, kind="nonparametric"):
    """o_t = sum_j p_tj v_j with p_t = softmax_j(scale q_t . k_j): kernel regression over what the memory keeps.

    Args:
        fit: ``constant`` (Nadaraya-Watson), or ``affine`` around each query: with kbar, vbar and C the means and
            covariances of keys and values under p_t,  o_t = vbar + C_vk (C_kk + ridge)^-1 (q_t - kbar).

    Source: Vaswani et al. (arXiv:1706.03762); as regression, Miras (arXiv:2504.13173), section 3. The affine fit: local
    linear attention (arXiv:2510.01450), whose weights are not divided by their sum, so that its ridge is that many
    times this one.
    """

    fit: Annotated[Affine | None, _Constant()] = None

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
