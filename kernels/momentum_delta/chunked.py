"""The momentum delta rule in chunks of C tokens: exact, in torch on any device.

With x_j = theta_j k_j and the error e_j = v_j - W*_j^T p_j, W* the weights that token j predicts with, the weights
inside a chunk are, by the coefficients beta, f and c of ``archspec.kernels.online.coefficients``,

    W_t = beta_t S_0 + f_t P_0 + sum_{j<=t} c_tj x_j e_j^T

and a prediction sees the same sum one token earlier (times its own decay for ``decay_first``; primes below). So the
errors of a chunk solve one unit triangular system, and the read-outs follow:

    E = (I + (P X^T) o c')^{-1} [V - beta' P S_0 - f' P P_0]
    O = beta (Q S_0) + f (Q P_0) + ((Q X^T) o c) E

where P in the first products holds the read keys. Unlike for nonlinear memories, C does not change the function. E
is affine in S_0 and P_0 stacked: the maps of all chunks are computed together, the states follow by one product of
size 2 K a chunk, and the outputs are again computed together.

With an erase key or a write strength of its own, what is erased (y_j, W*^T p) and what is written (x_j, v) are two
sums under the same c, and the system is solved for the predictions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from archspec.kernels.backend import state_dtype
from archspec.kernels.dplr.chunked import heads_first
from archspec.kernels.dplr.engine import default_chunk_length
from archspec.kernels.momentum_delta.inputs import MomentumDeltaInputs, MomentumDeltaState, Order
from archspec.kernels.online.coefficients import summed


def momentum_delta_chunked(
    inputs: MomentumDeltaInputs, scale: float, order: Order, start: MomentumDeltaState
) -> tuple[Tensor, MomentumDeltaState]:
    """Run the rule in chunks; arguments and results as ``momentum_delta_reference``."""
    B, T, HV, V = inputs.v.shape
    dtype = state_dtype(inputs.v)
    laid = MomentumDeltaInputs(*(None if x is None else heads_first(x.to(dtype)) for x in inputs))  # type: ignore[arg-type]
    state = torch.cat([x.to(dtype).flatten(0, 1) for x in start], dim=1)  # [B HV, 2 K, V]
    C = min(default_chunk_length(inputs.v.device), T)
    outputs = []
    # Padding would let the momentum run on, so an incomplete last chunk is computed by itself.
    for first, length, count in ((0, C, T // C), (T // C * C, T % C, 1)):
        if length and count:
            part = _split(laid, first, length, count)
            o, state = _stretch(part, order, state)
            outputs.append(o)
    o = scale * torch.cat(outputs, dim=1)
    weights, momentum = state.view(B, HV, -1, V).chunk(2, dim=2)
    return o.view(B, HV, T, V).transpose(1, 2).to(inputs.v.dtype), MomentumDeltaState(weights, momentum)


def _split(inputs: MomentumDeltaInputs, first: int, length: int, count: int) -> MomentumDeltaInputs:
    """Return tokens from ``first`` on as [M, count, length, d]."""

    def cut(x: Tensor | None) -> Tensor | None:
        return (
            None if x is None else x[:, first : first + length * count].reshape(x.shape[0], count, length, x.shape[-1])
        )

    return MomentumDeltaInputs(*(cut(x) for x in inputs))  # type: ignore[arg-type]


class _Rows(NamedTuple):
    """How the weights that each token of a chunk sees are made: beta, f [M, N, C, 1] and c [M, N, C, C]."""

    start: Tensor
    buffer: Tensor
    mix: Tensor


def _stretch(inputs: MomentumDeltaInputs, order: Order, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run N chunks of equal length; return o [M, N C, V] and the stacked state after them."""
    q, v, mu, g = inputs.q, inputs.v, inputs.momentum, inputs.g
    log_decay = None if g is None else g.squeeze(-1)
    sums = summed(
        log_decay, mu.squeeze(-1), mu.squeeze(-1), step_first=order == "step_first", before=False, axis="none"
    )
    if sums.buffer is None or sums.buffer_end is None or sums.keep is None or sums.keep_mix is None:
        raise RuntimeError("sums with momentum have a buffer")
    one = torch.ones_like(mu)
    read = _Rows(one if sums.start is None else sums.start[..., None], sums.buffer[..., None], sums.mix)
    seen = _before(read, None if g is None or order != "decay_first" else g.exp())
    errors, keys = _errors(inputs, seen)
    scores = (q @ keys.mT) * torch.cat([read.mix] * (keys.shape[-2] // q.shape[-2]), dim=-1)
    outs = scores @ errors  # [M, N, C, V + 2 K]
    ends = torch.stack([sums.mix_end, sums.keep_mix], dim=2)[..., None]  # [M, N, 2, C, 1]
    ends = torch.cat([ends] * (keys.shape[-2] // q.shape[-2]), dim=-2)
    written = ((keys[:, :, None] * ends).mT @ errors[:, :, None]).flatten(2, 3)  # [M, N, 2 K, V + 2 K]
    V = v.shape[-1]
    transition = written[..., V:] + _kept(read.start[..., -1, 0], sums.buffer_end, sums.keep, q.shape[-1])
    starts = []
    for factor, term in zip(transition.unbind(1), written[..., :V].unbind(1), strict=True):
        starts.append(state)
        state = torch.baddbmm(term, factor, state)
    reads = outs[..., V:] + torch.cat([read.start * q, read.buffer * q], dim=-1)
    o = outs[..., :V] + reads @ torch.stack(starts, dim=1)
    return o.flatten(1, 2), state


def _errors(inputs: MomentumDeltaInputs, seen: _Rows) -> tuple[Tensor, Tensor]:
    """Return what the chunk's steps write, affine in the start state: rows of errors and the keys they go to.

    Returns:
        errors [M, N, R, V + 2 K], columns for 1, S_0 and P_0, and keys [M, N, R, K]; R is C, or 2 C where erased and
        written parts have keys of their own.
    """
    k, v, step, write_step = inputs.k, inputs.v, inputs.step, inputs.write_step
    reader = k if inputs.read_key is None else inputs.read_key
    eraser = step * (k if inputs.erase_key is None else inputs.erase_key)
    erase = (reader @ eraser.mT) * seen.mix
    base = torch.cat([seen.start * reader, seen.buffer * reader], dim=-1)
    if write_step is None and inputs.erase_key is None:
        return _solve(erase, torch.cat([v, -base], dim=-1)), eraser
    writer = k * (step if write_step is None else write_step)
    met = ((reader @ writer.mT) * seen.mix) @ v
    predictions = _solve(erase, torch.cat([met, base], dim=-1))
    written = torch.cat([v, torch.zeros_like(base)], dim=-1)
    return torch.cat([-predictions, written], dim=-2), torch.cat([eraser, writer], dim=-2)


def _before(rows: _Rows, own: Tensor | None) -> _Rows:
    """Return what each token sees before its own step: the row before it, decayed by ``own`` if that comes first."""
    start = torch.cat([torch.ones_like(rows.start[..., :1, :]), rows.start[..., :-1, :]], dim=-2)
    buffer, mix = (
        torch.cat([torch.zeros_like(x[..., :1, :]), x[..., :-1, :]], dim=-2) for x in (rows.buffer, rows.mix)
    )
    return _Rows(start, buffer, mix) if own is None else _Rows(start * own, buffer * own, mix * own)


def _kept(start: Tensor, buffer: Tensor, momentum: Tensor, size: int) -> Tensor:
    """Return what a chunk without steps does to S and P stacked, from three factors [M, N]: [M, N, 2 K, 2 K]."""
    eye = torch.eye(size, dtype=start.dtype, device=start.device)
    start, buffer, momentum = (x[..., None, None] * eye for x in (start, buffer, momentum))
    above = torch.cat([start, buffer], dim=-1)
    return torch.cat([above, torch.cat([torch.zeros_like(buffer), momentum], dim=-1)], dim=-2)


def _solve(system: Tensor, right_side: Tensor) -> Tensor:
    """Return (I + system)^{-1} right_side for a strictly lower triangular system."""
    solved: Tensor = torch.linalg.solve_triangular(system, right_side, upper=False, unitriangular=True)
    return solved
