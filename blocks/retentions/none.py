"""Nothing decays."""

from __future__ import annotations

from archspec.families import Retention


class NoRetention(Retention, kind="none"):
    """W_t = W_{t-1} + increment: alpha = 1."""
