"""Diagonal plus low-rank recurrences (rule family P): the public ops.

Covers RWKV-7 and every rule of one erasing and one writing rank-one term behind a diagonal decay; the delta rules
of archspec.kernels.delta are its special cases and share its chunkwise engine.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from archspec.kernels.backend import (
    check_cu_seqlens,
    check_floating,
    check_groups,
    check_shape,
    default_scale,
    resolve_backend,
)
from archspec.kernels.dplr.chunked import dplr_chunked
from archspec.kernels.dplr.inputs import (
    DplrInputs,
    check_same_dtype,
    check_tokens,
    expand_gate,
    expand_heads,
    run_sequences,
)
from archspec.kernels.dplr.reference import dplr_reference
from archspec.kernels.dplr.step import dplr_rule_step

__all__ = ["dplr_rule", "dplr_rule_step"]

_OP = "dplr_rule"


def dplr_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T HV V"],
    a: Float[Tensor, "B T H K"] | Float[Tensor, "B T HV K"],
    b: Float[Tensor, "B T H K"] | Float[Tensor, "B T HV K"],
    g: Float[Tensor, "*gate"] | None = None,
    scale: float | None = None,
    initial_state: Float[Tensor, "N HV K V"] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "..."] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T HV V"], Float[Tensor, "N HV K V"] | None]:
    """Run a linear memory whose transition is diagonal plus rank one.

        S_t = Diag(exp g_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,        o_t = scale * S_t^T q_t

    Source: arXiv:2503.14456 (RWKV-7), equation 17, where the state is our S transposed, a is minus the normalised
    removal key and b that key times the in-context learning rate. a reads the state before the token's decay.

    Args:
        q, k: queries and write keys; each of the H heads serves HV / H value heads.
        v: values; HV is a multiple of H.
        a: what the rank-one term reads, with H or HV heads.
        b: where the rank-one term writes, with H or HV heads.
        g: natural log of the decay, at most zero, -inf to forget all: [HV] constant per head, [B, T, HV] per token,
            [B, T, HV, K] per key channel, or None for no decay.
        scale: factor on the read-out; K**-0.5 when None (RWKV-7 itself reads with scale 1).
        initial_state: S_0 for each sequence; zeros when None. Differentiable.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [N + 1] offsets of N sequences packed along T, with B = 1.
        backend: "auto", "chunked" or "reference"; there is no Triton kernel.

    Returns:
        o in v's dtype, and the final state (fp32, or fp64 for fp64 inputs), or None.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        UnsupportedError: a backend that cannot serve these tensors.
    """
    sizes: dict[str, int] = {}
    check_shape(_OP, "q", q, "B T H K", sizes)
    check_shape(_OP, "k", k, "B T H K", sizes)
    check_shape(_OP, "v", v, "B T HV V", sizes)
    check_groups(_OP, sizes["H"], sizes["HV"])
    check_tokens(_OP, sizes["T"])
    for name, x in (("a", a), ("b", b)):
        check_shape(_OP, name, x, "B T H K" if x.ndim == 4 and x.shape[2] == sizes["H"] else "B T HV K", sizes)
    sizes["N"] = check_cu_seqlens(_OP, cu_seqlens, sizes["B"])
    if initial_state is not None:
        check_shape(_OP, "initial_state", initial_state, "N HV K V", sizes)
    check_floating(_OP, v.device, q=q, k=k, v=v, a=a, b=b, g=g, initial_state=initial_state)
    check_same_dtype(_OP, q=q, k=k, v=v, a=a, b=b)
    scale = default_scale(scale, sizes["K"])
    form = resolve_backend(_OP, backend, v, has_triton=False)
    compute = dplr_reference if form == "reference" else dplr_chunked

    def run(part: DplrInputs, start: Tensor | None) -> tuple[Tensor, Tensor]:
        return compute(part, scale, start)

    q, k, a, b = (expand_heads(x, sizes["HV"]) for x in (q, k, a, b))
    inputs = DplrInputs(q, k, v, a, b, expand_gate(_OP, g, sizes))
    return run_sequences(_OP, run, inputs, initial_state, output_final_state, cu_seqlens, sizes["T"])
