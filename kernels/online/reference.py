"""Online memories token by token with materialised weights: the family's oracle.

The meaning of ``online_memory`` written out (Titans, arXiv:2501.00663, equations 11 to 14; the chunk's shared anchor,
TTT, arXiv:2407.04620, section 2.4). Gradients come from automatic differentiation in the weights themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archspec.kernels.online.problem import OnlineState, Problem, Weights, product


def online_memory_reference(problem: Problem, state: OnlineState) -> tuple[Tensor, OnlineState]:
    """Run the recurrence one token at a time.

    Returns:
        o [B, H, T, V] and the state after the last token.
    """
    weights, anchor, momentum, phase = state
    outputs = []
    for token in problem.split([1] * problem.query.shape[2]):
        anchor = weights if phase == 0 else anchor
        steps = _steps(token, anchor)
        before = weights
        if problem.shares is not None and momentum is not None:
            sums = {name: torch.zeros_like(x) for name, x in momentum.items()} if phase == 0 else momentum
            momentum = {name: sums[name] + step for name, step in steps.items()}
            weights = {name: anchor[name] + problem.shares[phase] * total for name, total in momentum.items()}
        elif problem.reduce == "mean":
            weights = {
                name: anchor[name] + (phase * (weights[name] - anchor[name]) + step) / (phase + 1)
                for name, step in steps.items()
            }
        else:
            if momentum is not None and token.momentum is not None:
                gates = token.momentum
                steps = {name: gates[name][:, :, 0] * momentum[name] + step for name, step in steps.items()}
                momentum = steps
            weights = {name: _combine(token, name, weights[name], step) for name, step in steps.items()}
        phase = (phase + 1) % problem.chunk_size
        read_from = weights if problem.read == "after" else before
        outputs.append(problem.network(product(read_from), token.query))
    anchor = weights if phase == 0 else anchor
    return torch.cat(outputs, dim=2), OnlineState(weights, anchor, momentum, phase)


def _steps(token: Problem, anchor: Weights) -> Weights:
    """Return -theta dl/dW at the anchor by weight, [B, H, d_in, d_out]."""

    def network(weights: Weights) -> Tensor:
        return token.network(product(weights), token.key)

    pulled: Any = torch.func.vjp(network, anchor)
    prediction, pull = pulled
    if token.read_key is not None:
        prediction = token.network(product(anchor), token.read_key)
    gradients: Weights = pull(token.delta(prediction))[0]
    return {name: -token.step_size[name][:, :, 0] * x for name, x in gradients.items()}


def _combine(token: Problem, name: str, weight: Tensor, step: Tensor) -> Tensor:
    if token.log_decay is None:
        return weight + step
    alpha = token.log_decay[name][:, :, 0].exp()
    return alpha * (weight + step) if token.order == "step_first" else alpha * weight + step
