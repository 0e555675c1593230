"""Checking the arguments of online_memory and laying them out as a Problem and a start state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from archspec.errors import ShapeError, UnsupportedError, unknown
from archspec.kernels.backend import check_floating, check_shape, state_dtype
from archspec.kernels.online.problem import OnlineState, Order, Problem, Read, Reduce, Weights

Gate = Tensor | Mapping[str, Tensor]


def build(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Mapping[str, Tensor],
    state: OnlineState | None,
    *,
    step_size: Gate,
    log_decay: Gate | None,
    momentum: Gate | None,
    read_key: Tensor | None,
    error_inputs: Mapping[str, Tensor] | None,
    **options: Any,
) -> tuple[Problem, OnlineState]:
    """Return the problem and the state it starts from; arguments as for ``online_memory``.

    Raises:
        ShapeError, UnsupportedError: as ``online_memory`` says.
    """
    _check_options(op, options, log_decay, momentum)
    sizes: dict[str, int] = {}
    for name, x, letters in (("q", q, "B T H K"), ("k", k, "B T H K"), ("v", v, "B T H V")):
        check_shape(op, name, x, letters, sizes)
    if sizes["T"] < 1:
        raise ShapeError(f"{op}: T=0; at least one token is required.")
    if read_key is not None:
        check_shape(op, "read_key", read_key, "B T H K", sizes)
    extra = dict(error_inputs or {})
    check_floating(
        op, v.device, q=q, k=k, v=v, read_key=read_key, **{f"error_inputs[{n}]": x for n, x in extra.items()}
    )
    for name, x in extra.items():
        if tuple(x.shape[:3]) != (sizes["B"], sizes["T"], sizes["H"]):
            required = f"[B={sizes['B']}, T={sizes['T']}, H={sizes['H']}, ...]"
            raise ShapeError(f"{op}: error_inputs[{name!r}] has shape {list(x.shape)}; required is {required}.")
    dtype = state_dtype(v)
    summed = momentum is not None or options.get("shares") is not None
    start = _start(op, weights, state, sizes, summed, options["chunk_size"], dtype)

    def lay_out(x: Tensor) -> Tensor:
        return x.to(dtype).transpose(1, 2)

    def gates(name: str, gate: Gate | None) -> Weights | None:
        return None if gate is None else _gates(op, name, gate, start.weights, sizes, dtype)

    problem = Problem(
        query=lay_out(q),
        key=lay_out(k),
        value=lay_out(v),
        read_key=None if read_key is None else lay_out(read_key),
        error_inputs={name: lay_out(x) for name, x in extra.items()},
        step_size=gates("step_size", step_size) or {},
        log_decay=gates("log_decay", log_decay),
        momentum=gates("momentum", momentum),
        **options,
    )
    return problem, start


def _check_options(op: str, options: Mapping[str, Any], log_decay: Gate | None, momentum: Gate | None) -> None:
    for name, known in (("order", Order), ("reduce", Reduce), ("read", Read)):
        if options[name] not in get_args(known):
            raise UnsupportedError(f"{op}: {unknown(name, options[name], get_args(known))}")
    if options["chunk_size"] < 1:
        raise ShapeError(f"{op}: chunk_size={options['chunk_size']}; at least 1 is required.")
    if options["reduce"] == "mean" and (log_decay is not None or momentum is not None):
        raise UnsupportedError(
            f"{op}: reduce='mean' averages plain steps; leave out log_decay and momentum, or use reduce='sum'."
        )
    shares = options.get("shares")
    if shares is None:
        return
    if options["reduce"] != "mean":
        raise UnsupportedError(f"{op}: shares are of a mean; use reduce='mean', or leave them out.")
    if tuple(shares.shape) != (options["chunk_size"],):
        raise ShapeError(
            f"{op}: shares has shape {list(shares.shape)}; required is [chunk_size={options['chunk_size']}]."
        )


def _start(
    op: str,
    weights: Mapping[str, Tensor],
    state: OnlineState | None,
    sizes: Mapping[str, int],
    has_momentum: bool,
    chunk_size: int,
    dtype: torch.dtype,
) -> OnlineState:
    """Return the given state, checked, or the one that ``weights`` begin."""
    shapes = (sizes["B"], sizes["H"])
    if not weights and state is None:
        raise ShapeError(f"{op}: weights is empty; at least one weight is required.")
    for name, x in (weights if state is None else state.weights).items():
        if x.ndim != 4 or tuple(x.shape[:2]) != shapes:
            required = f"[B={shapes[0]}, H={shapes[1]}, d_in, d_out]"
            raise ShapeError(f"{op}: weights[{name!r}] has shape {list(x.shape)}; required is {required}.")
    if state is None:
        started = {name: x.to(dtype) for name, x in weights.items()}
        momentum = {name: torch.zeros_like(x) for name, x in started.items()} if has_momentum else None
        return OnlineState(started, started, momentum, 0)
    if (state.momentum is not None) != has_momentum:
        holds = "a" if state.momentum is not None else "no"
        raise ShapeError(
            f"{op}: the state holds {holds} momentum buffer, momentum is {(has_momentum and 'given') or None}."
        )
    if not 0 <= state.phase < chunk_size:
        raise ShapeError(
            f"{op}: the state's phase is {state.phase}; required is 0 to chunk_size - 1 = {chunk_size - 1}."
        )
    return state


def _gates(
    op: str, argument: str, gate: Gate, weights: Mapping[str, Tensor], sizes: Mapping[str, int], dtype: torch.dtype
) -> Weights:
    """Return a gate by weight, [B, H, T, d_in or 1, d_out or 1]; one tensor for all weights is shared by them."""
    B, T, H = sizes["B"], sizes["T"], sizes["H"]
    if isinstance(gate, Tensor):
        if tuple(gate.shape) != (B, T, H):
            raise ShapeError(
                f"{op}: {argument} has shape {list(gate.shape)}; required is [B={B}, T={T}, H={H}], or a mapping from "
                "weight names to tensors broadcastable to [B, T, H, d_in, d_out]."
            )
        shared = gate.to(dtype).transpose(1, 2)[..., None, None]
        return dict.fromkeys(weights, shared)
    if set(gate) != set(weights):
        raise ShapeError(f"{op}: {argument} names {sorted(gate)}; required are the weights {sorted(weights)}.")
    laid_out: dict[int, Tensor] = {}
    found: Weights = {}
    for name, x in gate.items():
        d_in, d_out = weights[name].shape[2:]
        wanted = (B, T, H, d_in, d_out)
        if x.ndim != 5 or any(n not in (1, size) for n, size in zip(x.shape, wanted, strict=True)):
            raise ShapeError(
                f"{op}: {argument}[{name!r}] has shape {list(x.shape)}; required is one that broadcasts to "
                f"[B={B}, T={T}, H={H}, d_in={d_in}, d_out={d_out}]."
            )
        if id(x) not in laid_out:
            laid_out[id(x)] = x.to(dtype).expand(B, T, H, *x.shape[3:]).transpose(1, 2)
        found[name] = laid_out[id(x)]
    return found
