"""The element-wise functions a spec can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "linear": lambda x: x,
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "silu": functional.silu,
    # The tanh form: what Triton kernels and the published test-time memories compute.
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": functional.softplus,
    "softmax": lambda x: x.softmax(-1),
    "exp": torch.exp,
    "log_sigmoid": functional.logsigmoid,
}


def activate(name: str, x: Tensor) -> Tensor:
    """Return the named function of ``x``; ``softmax`` is over the last axis."""
    return _ACTIVATIONS[name](x)
