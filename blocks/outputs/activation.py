"""A function of every channel between the maps of an output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import Activation, OutputStage

if TYPE_CHECKING:
    from torch import Tensor


class ActivationOutput(OutputStage, kind="activation"):
    """f(y), channel by channel. Where a stage stands, the name of a function other than linear is short for it."""

    function: Activation

    def apply(self, y: Tensor, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        from archspec.blocks.activation import activate

        return activate(self.function, y)
