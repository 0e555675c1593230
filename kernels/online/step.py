"""Decoding one token with an online memory: one gradient at the anchor, one update of the materialised weights."""

from __future__ import annotations

from torch import Tensor

from archspec.kernels.online.chunked import gradient_factors
from archspec.kernels.online.problem import OnlineState, Problem, Weights, product


def online_memory_step_form(problem: Problem, state: OnlineState) -> tuple[Tensor, OnlineState]:
    """Advance the memory by the problem's only token.

    Returns:
        o [B, H, 1, V] and the state after the token.
    """
    weights, anchor, momentum, phase = state
    anchor = weights if phase == 0 else anchor
    factors = gradient_factors(problem, {name: x.flatten(0, 1) for name, x in anchor.items()})
    after: Weights = {}
    moved: Weights = {}
    for name, weight in weights.items():
        rank_one = -factors[0][name].transpose(1, 2) * factors[1][name]  # [M, d_in, d_out]
        step = rank_one.view(weight.shape)
        if problem.shares is not None and momentum is not None:
            moved[name] = step if phase == 0 else momentum[name] + step
            after[name] = anchor[name] + problem.shares[phase] * moved[name]
            continue
        if momentum is not None and problem.momentum is not None:
            step = moved[name] = problem.momentum[name][:, :, 0] * momentum[name] + step
        if problem.reduce == "mean":
            start = anchor[name]
            after[name] = start + (phase * (weight - start) + step) / (phase + 1)
            continue
        alpha = None if problem.log_decay is None else problem.log_decay[name][:, :, 0].exp()
        if alpha is None:
            after[name] = weight + step
        else:
            after[name] = alpha * (weight + step) if problem.order == "step_first" else alpha * weight + step
    o = problem.network(product(after if problem.read == "after" else weights), problem.query)
    phase = (phase + 1) % problem.chunk_size
    return o, OnlineState(after, after if phase == 0 else anchor, None if momentum is None else moved, phase)
