"""Delta rules (rule family D): the public ops.

Covers DeltaNet, Gated DeltaNet (a scalar decay per token), KDA (a decay per key channel), Comba (a read key of its
own), RWKV-7 (read and erase keys, a strength per key channel) and, on an interleaved sequence, DeltaProduct. Losses
over a window of tokens are ``joint_delta_rule`` and ``windowed_delta_rule``, gates of value channels are
``column_delta_rule``.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from archspec.kernels.backend import check_cu_seqlens, check_floating, check_shape, default_scale, resolve_backend
from archspec.kernels.delta.checks import check_keys
from archspec.kernels.delta.chunked import delta_rule_chunked
from archspec.kernels.delta.columns import column_delta_rule
from archspec.kernels.delta.inputs import DeltaInputs, Order, check_order
from archspec.kernels.delta.joint import joint_delta_rule
from archspec.kernels.delta.reference import delta_rule_reference
from archspec.kernels.delta.step import delta_rule_step
from archspec.kernels.delta.windowed import windowed_delta_rule
from archspec.kernels.dplr.inputs import expand_gate, run_sequences

__all__ = ["column_delta_rule", "delta_rule", "delta_rule_step", "joint_delta_rule", "windowed_delta_rule"]

_OP = "delta_rule"


def delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T HV V"],
    beta: Float[Tensor, "B T HV"] | Float[Tensor, "B T HV K"],
    g: Float[Tensor, "*gate"] | None = None,
    scale: float | None = None,
    initial_state: Float[Tensor, "N HV K V"] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "..."] | None = None,
    backend: str = "auto",
    *,
    write_beta: Float[Tensor, "B T HV"] | Float[Tensor, "B T HV K"] | None = None,
    read_key: Float[Tensor, "B T _ K"] | None = None,
    erase_key: Float[Tensor, "B T _ K"] | None = None,
    order: Order = "decay_first",
) -> tuple[Float[Tensor, "B T HV V"], Float[Tensor, "N HV K V"] | None]:
    """Run a linear memory that replaces, at each key, what it predicts there by the value.

    With A_t = Diag(exp g_t), read key p, erase key e (both k unless given), write strength gamma (beta unless
    given), the step is ``D_t(S) = -beta_t e_t (p_t^T S) + gamma_t k_t v_t^T`` and

        decay_first   S_t = A_t S_{t-1} + D_t(A_t S_{t-1})      (Gated DeltaNet, KDA, Comba)
        together      S_t = A_t S_{t-1} + D_t(S_{t-1})          (RWKV-7, Titans, Miras)
        step_first    S_t = A_t (S_{t-1} + D_t(S_{t-1}))        (Miras, table 1)
        o_t = scale * S_t^T q_t

    Sources: arXiv:2102.11174, equation 24; with decay, arXiv:2412.06464, equation 10, where the state is our S
    transposed and alpha = exp(g).

    Args:
        q, k: queries and keys; each of the H heads serves HV / H value heads. Keys are usually L2-normalised: the
            transition contracts for beta |k|^2 in [0, 2].
        v: values; HV is a multiple of H.
        beta: strength of the step, per token or per key channel, in [0, 2].
        g: natural log of the decay, at most zero, -inf to forget all: [HV] constant per head, [B, T, HV] per token,
            [B, T, HV, K] per key channel, or None for no decay.
        scale: factor on the read-out; K**-0.5 when None.
        initial_state: S_0 for each sequence; zeros when None. Differentiable.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [N + 1] offsets of N sequences packed along T, with B = 1.
        backend: "auto", "triton", "chunked" or "reference".
        write_beta: strength of the write where it differs from the erasure's; like beta.
        read_key: the key the prediction is read at, with H or HV heads.
        erase_key: the key the prediction is erased along, with H or HV heads.
        order: when the decay happens.

    Returns:
        o in v's dtype, and the final state (fp32, or fp64 for fp64 inputs), or None.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        UnsupportedError: an unknown order, or a backend that cannot serve these tensors.
    """
    inputs, sizes = _check(q, k, v, beta, g, write_beta, read_key, erase_key)
    check_order(_OP, order)
    sizes["N"] = check_cu_seqlens(_OP, cu_seqlens, sizes["B"])
    if initial_state is not None:
        check_shape(_OP, "initial_state", initial_state, "N HV K V", sizes)
        check_floating(_OP, v.device, initial_state=initial_state)
    scale = default_scale(scale, sizes["K"])
    form = resolve_backend(_OP, backend, v, {"key_dim": sizes["K"], "value_dim": sizes["V"]}, _unserved(inputs, order))
    if form == "triton":
        from archspec.kernels.delta.fused import delta_rule_fused

        return delta_rule_fused(
            inputs.q, inputs.k, v, beta, inputs.g, scale, initial_state, output_final_state, cu_seqlens
        )
    compute = delta_rule_reference if form == "reference" else delta_rule_chunked

    def run(part: DeltaInputs, start: Tensor | None) -> tuple[Tensor, Tensor]:
        return compute(part, scale, start, order)

    return run_sequences(_OP, run, inputs, initial_state, output_final_state, cu_seqlens, sizes["T"])


def _unserved(inputs: DeltaInputs, order: Order) -> str | None:
    """Return what of a call the Triton kernel does not serve, or None."""
    if order != "decay_first":
        return f"order={order!r}"
    for name, x in (("write_beta", inputs.write_beta), ("read_key", inputs.read_key), ("erase_key", inputs.erase_key)):
        if x is not None:
            return f"a separate {name}"
    return "a beta per key channel" if inputs.beta.ndim == 4 else None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    write_beta: Tensor | None,
    read_key: Tensor | None,
    erase_key: Tensor | None,
) -> tuple[DeltaInputs, dict[str, int]]:
    """Check shapes, dtypes and devices, and expand every head to HV."""
    keys, sizes = check_keys(_OP, q, k, v, read_key, erase_key, {"beta": beta, "write_beta": write_beta}, {"g": g})
    gate = expand_gate(_OP, g, sizes)
    return DeltaInputs(keys.query, keys.key, v, beta, gate, write_beta, keys.read_key, keys.erase_key), sizes
