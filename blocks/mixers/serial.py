"""Several mixers one after another, without residuals in between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from archspec.composition import Mixer, Path, Prefixed

if TYPE_CHECKING:
    from torch.nn import Module


class Serial(Prefixed, kind="serial"):
    """y = f_n(... f_1(x)): each mixer reads what the one before it returns.

    Args:
        of: the mixers, the first to read first (memory as a layer: Titans, arXiv:2501.00663, section 4.3).
    """

    of: tuple[Mixer, ...] = Field(min_length=1)

    def children(self) -> Mapping[Path, Mixer]:
        return {("of", index): mixer for index, mixer in enumerate(self.of)}

    def normal_form(self, plain: dict[str, Any]) -> dict[str, Any]:
        """A series inside a series is part of it; a series of one mixer is that mixer."""
        mixers: list[dict[str, Any]] = []
        for mixer in plain["of"]:
            nested = mixer["kind"] == self.kind and not mixer["prefix"]
            mixers.extend(mixer["of"] if nested else [mixer])
        return mixers[0] if len(mixers) == 1 and not self.prefix else {**plain, "of": mixers}

    def summary(self) -> str:
        return f"serial: {len(self.of)} mixers, each reading the one before{self.behind()}"

    def build(self, instances: Mapping[Path, Module], path: str, model_dim: int, depth: tuple[int, int]) -> Module:
        from archspec.blocks.composition import SerialModule

        return SerialModule(list(instances.values()), self.own_parameters(model_dim))
