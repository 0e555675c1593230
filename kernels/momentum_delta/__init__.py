"""Delta rules with momentum (rule family D+c): the public ops.

Covers Titans' long-term memory with a matrix as its network, gradients taken at every token's own weights.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from archspec.kernels.backend import check_floating, check_shape, default_scale, resolve_backend, state_dtype
from archspec.kernels.delta.checks import check_keys
from archspec.kernels.delta.inputs import check_order
from archspec.kernels.momentum_delta.chunked import momentum_delta_chunked
from archspec.kernels.momentum_delta.inputs import MomentumDeltaInputs, MomentumDeltaState, Order
from archspec.kernels.momentum_delta.reference import momentum_delta_reference
from archspec.kernels.momentum_delta.step import momentum_delta_rule_step

__all__ = ["MomentumDeltaState", "momentum_delta_rule", "momentum_delta_rule_step"]

_OP = "momentum_delta_rule"


def momentum_delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T HV V"],
    step: Float[Tensor, "B T HV"] | Float[Tensor, "B T HV K"],
    momentum: Float[Tensor, "B T HV"],
    g: Float[Tensor, "B T HV"] | Float[Tensor, " HV"] | None = None,
    scale: float | None = None,
    initial_state: MomentumDeltaState | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
    *,
    write_step: Float[Tensor, "B T HV"] | Float[Tensor, "B T HV K"] | None = None,
    read_key: Float[Tensor, "B T _ K"] | None = None,
    erase_key: Float[Tensor, "B T _ K"] | None = None,
    order: Order = "together",
) -> tuple[Float[Tensor, "B T HV V"], MomentumDeltaState | None]:
    """Run a linear memory that learns by gradient descent with momentum on 1/2 |S^T k - v|^2, one step a token.

    With a_t = exp g_t, W* = S_{t-1} (a_t S_{t-1} for ``decay_first``), read key p and erase key e (both k unless
    given), and write strength gamma (theta unless given):

        P_t = mu_t P_{t-1} - theta_t e_t (p_t^T W*) + gamma_t k_t v_t^T
        S_t = a_t S_{t-1} + P_t           or a_t (S_{t-1} + P_t) for ``step_first``
        o_t = scale * S_t^T q_t

    Source: Titans, arXiv:2501.00663, equations 9 and 10, for a matrix; there eta is our mu and 1 - alpha our a. That
    the chunkwise form is exact is a property of linear memories; chunked.py derives it.

    Args:
        q, k: queries and keys; each of the H heads serves HV / H value heads.
        v: values; HV is a multiple of H.
        step: theta, per token or per key channel.
        momentum: mu, per token; zero gives the delta rule.
        g: natural log of the decay, at most zero, -inf to forget all: per token, [HV] constant, or None for none.
        scale: factor on the read-out; K**-0.5 when None.
        initial_state: S_0 and P_0, [B, HV, K, V] each; zeros when None. Differentiable.
        output_final_state: whether to return the state after the last token.
        backend: "auto", "chunked" or "reference"; there is no Triton kernel.
        write_step: gamma; like step.
        read_key, erase_key: p and e, with H or HV heads.
        order: when the decay happens.

    Returns:
        o in v's dtype, and the final state (fp32, or fp64 for fp64 inputs), or None.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        UnsupportedError: an unknown order, or a backend that cannot serve these tensors.
    """
    inputs, sizes = _check(q, k, v, step, momentum, g, write_step, read_key, erase_key)
    check_order(_OP, order)
    form = resolve_backend(_OP, backend, v, has_triton=False)
    compute = momentum_delta_reference if form == "reference" else momentum_delta_chunked
    start = _start(initial_state, v, sizes)
    o, state = compute(inputs, default_scale(scale, sizes["K"]), order, start)
    return o, state if output_final_state else None


def _start(initial_state: MomentumDeltaState | None, v: Tensor, sizes: dict[str, int]) -> MomentumDeltaState:
    """Return a checked start state, zeros when there is none."""
    if initial_state is None:
        zeros = torch.zeros(*(sizes[a] for a in ("B", "HV", "K", "V")), dtype=state_dtype(v), device=v.device)
        return MomentumDeltaState(zeros, zeros)
    for name, x in zip(MomentumDeltaState._fields, initial_state, strict=True):
        check_shape(_OP, f"initial_state.{name}", x, "B HV K V", sizes)
        check_floating(_OP, v.device, **{f"initial_state.{name}": x})
    return MomentumDeltaState(*initial_state)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    momentum: Tensor,
    g: Tensor | None,
    write_step: Tensor | None,
    read_key: Tensor | None,
    erase_key: Tensor | None,
) -> tuple[MomentumDeltaInputs, dict[str, int]]:
    """Check shapes, dtypes and devices, and expand every head to HV."""
    strengths, others = {"step": step, "write_step": write_step}, {"momentum": momentum, "g": g}
    keys, sizes = check_keys(_OP, q, k, v, read_key, erase_key, strengths, others)
    check_shape(_OP, "momentum", momentum, "B T HV", sizes)
    if g is not None:
        check_shape(_OP, "g", g, "HV" if g.ndim == 1 else "B T HV", sizes)
        g = g.expand(sizes["B"], sizes["T"], sizes["HV"])
    inputs = MomentumDeltaInputs(keys.query, keys.key, v, step, momentum, g, write_step, keys.read_key, keys.erase_key)
    return inputs, sizes
