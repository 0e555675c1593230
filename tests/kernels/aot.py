"""Compile the Triton kernels for sm_90 ahead of time, on any machine, and report what each one uses.

The public ops' own host code runs on tensors without data, with launches recorded instead of made; so what is
compiled is what a call would launch. `CASES` is the committed list; `aot_table.json` the committed resources.
Run as a script, in a process of its own: `python tests/kernels/aot.py` prints the report as JSON and
`python tests/kernels/aot.py --write` replaces the table.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TABLE = Path(__file__).with_name("aot_table.json")
TARGET = GPUTarget("cuda", 90, 32)
NUM_MULTIPROCESSORS = 132
_POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One kernel of one call.

    Args:
        op: which of `OPS` is called.
        dtype: of q, k and v.
        gate: the decay's kind, as the op understands it.
        shape: (B, T, H, HV, K, V).
        kernel: the jitted function's name, with ``#n`` for its nth distinct launch of the call.
    """

    op: str
    dtype: str
    gate: str
    shape: tuple[int, int, int, int, int, int]
    kernel: str

    @property
    def name(self) -> str:
        sizes = "x".join(map(str, self.shape))
        return f"{self.op}/{self.gate}/{self.dtype}/{sizes}/{self.kernel}"


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    fn: Any
    arguments: dict[str, Any]
    options: dict[str, int]


_USUAL = (4, 8192, 16, 16, 128, 128)
_LONG = (1, 16384, 16, 16, 128, 128)
_WIDE = (8, 2048, 32, 32, 256, 256)
_MODEL = (16, 2048, 8, 8, 128, 128)
_WAYS = ("forward", "backward")
_DECODED = (64, 1, 8, 8, 128, 128)
CASES = (
    *(Case("linear", "bfloat16", "none", _USUAL, f"_sweep#{n}") for n in range(4)),
    Case("linear", "bfloat16", "none", _LONG, "_segment_states#0"),
    Case("linear", "bfloat16", "none", _LONG, "_scan_segments#0"),
    Case("linear", "bfloat16", "none", _WIDE, "_sweep#0"),
    Case("linear", "bfloat16", "token", _USUAL, "_sweep#0"),
    Case("linear", "bfloat16", "token", _USUAL, "_sweep#2"),
    Case("linear", "bfloat16", "token", _WIDE, "_sweep#2"),
    Case("linear", "bfloat16", "token", _USUAL, "_token_gate_gradient#0"),
    Case("linear", "bfloat16", "key", _USUAL, "_prepare_channels#0"),
    Case("linear", "bfloat16", "key", _USUAL, "_strong_scores#0"),
    *(Case("linear", "bfloat16", "key", _USUAL, f"_sweep#{n}") for n in range(4)),
    Case("linear", "bfloat16", "key", _USUAL, "_scaled_gradients#0"),
    Case("linear", "bfloat16", "key", _USUAL, "_strong_gradients#0"),
    Case("linear", "float16", "key", _USUAL, "_channel_gradients#0"),
    Case("linear", "bfloat16", "key", _USUAL, "_chunk_ends#0"),
    Case("linear", "bfloat16", "key", _USUAL, "_boundary_shares#0"),
    Case("linear", "float32", "none", _WIDE, "_sweep#0"),
    Case("linear", "float32", "key", _WIDE, "_scaled_gradients#0"),
    Case("delta", "bfloat16", "key", _USUAL, "_prepare_channels#0"),
    Case("delta", "bfloat16", "key", _USUAL, "_scaled_gradients#0"),
    Case("delta", "float16", "key", _USUAL, "_channel_gradients#0"),
    *(Case("delta", "bfloat16", gate, _LONG, f"_delta_{way}#0") for gate in ("none", "key") for way in _WAYS),
    Case("convolution", "bfloat16", "none", _MODEL, "_conv_forward#0"),
    Case("convolution", "bfloat16", "none", _MODEL, "_conv_backward#0"),
    Case("head_norm", "bfloat16", "none", _MODEL, "_l2_backward#0"),
    Case("head_norm", "bfloat16", "token", _MODEL, "_norm_backward#0"),
    Case("log_decay", "bfloat16", "key", _MODEL, "_decay_backward#0"),
    Case("delta_step", "bfloat16", "key", _DECODED, "_step_kernel#0"),
    Case("delta_step", "bfloat16", "token", _DECODED, "_step_kernel#0"),
    *(
        Case("delta", dtype, gate, shape, f"{kernel}#0")
        for dtype, gate, shape in (
            ("bfloat16", "none", _USUAL), ("bfloat16", "token", _USUAL), ("bfloat16", "key", _USUAL),
            ("bfloat16", "none", _WIDE), ("float32", "none", _USUAL), ("float32", "none", _WIDE),
        )
        for kernel in ("_delta_core", "_delta_forward", "_delta_backward", "_chunk_states", "_delta_gradients")
    ),
)  # fmt: skip


def _tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return q, k, v and g of a case, without data."""
    B, T, H, HV, K, V = case.shape
    dtype = getattr(torch, case.dtype)
    q, k = (torch.empty(B, T, H, K, dtype=dtype, device="meta") for _ in range(2))
    v = torch.empty(B, T, HV, V, dtype=dtype, device="meta")
    shapes = {"none": None, "token": (B, T, HV), "key": (B, T, HV, K)}
    shape = shapes[case.gate]
    return q, k, v, None if shape is None else torch.empty(shape, device="meta")


def _linear(case: Case) -> None:
    from archspec.kernels.linear import call, fused

    q, k, v, g = _tensors(case)
    K = q.shape[-1]
    with patch.object(call, "_num_multiprocessors", lambda _: NUM_MULTIPROCESSORS):
        o, final, starts, channels = fused._forward_impl(q, k, v, g, None, None, K**-0.5)
        fused._backward_impl(o, None, q, k, v, g, None, None, final, starts, channels, K**-0.5)


def _delta(case: Case) -> None:
    from archspec.kernels.delta import fused
    from archspec.kernels.linear import call

    q, k, v, g = _tensors(case)
    beta = torch.empty(v.shape[:3], device="meta")
    scale = q.shape[-1] ** -0.5
    with patch.object(call, "_num_multiprocessors", lambda _: NUM_MULTIPROCESSORS):
        o, _, errors, writes, core, units = fused._forward_impl(q, k, v, beta, g, None, None, scale)
        fused._backward_impl(o, None, q, k, v, beta, g, None, None, errors, writes, core, units, scale)


def _convolution(case: Case) -> None:
    from archspec.kernels.pointwise import convolution_fused

    B, T, H, _, K, _ = case.shape
    x = torch.empty(B, T, H * K, dtype=getattr(torch, case.dtype), device="meta")
    weight = x.new_empty(H * K, 4)
    convolution_fused.conv_backward(
        convolution_fused.conv_forward(x, weight, None, None, "silu"), x, weight, None, None, "silu"
    )


def _head_norm(case: Case) -> None:
    """The L2 norm of a key or, gated by ``token``, the RMS norm of a read-out."""
    from archspec.kernels.pointwise import l2_fused, norm_fused

    B, T, H, _, K, _ = case.shape
    x = torch.empty(B, T, H, K, dtype=getattr(torch, case.dtype), device="meta")
    if case.gate == "token":
        norm_fused.norm_backward(x, x, x.new_empty(K), torch.empty_like(x), "silu", 1e-6)
    else:
        l2_fused.l2_backward(x, *l2_fused.l2_forward(x, 1e-6))


def _log_decay(case: Case) -> None:
    from archspec.kernels.pointwise import decay_fused

    B, T, H, _, K, _ = case.shape
    z = torch.empty(B, T, H, K, dtype=getattr(torch, case.dtype), device="meta")
    log_rate = torch.empty(H, 1, device="meta")
    decay_fused.decay_backward(decay_fused.decay_forward(z, log_rate, None), z, log_rate, None)


def _delta_step(case: Case) -> None:
    from archspec.kernels.delta import step_fused

    B, T, H, HV, K, V = case.shape
    q = torch.empty(B, T, H, K, dtype=getattr(torch, case.dtype), device="meta")
    beta, wide, state = (torch.empty(shape, device="meta") for shape in ((B, T, HV), (B, T, HV, K), (B, HV, K, V)))
    g = wide if case.gate == "key" else beta
    step_fused.delta_step(q, q, q.new_empty(B, T, HV, V), beta, g, None, None, None, state, 1.0, "decay_first")


OPS: dict[str, Callable[[Case], None]] = {
    "linear": _linear, "delta": _delta, "convolution": _convolution, "head_norm": _head_norm, "log_decay": _log_decay,
    "delta_step": _delta_step,
}  # fmt: skip


def record(case: Case) -> list[Launch]:
    """Return every launch of a case's forward and backward pass, in order."""
    launches: list[Launch] = []

    def run(fn: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options: dict[str, int] = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        launches.append(Launch(fn, dict(zip(fn.arg_names, args, strict=False)) | kwargs, options))

    with patch.object(JITFunction, "run", run):
        OPS[case.op](case)
    return launches


def _source(launch: Launch) -> ASTSource:
    """Build the compiler's input: pointers aligned to 16 bytes, as torch allocates them; sizes that 16 divides."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.fn.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.fn, signature=signature, constexprs=constants, attrs=attributes)


def find(case: Case) -> Launch:
    """Return the launch that a case names.

    Raises:
        LookupError: the call makes no such launch.
    """
    name, _, index = case.kernel.partition("#")
    distinct: list[Launch] = []
    for launch in record(case):
        if launch.fn.__name__ == name and _key(launch) not in [_key(other) for other in distinct]:
            distinct.append(launch)
    if int(index) >= len(distinct):
        raise LookupError(f"{case.name}: only {len(distinct)} distinct launches")
    return distinct[int(index)]


def _key(launch: Launch) -> tuple[Any, ...]:
    source = _source(launch)
    return (source.signature, source.constants, launch.options)


def resources(case: Case) -> dict[str, int]:
    """Compile a case; returns its registers, spilled bytes (the stack frame) and shared memory bytes."""
    launch = find(case)
    compiled = triton.compile(_source(launch), target=TARGET, options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run(
            [tool, "--dump-resource-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {
        "registers": int(usage["REG"]),
        "spilled_bytes": int(usage["STACK"]) + int(usage["LOCAL"]),
        "shared_bytes": compiled.metadata.shared,
        "warps": launch.options.get("num_warps", 4),
    }


def report(processes: int = 2) -> dict[str, Any]:
    """Compile every case; returns the Triton version and each case's resources."""
    with ProcessPoolExecutor(processes) as pool:
        used = list(pool.map(resources, CASES))
    return {
        "triton": triton.__version__,
        "target": "sm_90",
        "kernels": {c.name: u for c, u in zip(CASES, used, strict=True)},
    }


if __name__ == "__main__":
    made = json.dumps(report(), indent=1) + "\n"
    if "--write" in sys.argv:
        TABLE.write_text(made)
    else:
        sys.stdout.write(made)
