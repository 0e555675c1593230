"""The delta rule in chunkwise form, in torch on any device, as cases of the DPLR engine.

The engine runs S_t = A_t S_{t-1} - b_t (a_t^T S_{t-1}) + w_t v_t^T with A_t = Diag(exp g_t). For read key p, erase
key e, strengths beta and gamma (writing):

    decay_first   (p^T A S_{t-1} is what is read)     a = A beta p,   b = e,     w = gamma k
    together      (p^T S_{t-1} is what is read)       a = beta p,     b = e,     w = gamma k
    step_first    (the step's result is decayed)      a = beta p,     b = A e,   w = A gamma k

A strength per token may stand on either factor of its outer product, one per key channel only on the key. With one
key for erasing and writing the engine needs half of the products, so strengths are placed to keep b and w equal.
"""

from __future__ import annotations

from torch import Tensor

from archspec.kernels.backend import state_dtype
from archspec.kernels.delta.inputs import DeltaInputs, Order
from archspec.kernels.dplr.chunked import run_engine
from archspec.kernels.dplr.decay import clamp_log_decay


def delta_rule_chunked(
    inputs: DeltaInputs, scale: float, initial_state: Tensor | None, order: Order
) -> tuple[Tensor, Tensor]:
    """Run the recurrence of ``delta_rule`` in chunks; arguments and results as ``delta_rule_reference``."""
    dtype = state_dtype(inputs.v)
    q = inputs.q.to(dtype) * scale
    a, b, w, v = _factors(inputs)
    if inputs.g is not None and order != "together":
        alpha = clamp_log_decay(inputs.g, dtype).to(dtype).exp()
        alpha = alpha.unsqueeze(-1) if alpha.ndim == 3 else alpha
        if order == "decay_first":
            a = alpha * a
        else:
            b, w = alpha * b, None if w is None else alpha * w
    o, state = run_engine(q, a, b, w, v, inputs.g, initial_state)
    return o.to(inputs.v.dtype), state


def _factors(inputs: DeltaInputs) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return a, b, w (None when b is the key for writing too) and v, in the engine's terms and without decay."""
    dtype = state_dtype(inputs.v)
    k, v, beta = (x.to(dtype) for x in (inputs.k, inputs.v, inputs.beta))
    write_beta = beta if inputs.write_beta is None else inputs.write_beta.to(dtype)
    reader = k if inputs.read_key is None else inputs.read_key.to(dtype)
    if inputs.erase_key is None and beta.ndim == write_beta.ndim == 3:
        return beta.unsqueeze(-1) * reader, k, None, write_beta.unsqueeze(-1) * v
    if inputs.erase_key is None and inputs.write_beta is None:
        return reader, beta * k, None, v
    eraser = k if inputs.erase_key is None else inputs.erase_key.to(dtype)
    if beta.ndim == 3:
        reader = beta.unsqueeze(-1) * reader
    else:
        eraser = beta * eraser
    if write_beta.ndim == 3:
        return reader, eraser, k, write_beta.unsqueeze(-1) * v
    return reader, eraser, write_beta * k, v
