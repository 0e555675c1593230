"""The chunkwise form of diagonal plus rank-one recurrences, on which delta_rule and dplr_rule both run.

    S_t = Diag(exp g_t) S_{t-1} - b_t (a_t^T S_{t-1}) + k_t v_t^T,        o_t = S_t^T q_t

Inside a chunk with start state S_0, u_t = -a_t^T S_{t-1} collects what the rank-one part reads. Writing [x y] for
the decayed product of x's rows with y's columns (decay.py), restricted to earlier columns:

    U = -(I + [a b])^{-1} ((a e^{G-g}) S_0 + [a k] V)
    O = (q e^G) S_0 + [q b] U + [q k] V
    S_C = e^{G_C} S_0 + (b e^{G_C-G})^T U + (k e^{G_C-G})^T V

(the WY form; Yang et al. 2024, arXiv:2406.06484, with decay as in arXiv:2412.06464). U is affine in S_0, so every
chunk is an affine map of its start state: the maps of all chunks are computed together, the states follow by one
small product a chunk, and the outputs are again computed together. When one key erases and writes (b = k),
u_t = v_t - a_t^T S_{t-1} absorbs V and half of the products disappear.

A token may bring R such terms that do not see each other, sum over r of b_tr (v_tr - a_tr^T S_{t-1})^T. Products pair
reads with earlier tokens only, so the same formulas hold with R rows a token, their system block-triangular.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from archspec.kernels.dplr.decay import ChunkDecay


def default_chunk_length(device: torch.device) -> int:
    """Return the chunk length that costs least: the C x C products dominate on a CPU, launches on a GPU.

    Measured on one CPU core at K = V in {32, 64}: 32 beats 16 and 64 with every kind of decay.
    """
    return 32 if device.type == "cpu" else 64


def chunk_length(num_tokens: int, longest: int, *, power_of_two: bool) -> int:
    """Return C, at most ``longest``, that splits the tokens into the fewest chunks with the least padding.

    The halving of ``ChunkDecay`` for channel decays needs a power of two.
    """
    if power_of_two:
        return 1 << (min(longest, num_tokens) - 1).bit_length()
    num_chunks = -(-num_tokens // longest)
    return -(-num_tokens // num_chunks)


def chunk_recurrence(
    q: Tensor,
    a: Tensor,
    b: Tensor,
    k: Tensor | None,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    longest_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence above over whole sequences.

    Args:
        q, a, b, k: [M, T, K], M independent sequences; ``k=None`` stands for k = b.
        v: [M, T, V]. With R terms a token a and b are [M, T, R, K], v is [M, T, R, V] and k None.
        g: log decays [M, T, 1] or [M, T, K], or None.
        state: S_0 [M, K, V]; its dtype (fp32 or fp64) is the dtype of the computation.
        longest_chunk: C at most (rounded up to a power of two for channel decays); by default what is fastest, which
            has as many rows for any R.

    Returns:
        o [M, T, V] and the last state [M, K, V], both in the state's dtype.
    """
    M, T, _ = q.shape
    longest = longest_chunk or max(1, default_chunk_length(q.device) // (a.shape[2] if a.ndim == 4 else 1))
    C = chunk_length(T, longest, power_of_two=g is not None and g.shape[-1] != 1)
    dtype = state.dtype

    def split(x: Tensor) -> Tensor:
        padded = pad(x, (0, 0, 0, -T % C)) if T % C else x
        return padded.reshape(M, -1, C, x.shape[-1])

    def kinds(x: Tensor) -> Tensor:
        rows = x.to(dtype).unsqueeze(2) if x.ndim == 3 else x.to(dtype)
        cut = split(rows.flatten(2))
        return cut.view(*cut.shape[:3], *rows.shape[2:]).transpose(2, 3)  # [M, N, R, C, d]

    q = split(q.to(dtype))
    decay = ChunkDecay(None if g is None else split(g), dtype)
    if k is None:
        reads, outs, transition, written = _shared_key_maps(q, kinds(a), kinds(b), kinds(v), decay)
    else:
        a, b, k, v_rows = (split(x.to(dtype)) for x in (a, b, k, v))
        reads, outs, transition, written = _separate_key_maps(q, a, b, k, v_rows, decay)
    starts, state = _scan(transition, written, state)
    o = torch.baddbmm(outs.flatten(0, 1), reads.flatten(0, 1), starts.flatten(0, 1))
    return o.view(M, -1, o.shape[-1])[:, :T], state


def _solve(system: Tensor, right_side: Tensor) -> Tensor:
    """Return (I + system)^{-1} right_side for a strictly lower triangular system."""
    solved: Tensor = torch.linalg.solve_triangular(system, right_side, upper=False, unitriangular=True)
    return solved


def _shared_key_maps(q: Tensor, a: Tensor, b: Tensor, v: Tensor, decay: ChunkDecay) -> tuple[Tensor, ...]:
    """The affine maps of chunks whose keys erase and write: S_t = Diag(exp g) S + sum_r b_r (v_r^T - a_r^T S)."""
    K = q.shape[-1]
    products = decay.products(a, q, b)  # [M, N, R + 1, R, C, C]
    erase = products[:, :, :-1].permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)  # [M, N, C R, C R]
    read = products[:, :, -1].permute(0, 1, 3, 4, 2).flatten(3)  # [M, N, C, C R]
    solved = _solve(erase, _rows(torch.cat([-decay.apply_enter_before(a), v], dim=-1)))
    outs = read @ solved  # [M, N, C, K + V]
    written = _rows(decay.apply_leave(b)).transpose(-1, -2) @ solved  # [M, N, K, K + V]
    return _affine(decay.apply_enter(q), outs, written, decay, K)


def _rows(x: Tensor) -> Tensor:
    """Return [M, N, R, C, d] as rows, the R of a token one after another [M, N, C R, d]."""
    return x.transpose(2, 3).flatten(2, 3)


def _separate_key_maps(q: Tensor, a: Tensor, b: Tensor, k: Tensor, v: Tensor, decay: ChunkDecay) -> tuple[Tensor, ...]:
    """The affine maps of chunks with one key to erase (b) and another to write (k)."""
    K = q.shape[-1]
    keys = torch.stack([b, k], dim=2)  # [M, N, 2, C, K]
    products = decay.products(a[:, :, None], q, keys)
    (erase, met), (read_erased, read_written) = (products[:, :, kind].unbind(2) for kind in (0, 1))
    entered = decay.apply_enter_before(a[:, :, None])[:, :, 0]
    solved = _solve(erase, -torch.cat([entered, met @ v], dim=-1))
    direct = torch.cat([torch.zeros_like(a), v], dim=-1)
    outs = torch.cat([read_erased, read_written], dim=-1) @ torch.cat([solved, direct], dim=-2)
    left = decay.apply_leave(keys).flatten(2, 3)  # [M, N, 2 C, K]
    written = left.transpose(-1, -2) @ torch.cat([solved, direct], dim=-2)
    return _affine(decay.apply_enter(q), outs, written, decay, K)


def _affine(q: Tensor, outs: Tensor, written: Tensor, decay: ChunkDecay, K: int) -> tuple[Tensor, ...]:
    """Split the joint products into what multiplies the start state and what does not."""
    transition = written[..., :K]
    keep = torch.ones_like(transition[..., 0]) if decay.sums is None else decay.total.expand(transition.shape[:-1])
    return q + outs[..., :K], outs[..., K:], transition + torch.diag_embed(keep), written[..., K:]


def _scan(transition: Tensor, written: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the start state of every chunk [M, N, K, V] and the last state, S_n = P_n S_{n-1} + R_n."""
    starts = []
    for factor, term in zip(transition.unbind(1), written.unbind(1), strict=True):
        starts.append(state)
        state = torch.baddbmm(term, factor, state)
    return torch.stack(starts, dim=1), state
