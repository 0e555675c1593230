"""Time the recurrent kernels, beside a peer's, on one CUDA device.

    python -m benchmarks.kernels --peer fla --ops linear,gla --shapes 4x8192x16x128,8x1024x8x64 --write

Every op is checked against fp64 in the same run before it is timed. Times are medians with the 20th and 80th
percentile, forward and forward + backward; beside them stand the peak memory above the inputs and the multiple of
the I/O floor: inputs read and outputs written once, at the copy bandwidth measured in this run.
"""

from __future__ import annotations

import argparse
import datetime
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize
from triton.runtime.autotuner import Autotuner
from triton.testing import do_bench

from archspec.kernels import delta_rule, linear_attention

# The peer's dependencies look for a package named `kernels`; from the repository's root they would find this folder.
sys.modules["kernels"] = None  # type: ignore[assignment]

SHAPES = ("1x8192x96x128,2x16384x16x128,4x2048x16x128,4x8192x16x128,4x4096x64x128,8x2048x32x256,8x1024x8x64,"
          "16x2048x16x128")  # fmt: skip
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 0.005, 0.01  # RMS ratios: bf16 rounding, as in tests/kernels
MIB = 2**20

Shape = tuple[int, int, int, int]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Op:
    """One recurrence: how to make its inputs, ours and the peer's call."""

    inputs: Callable[[Shape], Inputs]
    ours: Callable[..., Tensor]
    fla: Callable[..., Tensor]


def _base(shape: Shape, unit: bool) -> Inputs:
    B, T, H, D = shape
    q, k, v = (torch.randn(B, T, H, D, device="cuda") for _ in range(3))
    if unit:
        q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    return {"q": q.bfloat16(), "k": k.bfloat16(), "v": v.bfloat16()}


def _inputs(gate: str = "none", delta: bool = False) -> Callable[[Shape], Inputs]:
    def make(shape: Shape) -> Inputs:
        torch.manual_seed(0)
        B, T, H, D = shape
        made = _base(shape, delta)
        if delta:
            made["beta"] = torch.rand(B, T, H, device="cuda")
        if gate == "token":
            made["g"] = logsigmoid(torch.randn(B, T, H, device="cuda") + 3)
        if gate == "key":
            made["g"] = logsigmoid(torch.randn(B, T, H, D, device="cuda") + 3) / 4
        return made

    return make


def _linear(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, backend: str = "triton") -> Tensor:
    return linear_attention(q, k, v, g, backend=backend)[0]


def _delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, backend: str = "triton") -> Tensor:
    return delta_rule(q, k, v, beta, g, backend=backend)[0]


def _fla_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(q, k, v, normalize=False)[0]


def _fla(module: str, name: str) -> Callable[..., Tensor]:
    def call(**inputs: Tensor) -> Tensor:
        import importlib

        return getattr(importlib.import_module(f"fla.ops.{module}"), name)(**inputs)[0]

    return call


OPS: dict[str, Op] = {
    "linear": Op(_inputs(), _linear, _fla_linear),
    "scalar_gated": Op(_inputs("token"), _linear, _fla("simple_gla", "chunk_simple_gla")),
    "gla": Op(_inputs("key"), _linear, _fla("gla", "chunk_gla")),
    "delta": Op(_inputs(delta=True), _delta, _fla("delta_rule", "chunk_delta_rule")),
    "gated_delta": Op(_inputs("token", True), _delta, _fla("gated_delta_rule", "chunk_gated_delta_rule")),
    "kda": Op(_inputs("key", True), _delta, _fla("kda", "chunk_kda")),
}


@dataclass(frozen=True)
class Timing:
    """Medians (20th to 80th percentile) in ms of forward and forward + backward; peak MiB above the inputs."""

    forward_ms: tuple[float, float, float]
    both_ms: tuple[float, float, float]
    peak_mib: float


def _leaves(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    return {name: (x if dtype is None else x.to(dtype)).detach().clone().requires_grad_() for name, x in inputs.items()}


def run_once(call: Callable[..., Tensor], leaves: Inputs, weight: Tensor) -> list[Tensor]:
    o = call(**leaves)
    return [o, *torch.autograd.grad(o, list(leaves.values()), weight.to(o.dtype))]


def check(op: Op, shape: Shape) -> float:
    """Compare ours with fp64 at this shape's heads and dims, one sequence of at most 1024 tokens.

    Raises:
        ValueError: an output or gradient is off by more than bf16 rounding explains.
    """
    _, T, H, D = shape
    inputs = op.inputs((1, min(T, 1024), H, D))
    weight = torch.randn_like(inputs["v"])
    found = run_once(op.ours, _leaves(inputs), weight)
    exact = run_once(lambda **x: op.ours(**x, backend="chunked"), _leaves(inputs, torch.float64), weight)
    worst = 0.0
    for i, (x, y) in enumerate(zip(found, exact, strict=True)):
        error = float((x.detach().double() - y.detach()).norm() / y.detach().norm())
        if not error < (GRADIENT_TOLERANCE if i else OUTPUT_TOLERANCE):
            raise ValueError(f"result {i} is off by {error:.4f}")
        worst = max(worst, error)
    return worst


def measure(call: Callable[..., Tensor], inputs: Inputs, repeat_ms: int) -> Timing:
    """Time one call; gradients of all inputs are taken."""
    leaves = _leaves(inputs)
    weight = torch.randn_like(inputs["v"])
    quantiles = [0.5, 0.2, 0.8]
    run_once(call, leaves, weight)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_once(call, leaves, weight)
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / MIB
    forward = do_bench(lambda: call(**leaves), warmup=10, rep=repeat_ms, quantiles=quantiles)
    both = do_bench(lambda: run_once(call, leaves, weight), warmup=10, rep=repeat_ms, quantiles=quantiles)
    return Timing(tuple(forward), tuple(both), peak)


def copy_bandwidth() -> float:
    """Bytes per ms that a large device-to-device copy moves, read and written counted."""
    a = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * 2**31 / float(do_bench(lambda: b.copy_(a), return_mode="median"))


def floors_ms(inputs: Inputs, bandwidth: float) -> tuple[float, float]:
    """I/O floors: forward reads inputs and writes o; backward reads them and do again and writes their gradients."""
    read = sum(x.numel() * x.element_size() for x in inputs.values())
    out = inputs["v"].numel() * inputs["v"].element_size()
    return (read + out) / bandwidth, (3 * read + 2 * out) / bandwidth


Job = tuple[str, str, int, int, int, int]


def compile_ahead(job: Job) -> str | None:
    """Compile one op at some heads and head dim in a process of its own; the disk cache is shared.

    Of a peer that tries out configurations, one process compiles every ``slices``-th, so that several share the work.
    What is chosen here is not kept: timings under this load mean nothing.

    Returns:
        An error's name, or None.
    """
    name, who, heads, dim, offset, slices = job
    if who != "ours":
        take_slices(offset, slices)
    op = OPS[name]
    inputs = op.inputs((1, 1024, heads, dim))
    try:
        run_once(getattr(op, who), _leaves(inputs), torch.randn_like(inputs["v"]))
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - a peer may refuse this device: reported here and again when timed
        return f"{who} {name} at {dim}: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return None


def take_slices(offset: int, slices: int) -> None:
    os.environ["FLA_CACHE_RESULTS"] = "0"  # read when the peer is imported
    whole = Autotuner.prune_configs

    def some(self: Autotuner, kwargs: dict[str, object]) -> list[triton.Config]:
        configs = whole(self, kwargs)
        return configs[offset::slices] or configs[:1]

    Autotuner.prune_configs = some


def choose_quickly() -> None:
    """Have a peer's autotuner try each configuration for 20 ms, not 100: the choice is made anew in every run."""
    usual = triton.testing.do_bench
    triton.testing.do_bench = partial(usual, warmup=5, rep=20)


def rows(args: argparse.Namespace, bandwidth: float) -> Iterator[str]:
    """Yield one table row an op and shape, and the geometric means of the speed-ups."""
    for name in args.ops:
        op, speedups = OPS[name], list[float]()
        for shape in args.shapes:
            try:
                error = check(op, shape)
            except ValueError as wrong:
                yield f"| {name} | {'x'.join(map(str, shape))} | ours | not timed: {wrong} |"
                continue
            inputs = op.inputs(shape)
            floor = floors_ms(inputs, bandwidth)
            ours = measure(op.ours, inputs, args.repeat_ms)
            yield row(name, shape, "ours", ours, floor, f"{error:.4f}")
            if args.peer:
                try:
                    peer = measure(getattr(op, args.peer), inputs, args.repeat_ms)
                except Exception as refusal:  # noqa: BLE001 - the table says that the peer refused, and how
                    yield f"| {name} | {'x'.join(map(str, shape))} | {args.peer} | refused: {type(refusal).__name__} |"
                else:
                    speedups.append(peer.both_ms[0] / ours.both_ms[0])
                    yield row(name, shape, args.peer, peer, floor, f"{speedups[-1]:.2f}x")
            del inputs
            torch.cuda.empty_cache()
        if speedups:
            mean = math.exp(sum(map(math.log, speedups)) / len(speedups))
            yield f"| {name} | geometric mean of {len(speedups)} shapes | ours against {args.peer} | {mean:.2f}x |"


def row(name: str, shape: Shape, who: str, timing: Timing, floor: tuple[float, float], note: str) -> str:
    def cell(ms: tuple[float, float, float], lowest: float) -> str:
        return f"{ms[0]:.3f} ({ms[1]:.3f}..{ms[2]:.3f}) | {ms[0] / lowest:.1f}"

    times = f"{cell(timing.forward_ms, floor[0])} | {cell(timing.both_ms, floor[1])}"
    return f"| {name} | {'x'.join(map(str, shape))} | {who} | {times} | {timing.peak_mib:.0f} | {note} |"


def versions_used(peer: str | None) -> str:
    """Return what a result ran on: versions, the peer's too where there is one, and the card."""
    found = f"torch {torch.__version__}, Triton {triton.__version__}, {torch.cuda.get_device_name()}"
    if peer:
        from importlib.metadata import version

        found += f", flash-linear-attention {version('flash-linear-attention')}"
    return found


def current_commit() -> str:
    """Return the short hash of the checkout, or "unknown" where git cannot tell."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def header(args: argparse.Namespace, bandwidth: float) -> list[str]:
    versions = versions_used(args.peer)
    return [
        f"Command: `python -m benchmarks.kernels {' '.join(sys.argv[1:])}`",
        f"Commit {args.commit}; {versions}; copy bandwidth {bandwidth / 1e9:.2f} TB/s; bf16.",
        "",
        "Times are ms, median (20th..80th percentile). Floor: multiple of the I/O floor. Last column: our worst RMS",
        "error against fp64, or the ratio of the peer's forward + backward time to ours.",
        "",
        "| op | B x T x H x D | who | forward ms | floor | forward + backward ms | floor | peak MiB | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["fla"], help="also time this library, which must be installed")
    parser.add_argument("--ops", default="linear,scalar_gated,gla", help=f"comma-separated, of {', '.join(OPS)}")
    parser.add_argument("--shapes", default=SHAPES, help="comma-separated BxTxHxD")
    parser.add_argument("--repeat-ms", type=int, default=100, help="time spent on each measurement")
    parser.add_argument("--processes", type=int, default=8, help="processes that compile ahead")
    parser.add_argument("--slices", type=int, default=4, help="processes that share the peer's configurations of an op")
    parser.add_argument("--commit", default=None, help="commit to report where git cannot tell")
    parser.add_argument("--write", metavar="FILE", help="also write the table to this file")
    args = parser.parse_args()
    args.ops = args.ops.split(",")
    args.shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    args.commit = args.commit or current_commit()
    return args


def main() -> None:
    args = parse()
    sizes = sorted({shape[2:] for shape in args.shapes})
    jobs: list[Job] = [(name, "ours", *size, 0, 1) for size in sizes for name in args.ops]
    if args.peer:
        jobs += [
            (name, args.peer, *size, i, args.slices) for size in sizes for name in args.ops for i in range(args.slices)
        ]
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for message in pool.map(compile_ahead, jobs):
            if message:
                print(message, file=sys.stderr)
    bandwidth = copy_bandwidth()
    choose_quickly()
    lines = header(args, bandwidth)
    print("\n".join(lines))
    for line in rows(args, bandwidth):
        print(line, flush=True)
        lines.append(line)
    if args.write:
        title = f"# Kernels, {torch.cuda.get_device_name()}, {datetime.date.today():%Y-%m}\n"
        Path(args.write).write_text("\n".join([title, *lines]) + "\n")


if __name__ == "__main__":
    main()
