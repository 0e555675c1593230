"""Clipping of a model's gradients, which remembers for a few steps where they were not finite.

One infinite gradient makes the norm of all infinite, so that clipping spreads it to every weight, and the loss of the
next step is not a number whatever the cause. Where it began can only be told from the norms before clipping.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn


class Gradients:
    """The gradients of a model.

    Args:
        model: whose parameters are trained.
        remembered: for how many steps the norms are kept; they stay on their device until somebody asks.
    """

    def __init__(self, model: nn.Module, remembered: int) -> None:
        self._named = tuple(model.named_parameters())
        self._kept: deque[tuple[int, list[str], Tensor]] = deque(maxlen=remembered)

    def clip(self, step: int, limit: float) -> None:
        """Scale all gradients down so that their common norm is at most ``limit``."""
        found = {name: parameter.grad for name, parameter in self._named if parameter.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(found.values())))  # one launch; what clip_grad_norm_ does, too
        nn.utils.clip_grads_with_norm_([each for _, each in self._named], limit, torch.linalg.vector_norm(norms))
        self._kept.append((step, list(found), norms))

    def overflow(self, step: int) -> str:
        """Say which parameters had no finite gradient after a step; empty when all had, or it is long ago."""
        for kept, names, norms in self._kept:
            finite = norms.isfinite().tolist()
            if kept == step and not all(finite):
                return _place([name for name, good in zip(names, finite, strict=True) if not good])
        return ""


def _place(names: list[str]) -> str:
    """Name the part nearest to the output, where a backward pass arrives first, and what of it is hit."""
    # A tied embedding gets its gradient last although its logits come first, and is hit by whatever is hit.
    part = _part(names[-1])
    own = [name for name in names if _part(name) == part]
    others = f" and {len(own) - 1} more of {part}" if len(own) > 1 else ""
    before = f", then of {len(names) - len(own)} parameters nearer to the input" if len(names) > len(own) else ""
    return f"{own[0]}{others}{before}"


def _part(name: str) -> str:
    """Return the layer of a parameter, as layers.2 of layers.2.mixer.output, or the module that owns it."""
    pieces = name.split(".")
    numbers = [index for index, piece in enumerate(pieces) if piece.isdigit()]
    return ".".join(pieces[: numbers[0] + 1] if numbers else pieces[:-1] or pieces)
