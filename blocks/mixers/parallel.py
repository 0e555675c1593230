"""Several mixers side by side on the same input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from archspec.component import Text
from archspec.composition import Mixer, Path, Prefixed
from archspec.initial import FAN_IN, Parameter, Parameters

if TYPE_CHECKING:
    from torch.nn import Module

Combine = Literal["sum", "mean", "product", "gated", "concat"]


class Parallel(Prefixed, kind="parallel"):
    """Several mixers read the same tokens; their outputs y_1, ..., y_n [B, T, D] become one.

    Args:
        of: the mixers, by names that only tell them apart.
        combine: ``sum`` and ``mean`` of the outputs; ``product`` of their channels (memory as a gate: Titans,
            arXiv:2501.00663, section 4.2); ``gated`` sum_i g_i y_i with (g_1, ..., g_n) = softmax(x W), one number
            for each token and mixer; ``concat`` [y_1, ..., y_n] W.
    """

    of: dict[Text, Mixer] = Field(min_length=1)
    combine: Combine = "sum"

    def children(self) -> Mapping[Path, Mixer]:
        return {("of", name): mixer for name, mixer in self.of.items()}

    def instances(self) -> Mapping[Path, Mixer]:
        # By number: names are free, and must change neither what is drawn at the start nor where state is kept.
        return {("of", index): mixer for index, mixer in enumerate(self.of.values())}

    def own_parameters(self, model_dim: int) -> Parameters:
        found = {}
        if self.combine == "gated":
            found["weight"] = Parameter((model_dim, len(self.of)), FAN_IN, decayed=True)
        elif self.combine == "concat":
            found["weight"] = Parameter((model_dim * len(self.of), model_dim), FAN_IN, decayed=True)
        return {**found, **super().own_parameters(model_dim)}

    def normal_form(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Names and order say nothing; a sum, mean or product of one mixer is that mixer."""
        mixers = sorted(plain["of"].values(), key=repr)
        if len(mixers) == 1 and not self.prefix and self.combine in ("sum", "mean", "product"):
            only: dict[str, Any] = mixers[0]
            return only
        return {**plain, "of": mixers}

    def summary(self) -> str:
        return f"parallel: {self.combine} of {', '.join(self.of)}{self.behind()}"

    def build(self, instances: Mapping[Path, Module], path: str, model_dim: int, depth: tuple[int, int]) -> Module:
        from archspec.blocks.composition import ParallelModule

        return ParallelModule(self.combine, list(instances.values()), self.own_parameters(model_dim))
