"""Causal softmax attention (rule family S): the public ops.

Covers softmax attention with all tokens or a sliding window, grouped heads, ALiBi and forgetting attention (a decay
of the scores), and continuation from a cache of keys and values.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from archspec.errors import ShapeError, UnsupportedError
from archspec.kernels.backend import (
    check_cu_seqlens,
    check_floating,
    check_shape,
    default_scale,
    packed_bounds,
    resolve_backend,
    run_packed,
    state_dtype,
)
from archspec.kernels.softmax.cache import AttentionInputs, KvCache
from archspec.kernels.softmax.chunked import softmax_attention_chunked
from archspec.kernels.softmax.reference import softmax_attention_reference
from archspec.kernels.softmax.step import softmax_attention_step

__all__ = ["KvCache", "softmax_attention", "softmax_attention_step"]

_OP = "softmax_attention"


def softmax_attention(
    q: Float[Tensor, "B T HQ K"],
    k: Float[Tensor, "B T HK K"],
    v: Float[Tensor, "B T HV V"],
    g: Float[Tensor, " HO"] | Float[Tensor, "B T HO"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    initial_state: KvCache | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "..."] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T HO V"], KvCache | None]:
    """Attend causally over all tokens so far, or over the last ``window`` of them.

        o_t = sum_j p_tj v_j,    p_t = softmax_j(scale q_t . k_j + sum_{j<i<=t} g_i),    t - window < j <= t

    Sources: arXiv:1706.03762, equation 1; the window, arXiv:2004.05150; a constant g per head is ALiBi,
    arXiv:2108.12409, g = -slope; one per token is forgetting attention, arXiv:2503.02130, equation 5.

    Args:
        q, k, v: queries, keys and values. HO is the largest of their numbers of heads, and the others divide it:
            with HQ > HK = HV, queries share keys and values; with HV > HQ = HK, values share weights.
        g: natural log of the decay of the scores, at most zero: [HO] constant per head, [B, T, HO] per token, or None.
        scale: factor on q . k; K**-0.5 when None.
        window: tokens that are seen, the current one included; None sees all.
        initial_state: what an earlier call returned.
        output_final_state: whether to return what later tokens may see: all tokens, or the last window - 1.
        cu_seqlens: [N + 1] offsets of N sequences packed along T, with B = 1 and without states.
        backend: "auto", "chunked" or "reference"; torch's fused attention serves the chunked form.

    Returns:
        o in v's dtype, and the cache or None.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        UnsupportedError: a backend that cannot serve these tensors, or states of packed sequences.
    """
    inputs = _check(q, k, v, g, window, initial_state)
    scale = default_scale(scale, q.shape[-1])
    check_cu_seqlens(_OP, cu_seqlens, q.shape[0])
    form = resolve_backend(_OP, backend, v, has_triton=False)
    compute = softmax_attention_reference if form == "reference" else softmax_attention_chunked
    if cu_seqlens is None:
        o, cache = compute(inputs, scale, window, initial_state)
        return o, cache if output_final_state else None
    if initial_state is not None or output_final_state:
        raise UnsupportedError(
            f"{_OP}: caches of packed sequences differ in length; leave out initial_state and output_final_state, "
            "or call once for each sequence."
        )

    def one(n: int, tokens: slice) -> tuple[Tensor, Tensor | None]:
        return compute(inputs.at(tokens), scale, window, None)[0], None

    return run_packed(packed_bounds(_OP, cu_seqlens, q.shape[1]), one)[0], None


def _check(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, window: int | None, cache: KvCache | None
) -> AttentionInputs:
    """Check shapes, dtypes and devices."""
    sizes: dict[str, int] = {}
    check_shape(_OP, "q", q, "B T HQ K", sizes)
    check_shape(_OP, "k", k, "B T HK K", sizes)
    check_shape(_OP, "v", v, "B T HV V", sizes)
    sizes["HO"] = max(sizes["HQ"], sizes["HK"], sizes["HV"])
    if any(sizes[name] < 1 or sizes["HO"] % sizes[name] for name in ("HQ", "HK", "HV")):
        found = ", ".join(f"{name} has {sizes[heads]}" for name, heads in (("q", "HQ"), ("k", "HK"), ("v", "HV")))
        raise ShapeError(f"{_OP}: {found} heads; the largest number must be a multiple of the others.")
    if sizes["T"] < 1:
        raise ShapeError(f"{_OP}: T=0; at least one token is required.")
    if window is not None and window < 1:
        raise ShapeError(f"{_OP}: window={window}; at least 1 (the token itself) is required, or None for all.")
    if g is not None:
        check_shape(_OP, "g", g, "HO" if g.ndim == 1 else "B T HO", sizes)
    check_floating(_OP, v.device, q=q, k=k, v=v, g=g)
    if q.dtype != v.dtype or k.dtype != v.dtype:
        raise ShapeError(f"{_OP}: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; one dtype is required.")
    if cache is not None:
        check_shape(_OP, "initial_state.keys", cache.keys, "B S HK K", sizes)
        check_shape(_OP, "initial_state.values", cache.values, "B S HV V", sizes)
        if (cache.log_decay is None) != (g is None):
            raise ShapeError(f"{_OP}: initial_state.log_decay and g must both be given, or neither.")
        if cache.log_decay is not None:
            check_shape(_OP, "initial_state.log_decay", cache.log_decay, "B S HO", sizes)
    gate = None if g is None else g.to(state_dtype(g)).expand(sizes["B"], sizes["T"], sizes["HO"])
    return AttentionInputs(q, k, v, gate)
