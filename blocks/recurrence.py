"""The meaning of a spec's four choices, token by token: the specification that every faster form is tested against.

Per head, a memory M with dual weights Z and W = link(Z) (Miras, arXiv:2504.13173, section 3). At token t:

1. delta = bias.gradient(M(W*, p), v), W* the evaluation point: the anchor's weights, or the current ones, decayed
   before (``decay_first``) or not (``together``, ``step_first``);
2. the update rule turns dl/dW = J(k)^T delta into an increment U, J the Jacobian of M(W*, k) in W;
3. Z = alpha Z + U, or alpha (Z + U) for ``step_first``, and W = link(Z);
4. o = M(W, q).

Slow on purpose: only the components' own methods, in any dtype and differentiable in everything. One token of each
kind of memory is in ``descending`` (weights that move), ``attending`` (stored tokens), ``solving`` (exact regression).
"""

from __future__ import annotations

import torch
from torch import Tensor

from archspec.blocks.attending import attend
from archspec.blocks.descending import descend
from archspec.blocks.rule import MemoryState, Quantities, initial_state
from archspec.blocks.solving import solve
from archspec.rule import Rule


def recurrence(
    rule: Rule, quantities: Quantities, state: MemoryState | None = None, position: int = 0
) -> tuple[Tensor, MemoryState]:
    """Run the rule over a stretch of tokens.

    Args:
        rule: the four choices and the sizes.
        quantities: queries, keys, values and gates of T tokens.
        state: the state before the first of them; None is the start of a sequence.
        position: index of the first of them in its sequence; it sets the anchor's phase.

    Returns:
        The read-outs o [B, T, H, V] in the queries' dtype, and the state after the last token.
    """
    state = initial_state(rule, quantities) if state is None else dict(state)
    advance = attend if rule.memory.grows else solve if rule.update.solves else descend
    outputs = []
    for t in range(quantities.query.shape[1]):
        read, state = advance(rule, _token(quantities, t), state, position + t)
        outputs.append(read)
    return torch.stack(outputs, dim=1).to(quantities.query.dtype), state


def _token(quantities: Quantities, t: int) -> Quantities:
    """One token, in the layout [B, H, C, d] of memories; gates [B or 1, H, 1 or K, 1 or V]."""
    dtype, steps = quantities.state_dtype, quantities.steps

    def of(tensor: Tensor, count: int = 1) -> Tensor:
        return tensor[:, t * count : (t + 1) * count].transpose(1, 2).to(dtype)

    def at(path: str, gate: Tensor) -> Tensor:
        if path in quantities.stepped_gates and steps > 1 and gate.shape[1] > 1:
            return gate[:, t * steps : (t + 1) * steps].to(dtype)
        return gate[:, t if gate.shape[1] > 1 else 0].to(dtype)

    return Quantities(
        query=of(quantities.query),
        key=of(quantities.key, steps),
        value=of(quantities.value, steps),
        gates={path: at(path, gate) for path, gate in quantities.gates.items()},
        start=quantities.start,
        parameters={name: tensor.to(dtype) for name, tensor in quantities.parameters.items()},
        read_key=None if quantities.read_key is None else of(quantities.read_key),
        steps=steps,
    )
