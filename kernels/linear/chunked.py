"""Linear attention with diagonal decay in chunks of C tokens: plain torch, any device, differentiable.

With G the inclusive sum of log decays in a chunk and S_0 the state at its start (Yang et al. 2023,
arXiv:2312.06635, section 4, in log space):

    O   = scale * ((Q e^G) S_0 + A V),      A_ts = [s <= t] sum_k Q_tk K_sk e^(G_tk - G_sk)
    S_C = e^(G_C) S_0 + (K e^(G_C - G))^T V

Every exponent is at most zero. For a decay per head and token, A is one masked C x C product. For a decay per
channel, pairs (t, s) are sorted by the largest power of two w whose block boundary separates them inside a block
of 2w; both sides are scaled to that boundary, so level w is one product of (Q e_w) with (K e_w) and
e_w = e^(-|G - G_boundary|).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from archspec.kernels.backend import state_dtype

CHUNK_LENGTH = 64


def clamp_log_decay(g: Tensor) -> Tensor:
    """Raise g to where exp is exactly zero in its dtype: sums of -inf would differ by NaN.

    The gradient below that point is zero, as it is for exp(-inf).
    """
    return g.clamp(min=-800.0 if g.dtype == torch.float64 else -110.0)


def linear_attention_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence chunk by chunk; arguments and results as in the reference."""
    B, T, H, K = q.shape
    HV, V = v.shape[-2:]
    dtype = state_dtype(v)
    C = min(CHUNK_LENGTH, 1 << (T - 1).bit_length())
    groups = HV // H

    def chunks(x: Tensor) -> Tensor:
        """[B, T, HV, D] -> [B, HV, N, C, D], zeros after T: no write, no decay."""
        x = pad(x.to(dtype), (0, 0, 0, 0, 0, -T % C))
        return x.reshape(B, -1, C, HV, x.shape[-1]).movedim(3, 1)

    query = chunks(q.repeat_interleave(groups, dim=2)) * scale
    key = chunks(k.repeat_interleave(groups, dim=2))
    value = chunks(v)
    reads, writes, total = query, key, None
    if g is None:
        scores = (query @ key.mT).tril()
    else:
        log_decay = clamp_log_decay(g.to(dtype))
        sums = chunks(log_decay if g.ndim == 4 else log_decay[..., None]).cumsum(-2)
        scores = _scalar_scores(query, key, sums) if g.ndim == 3 else _channel_scores(query, key, sums)
        reads = query * sums.exp()
        writes = key * (sums[..., -1:, :] - sums).exp()
        total = sums[..., -1, :, None].exp()  # [B, HV, N, K or 1, 1]
    state = torch.zeros(B, HV, K, V, dtype=dtype, device=v.device)
    if initial_state is not None:
        state = initial_state.to(dtype)
    starts, state = _states(state, writes.mT @ value, total)
    o = scores @ value + reads @ starts  # [B, HV, N, C, V]
    o = o.movedim(1, 3).reshape(B, -1, HV, V)[:, :T]
    return o.to(v.dtype), state


def _states(state: Tensor, written: Tensor, total: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the state at every chunk's start [B, HV, N, K, V], and after the last chunk."""
    starts = []
    for n in range(written.shape[2]):
        starts.append(state)
        kept = state if total is None else total[:, :, n] * state
        state = kept + written[:, :, n]
    return torch.stack(starts, 2), state


def _scalar_scores(query: Tensor, key: Tensor, sums: Tensor) -> Tensor:
    """A for one decay a token; sums [B, HV, N, C, 1]."""
    seen = torch.ones(query.shape[-2], query.shape[-2], dtype=torch.bool, device=query.device).tril()
    exponents = torch.where(seen, sums - sums.mT, -torch.inf)  # masked before exp: no overflow above the diagonal
    return (query @ key.mT) * exponents.exp()


def _channel_scores(query: Tensor, key: Tensor, sums: Tensor) -> Tensor:
    """A for a decay per key channel; sums [B, HV, N, C, K], C a power of two."""
    C = query.shape[-2]
    row = torch.arange(C, device=query.device)
    scores = torch.diag_embed((query * key).sum(-1))  # a token reads its own write undecayed
    width = 1
    while width < C:
        late = (row // width) % 2 == 1  # in the second half of a block of 2 * width
        boundary = sums.index_select(-2, row // (2 * width) * (2 * width) + width - 1)
        decay = torch.where(late[:, None], sums - boundary, boundary - sums).exp()
        pairs = late[:, None] & ~late & (row[:, None] // (2 * width) == row // (2 * width))
        scores = scores + torch.where(pairs, (query * decay) @ (key * decay).mT, 0.0)
        width *= 2
    return scores
