"""What one trial takes of a machine."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from archspec.component import Count, Number, Positive, StrictModel

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def _bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?I?)B?\s*", value.upper())
    if found is None or found[2] not in UNITS or not re.fullmatch(r"\d+(\.\d+)?", found[1]):
        raise PydanticCustomError("memory", "found {found}; required: bytes, such as 4GB or 512MiB.", {"found": value})
    return int(float(found[1]) * UNITS[found[2]])


class Resources(StrictModel):
    """What one trial takes, by which an executor counts how many fit on a machine.

    Args:
        cpus: cores; whole ones are also its threads.
        gpus: 1, or a fraction: trials share a GPU, each capped at that share of its memory. Default: 1 on a GPU.
        memory: bytes of main memory, or a text such as 4GB: what Ray sets aside; other executors do not.
    """

    cpus: Positive = 1.0
    gpus: Annotated[Number, Field(ge=0, le=1)] | None = None
    memory: Annotated[Count, BeforeValidator(_bytes)] | None = None

    @property
    def memory_fraction(self) -> float | None:
        """The share of a GPU's memory that a trial may take; None for all of it."""
        return self.gpus if self.gpus is not None and 0 < self.gpus < 1 else None

    def text(self) -> str:
        """Return what it takes, in words."""
        parts = [f"{self.cpus:g} CPUs"]
        parts += [f"{self.gpus:g} GPUs"] if self.gpus else []
        parts += [f"{self.memory:,} bytes of memory"] if self.memory else []
        return ", ".join(parts)
