"""GPU and CPU kernels: one folder a rule family, each with a public op, a reference and its faster forms."""

from __future__ import annotations

import importlib
from typing import Any

if not __name__.startswith("archspec."):
    raise ImportError(
        f"imported as {__name__!r}; this folder is the package archspec.kernels: use `from archspec import kernels`"
    )

# Public name -> the family that defines it; loaded on first use, so that importing one op does not import all.
_FAMILIES = {
    "delta_rule": "delta",
    "delta_rule_step": "delta",
    "joint_delta_rule": "delta",
    "column_delta_rule": "delta",
    "windowed_delta_rule": "delta",
    "dplr_rule": "dplr",
    "dplr_rule_step": "dplr",
    "MomentumDeltaState": "momentum_delta",
    "momentum_delta_rule": "momentum_delta",
    "momentum_delta_rule_step": "momentum_delta",
    "OnlineState": "online",
    "online_memory": "online",
    "online_memory_step": "online",
    "diagonal_scan": "scan",
    "diagonal_scan_step": "scan",
    "KvCache": "softmax",
    "softmax_attention": "softmax",
    "softmax_attention_step": "softmax",
    "linear_attention": "linear",
    "linear_attention_step": "linear",
    "gated_product": "pointwise",
    "gated_rms_norm": "pointwise",
    "l2_norm": "pointwise",
    "log_decay": "pointwise",
    "short_convolution": "pointwise",
}

__all__ = sorted(_FAMILIES)


def __getattr__(name: str) -> Any:
    family = _FAMILIES.get(name)
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{family}"), name)
