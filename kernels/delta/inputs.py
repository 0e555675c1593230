"""The checked tensors of one delta_rule call, and how they are cut along time."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Order = Literal["decay_first", "together", "step_first"]
"""Whether a token decays the memory before its step, in one sum with it, or after it."""


class DeltaInputs(NamedTuple):
    """Tensors of a delta_rule call with every key head expanded to HV.

    q, k, read_key, erase_key [B, T, HV, K]; v [B, T, HV, V]; beta, write_beta [B, T, HV] or [B, T, HV, K]; g log
    decay [B, T, HV] or [B, T, HV, K]. ``None`` stands for: k, for the two keys; beta, for write_beta; no decay.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor | None
    write_beta: Tensor | None
    read_key: Tensor | None
    erase_key: Tensor | None

    def at(self, tokens: slice) -> DeltaInputs:
        """Return the inputs of some tokens."""
        return DeltaInputs(*(None if x is None else x[:, tokens] for x in self))  # type: ignore[arg-type]
