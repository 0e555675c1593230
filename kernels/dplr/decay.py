"""Decay inside a chunk: the factors and the decayed products that every chunkwise form of the family needs.

With log decays g and their inclusive sum G inside a chunk, a value written at token j and read at token i has
shrunk by ``exp(G_i - G_j)``, or by ``exp(G_i - g_i - G_j)`` when it is read before token i's own decay. Only
such differences are exponentiated, never ``exp(-G)``, which overflows: a log decay of -20 a token loses nothing,
and a decay of zero (g = -inf) gives exact zeros, in the gradients too.

Sums run in fp64 (where the device has it), so that the difference of two large sums keeps fp32 accuracy.

A decay per key channel cannot leave the product over keys. Its C x C matrix is built by halving: the lower left
quarter of a block pairs rows of its second half with columns of its first, and both sides are scaled towards
the boundary between them, which keeps both exponents at or below zero. Recursing on the two diagonal quarters
takes log2(C) batched products and no C x C x K tensor. On a CPU, where looking at values costs nothing, a call
whose decays over a whole chunk stay far from underflow scales both sides to the middle of the chunk instead, and
one product does, with exponents of at most half the chunk's decay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return fp64 where the tensor's device has it (Apple's GPUs do not), else fp32."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def clamp_log_decay(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Return g with values below the point where ``exp`` is exactly zero in ``dtype`` raised to that point.

    Differences of clamped sums are finite, where -inf minus -inf would be NaN. The gradient there is zero, as it
    is for ``exp`` itself.
    """
    return g.clamp(min=-800.0 if dtype == torch.float64 else -110.0)


class ChunkDecay:
    """The decay factors of all chunks of a sequence.

    Args:
        g: log decays [M, N, C, 1] (one per token), [M, N, C, K] (one per key channel), or None for no decay.
        dtype: what the factors are computed in: fp64 or fp32.

    Attributes:
        sums: G [M, N, C, 1 or K], or None without decay; the other attributes are then absent.
        own: ``exp(g)`` [M, N, C, 1 or K], each token's own decay.
        enter: ``exp(G)``, from the chunk's start to after each token's decay.
        enter_before: ``exp(G - g)``, from the chunk's start to before each token's decay.
        leave: ``exp(G_C - G)``, from each token to the chunk's end.
        total: ``exp(G_C)`` [M, N, 1 or K].
    """

    def __init__(self, g: Tensor | None, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.sums: Tensor | None = None
        if g is None:
            return
        g = clamp_log_decay(g, dtype)
        precise = g.to(sum_dtype(g))
        self.own = g.to(dtype).exp()
        self.sums = precise.cumsum(-2)
        self.sums_before = self.sums - precise
        last = self.sums[..., -1:, :]
        self.enter_before = self.sums_before.to(dtype).exp()
        self.enter = self.enter_before * self.own
        self.leave = (last - self.sums).to(dtype).exp()
        self.total = self.enter[..., -1, :]

    def apply_enter(self, x: Tensor) -> Tensor:
        """Return x [M, N, C, K] as seen from the chunk's start, after each token's decay."""
        return x if self.sums is None else x * self.enter

    def apply_enter_before(self, x: Tensor) -> Tensor:
        """Return r kinds of x [M, N, r, C, K] as seen from the chunk's start, before each token's decay."""
        return x if self.sums is None else x * self.enter_before[:, :, None]

    def apply_leave(self, x: Tensor) -> Tensor:
        """Return w kinds of x [M, N, w, C, K] as seen from the chunk's end."""
        return x if self.sums is None else x * self.leave[:, :, None]

    def products(self, before: Tensor, after: Tensor, writes: Tensor) -> Tensor:
        """Return the decayed products of r + 1 kinds of reads with w kinds of writes.

        Args:
            before: reads made before the token's own decay and write [M, N, r, C, K]; pair with j < i.
            after: reads made after them [M, N, C, K]; pair with j <= i.
            writes: [M, N, w, C, K].

        Returns:
            [M, N, r + 1, w, C, C], lower triangular, strictly so in all kinds but the last.
        """
        if self.sums is not None and self.sums.shape[-1] != 1:
            return self._channel_products(self.sums, before, after, writes)
        reads = torch.cat([before, after[:, :, None]], dim=2)[:, :, :, None]  # [M, N, r + 1, 1, C, K]
        masks = self._masks(writes)  # [M, N, 2, 1, C, C], or without the axes M and N
        if before.shape[2] > 1:
            masks = torch.cat([masks[..., :1, :, :, :]] * before.shape[2] + [masks[..., 1:, :, :, :]], dim=-4)
        return (reads @ writes[:, :, None].transpose(-1, -2)) * masks

    def _masks(self, writes: Tensor) -> Tensor:
        """Return exp(G_i - g_i - G_j) for j < i and exp(G_i - G_j) for j <= i, zero elsewhere [M, N, 2, 1, C, C]."""
        C = writes.shape[-2]
        later = torch.ones(C, C, dtype=torch.bool, device=writes.device).triu()
        hidden = torch.stack([later, later.triu(1)])[:, None]
        if self.sums is None:
            return (~hidden).to(self.dtype)
        reads = torch.stack([self.sums_before, self.sums], dim=2)[:, :, :, None]  # [M, N, 2, 1, C, 1]
        exponents = reads - self.sums.transpose(-1, -2)[:, :, None, None]
        return exponents.to(self.dtype).masked_fill(hidden, -torch.inf).exp()

    def _channel_products(self, sums: Tensor, before: Tensor, after: Tensor, writes: Tensor) -> Tensor:
        own = (after[:, :, None] * writes).sum(-1)  # [M, N, w, C]: a token reads its own write undecayed
        own = torch.stack([torch.zeros_like(own)] * before.shape[2] + [own], dim=2)
        late = (after * self.own)[:, :, None]
        reads = torch.cat([before, late], dim=2)  # [M, N, r + 1, C, K], all as before the token's decay
        return channel_products(reads, writes, own, decay_factors(self.sums_before, sums, self.dtype))


@dataclass(frozen=True)
class Centred:
    """Decay from the middle of a chunk to its reads and from its writes to there, both [M, N, C, K]."""

    rise: Tensor
    fall: Tensor


@dataclass(frozen=True)
class Halved:
    """Decay from boundaries to the reads after them and from the writes before them, [M, N, blocks, s, K] by level."""

    rise: tuple[Tensor, ...]
    fall: tuple[Tensor, ...]


Factors = Centred | Halved


def decay_factors(read_sums: Tensor, sums: Tensor, dtype: torch.dtype) -> Factors:
    """Return the factors of ``exp(R_i - G_j)`` for j < i, by which reads and writes of a chunk can be scaled apart.

    Args:
        read_sums: R, log decay from the chunk's start to each read [M, N, C, K]; C a power of two for ``Halved``.
        sums: G, from the chunk's start to each write [M, N, C, K].
        dtype: of the result.
    """
    if _is_mild(sums, dtype):
        middle = sums[..., -1:, :] / 2
        # Rounded after the exp: the two factors' errors do not cancel as those of one difference would.
        return Centred((read_sums - middle).exp().to(dtype), (middle - sums).exp().to(dtype))
    M, N, C, K = sums.shape
    rise, fall = [], []
    s = 1
    while s < C:
        blocks = sums.view(M, N, C // (2 * s), 2 * s, K)
        boundary = blocks[..., s - 1 : s, :]
        reads = read_sums.view(blocks.shape)[..., s:, :]
        rise.append((reads - boundary).to(dtype).exp())
        fall.append((boundary - blocks[..., :s, :]).to(dtype).exp())
        s *= 2
    return Halved(tuple(rise), tuple(fall))


def _is_mild(sums: Tensor, dtype: torch.dtype) -> bool:
    """Whether every decay over a chunk is far enough from underflow to be centred; looked at on a CPU only.

    Pairs j > i are computed before they are masked, with exponents up to the whole chunk's: these must not
    overflow (at 88 in fp32, 709 in fp64) when they multiply keys and queries.
    """
    if sums.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    low, high = torch.aminmax(sums.detach())
    return float(low) > (-600.0 if dtype == torch.float64 else -60.0) and float(high) <= 0.0


def channel_products(reads: Tensor, writes: Tensor, own: Tensor, factors: Factors) -> Tensor:
    """Return products over key channels that decay apart, ``sum_k r_ik w_jk exp(R_ik - G_jk)`` for j < i.

    Args:
        reads: r kinds of reads [M, N, r, C, K].
        writes: w kinds of writes [M, N, w, C, K].
        own: what stands on the diagonal, j = i [M, N, r, w, C].
        factors: from ``decay_factors``.

    Returns:
        [M, N, r, w, C, C], lower triangular.
    """
    if isinstance(factors, Centred):
        rows = (reads * factors.rise[:, :, None])[:, :, :, None]
        columns = (writes * factors.fall[:, :, None])[:, :, None]
        return (rows @ columns.transpose(-1, -2)).tril(-1) + torch.diag_embed(own)
    M, N, r, _, K = reads.shape
    w = writes.shape[2]
    built = own.movedim(-1, 2)[..., None, None]  # [M, N, blocks, r, w, s, s]
    for rise, fall in zip(factors.rise, factors.fall, strict=True):
        blocks, s = fall.shape[2:4]
        columns = writes.reshape(M, N, w, blocks, 2, s, K).unbind(4)[0] * fall[:, :, None]
        rows = reads.reshape(M, N, r, blocks, 2, s, K).unbind(4)[1] * rise[:, :, None]
        rows = rows.transpose(2, 3).reshape(-1, r * s, K)
        columns = columns.transpose(2, 3).reshape(-1, w * s, K)
        quarter = torch.bmm(rows, columns.transpose(1, 2)).view(M, N, blocks, r, s, w, s).transpose(-2, -3)
        left, right = built.view(M, N, blocks, 2, r, w, s, s).unbind(3)
        built = torch.cat([pad(left, (0, s)), torch.cat([quarter, right], dim=-1)], dim=-2)
    return built[:, :, 0]
