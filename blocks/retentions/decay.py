"""Local and global l2 retention: the weights decay by a gate alpha before each increment."""

from __future__ import annotations

from archspec.families import Gate, Retention


class Decay(Retention, kind="decay"):
    """W_t from alpha W_{t-1}, alpha per head, key channel, value channel or state, constant or of the token.

    Source: Miras (arXiv:2504.13173), section 4, l2 retention; Gated DeltaNet (arXiv:2412.06464) for ``decay_first``.
    """

    gate: Gate

    @property
    def decay_gate(self) -> Gate | None:
        return self.gate
