"""A gate without a squashing function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import Gate

if TYPE_CHECKING:
    from torch import Tensor


class Linear(Gate, kind="linear"):
    """z."""

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return z
