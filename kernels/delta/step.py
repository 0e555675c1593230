"""Decoding one token, or a short block of tokens, with the delta rule.

The state may be updated in place, so that a decoding loop can be captured in a CUDA graph: nothing is allocated but
the output and nothing is read on the host.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from archspec.errors import ShapeError
from archspec.kernels.backend import check_floating, check_groups, check_shape, default_scale, resolve_backend
from archspec.kernels.delta.inputs import DeltaInputs, Order, check_order

_OP = "delta_rule_step"


def delta_rule_step(
    q: Float[Tensor, "*B H K"],
    k: Float[Tensor, "*B H K"],
    v: Float[Tensor, "*B HV V"],
    beta: Float[Tensor, "*beta"],
    state: Float[Tensor, "B HV K V"],
    g: Float[Tensor, "*gate"] | None = None,
    scale: float | None = None,
    write_beta: Float[Tensor, "*beta"] | None = None,
    read_key: Float[Tensor, "*B _ K"] | None = None,
    erase_key: Float[Tensor, "*B _ K"] | None = None,
    order: Order = "decay_first",
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Float[Tensor, "*B HV V"], Float[Tensor, "B HV K V"]]:
    """Advance the state by one token, or by a few, and read it: the recurrence of ``delta_rule``.

    Args:
        q, k, v, beta, g, scale, write_beta, read_key, erase_key, order: as in ``delta_rule``: of one token without
            its time axis (q [B, H, K], beta and g [B, HV] or [B, HV, K]), or of T tokens with it.
        state: S before the first of them; its dtype is kept. The Triton kernel wants fp32.
        inplace: write the new state into ``state`` and return it; not differentiable.
        backend: "auto", "triton", "chunked" or "reference"; the last two are the same torch loop here.

    Returns:
        o in v's dtype, with or without a time axis as q, and the state after the last token.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        UnsupportedError: an unknown order, or a backend that cannot serve these tensors.
    """
    inputs, sizes = _check(DeltaInputs(q, k, v, beta, g, write_beta, read_key, erase_key), state)
    check_order(_OP, order)
    scale = default_scale(scale, sizes["K"])
    # The Triton step has no backward; one token's gradient is rarely wanted and torch gives it.
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, state))
    plain = needs_grad or state.dtype != torch.float32
    dims = {"key_dim": sizes["K"], "value_dim": sizes["V"]}
    if resolve_backend(_OP, "chunked" if backend == "auto" and plain else backend, v, dims) == "triton":
        return _fused(inputs, state, scale, order, inplace)
    outputs, new = [], state
    for t in range(sizes["T"]):
        token = inputs if q.ndim == 3 else DeltaInputs(*(None if x is None else x[:, t] for x in inputs))  # type: ignore[arg-type]
        o, new = _step(token, new, scale, order)
        outputs.append(o)
    read = outputs[0] if q.ndim == 3 else torch.stack(outputs, 1)
    return read, state.copy_(new) if inplace else new


def _check(inputs: DeltaInputs, state: Tensor) -> tuple[DeltaInputs, dict[str, int]]:
    """Check shapes, dtypes and devices; returns the inputs and their sizes, T = 1 without a time axis."""
    q, k, v, beta, g, write_beta, read_key, erase_key = inputs
    tokens = "B T " if q.ndim == 4 else "B "
    sizes: dict[str, int] = {}
    for name, x, letters in (("q", q, "H K"), ("k", k, "H K"), ("v", v, "HV V")):
        check_shape(_OP, name, x, tokens + letters, sizes)
    check_groups(_OP, sizes["H"], sizes["HV"])
    check_shape(_OP, "state", state, "B HV K V", sizes)
    for name, strength in (("beta", beta), ("g", g), ("write_beta", write_beta)):
        if strength is not None:
            check_shape(_OP, name, strength, tokens + ("HV K" if strength.ndim == q.ndim else "HV"), sizes)
    for name, key in (("read_key", read_key), ("erase_key", erase_key)):
        if key is not None:
            grouped = key.ndim == q.ndim and key.shape[-2] == sizes["H"]
            check_shape(_OP, name, key, tokens + ("H K" if grouped else "HV K"), sizes)
    check_floating(_OP, v.device, **inputs._asdict(), state=state)
    if sizes.setdefault("T", 1) < 1:
        raise ShapeError(f"{_OP}: T=0; at least one token is required.")
    return inputs, sizes


def _fused(inputs: DeltaInputs, state: Tensor, scale: float, order: Order, inplace: bool) -> tuple[Tensor, Tensor]:
    """Run the Triton step.

    Raises:
        ShapeError: a state that is not fp32.
    """
    from archspec.kernels.delta.step_fused import delta_step_fused

    if state.dtype != torch.float32:
        raise ShapeError(f"{_OP}: state is {state.dtype}; the Triton kernel requires torch.float32.")
    new = state if inplace else state.clone(memory_format=torch.contiguous_format)
    if inputs.q.ndim == 4:
        return delta_step_fused(inputs, new, scale, order), new
    block = DeltaInputs(*(None if x is None else x[:, None] for x in inputs))  # type: ignore[arg-type]
    return delta_step_fused(block, new, scale, order)[:, 0], new


def _step(inputs: DeltaInputs, state: Tensor, scale: float, order: Order) -> tuple[Tensor, Tensor]:
    """The torch form of one token's step."""
    q, k, v, beta, g, write_beta, read_key, erase_key = inputs
    HV = v.shape[1]
    dtype = state.dtype

    def key(x: Tensor) -> Tensor:
        return x.to(dtype).repeat_interleave(HV // x.shape[1], dim=1).unsqueeze(-1)  # [B, HV, K, 1]

    def per_key(x: Tensor) -> Tensor:
        return x.to(dtype).unsqueeze(-1) if x.ndim == 3 else x.to(dtype)[..., None, None]

    writer = key(k)
    reader = writer if read_key is None else key(read_key)
    eraser = writer if erase_key is None else key(erase_key)
    alpha = None if g is None else per_key(g).exp()
    if alpha is not None and order == "decay_first":
        state = alpha * state
    predicted = reader.transpose(-1, -2) @ state  # [B, HV, 1, V]
    value = v.to(dtype).unsqueeze(-2)
    if write_beta is None and erase_key is None:
        step = per_key(beta) * writer * (value - predicted)
    else:
        step = per_key(beta if write_beta is None else write_beta) * writer * value
        step = step - per_key(beta) * eraser * predicted
    if alpha is not None and order == "together":
        state = alpha * state
    state = state + step
    if alpha is not None and order == "step_first":
        state = alpha * state
    o = scale * (key(q).transpose(-1, -2) @ state).squeeze(-2)
    return o.to(v.dtype), state
