"""Time the recurrent kernels, beside a peer's, on one CUDA device.

    python -m benchmarks.kernels --peer fla --ops linear,gla --shapes 4x8192x16x128,8x1024x8x64 --write

Every op is checked against fp64 in the same run before it is timed. Times are medians with the 20th and 80th
percentile, forward and forward + backward; beside them stand the peak memory above the inputs and the multiple of
the I/O floor: inputs read and outputs written once, at the copy bandwidth measured in this run.

With ``--first-call``, instead, how long an op's first call takes, forward and backward, in a process of its own:
with nothing compiled before, and with what that call left in the disk cache.

All kernels of an op are compiled in ``--processes`` processes before any of it is timed. A peer's autotuner tries its
whole space once a head dim, at the first shape listed of 16 heads (of others if there is none), and keeps what it
chose at other head counts and batches. Rows are written as they are measured; after ``--budget-s`` seconds the rest
are named as missing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
import triton
from torch import Tensor
from triton.testing import do_bench

from benchmarks.recording import current_commit
from benchmarks.recurrences import OPS, Inputs, Op, Shape
from benchmarks.tuning import Choices, compile_ahead, sharing_choices

# The peer's dependencies look for a package named `kernels`; from the repository's root they would find this folder.
sys.modules["kernels"] = None  # type: ignore[assignment]

SHAPES = ("1x8192x96x128,2x16384x16x128,4x2048x16x128,4x8192x16x128,4x4096x64x128,8x2048x32x256,8x1024x8x64,"
          "16x2048x16x128")  # fmt: skip
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 0.005, 0.01  # RMS ratios: bf16 rounding, as in tests/kernels
MIB = 2**20


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


def errors(op: Op, shape: Shape, call: Callable[..., Tensor]) -> tuple[float, float]:
    """Compare a call with fp64 at this shape's heads and dims, one sequence of at most 1024 tokens.

    Returns:
        The RMS ratio of the output's error, and the largest of the gradients'.
    """
    _, T, H, D = shape
    inputs = op.inputs((1, min(T, 1024), H, D))
    weight = torch.randn_like(inputs["v"])
    exact = run_once(lambda **x: op.ours(**x, backend="chunked"), _leaves(inputs, torch.float64), weight)
    output, *gradients = [
        float((x.detach().double() - y.detach()).norm() / y.detach().norm())
        for x, y in zip(run_once(call, _leaves(inputs), weight), exact, strict=True)
    ]
    # Not max() alone: a NaN compares false with all, and must show.
    return output, max(gradients, key=lambda ratio: (math.isnan(ratio), ratio))


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


def call_once(name: str, who: str, shapes: list[Shape]) -> None:
    """Run an op forward and backward at each shape."""
    op = OPS[name]
    for shape in shapes:
        inputs = op.inputs(shape)
        run_once(getattr(op, who), _leaves(inputs), torch.empty_like(inputs["v"]))
        del inputs
        torch.cuda.empty_cache()


def by_heads(shapes: list[Shape]) -> list[list[Shape]]:
    """Group shapes that most kernels are shared by: of as many heads and channels."""
    found: dict[tuple[int, int], list[Shape]] = {}
    for shape in shapes:
        found.setdefault(shape[2:], []).append(shape)
    return list(found.values())


def tuned_shapes(shapes: list[Shape]) -> list[Shape]:
    """Return the shape of each head dim that a peer's kernels are tuned at."""
    ordered = sorted(shapes, key=lambda shape: shape[2] != 16)
    return [next(shape for shape in ordered if shape[3] == dim) for dim in sorted({shape[3] for shape in shapes})]


def first_call(name: str, shape: Shape, folder: str) -> tuple[float, int]:
    """Return the seconds of a process's first call of an op, and the kernels in the cache folder after it."""
    os.environ["TRITON_CACHE_DIR"] = folder
    op = OPS[name]
    leaves = _leaves(op.inputs(shape))
    weight = torch.empty_like(leaves["v"])
    torch.cuda.synchronize()
    began = time.monotonic()
    run_once(op.ours, leaves, weight)
    torch.cuda.synchronize()
    return time.monotonic() - began, len(list(Path(folder).rglob("*.cubin")))


def first_calls(names: list[str], shape: Shape) -> Iterator[str]:
    """Yield a table of ops' first calls: alone on its core, since one call compiles its kernels one after another."""
    context = multiprocessing.get_context("spawn")
    yield "| op | kernels | first call, s | with a warm disk cache, s |"
    yield "|---|---|---|---|"
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found = []
            for _ in range(2):
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    found.append(pool.submit(first_call, name, shape, folder).result())
        (cold, kernels), (warm, _) = found
        yield f"| {name} | {kernels} | {cold:.1f} | {warm:.2f} |"


@dataclass(frozen=True)
class Run:
    """What is measured, and what came of it so far."""

    args: argparse.Namespace
    pool: ProcessPoolExecutor
    bandwidth: float
    deadline: float
    choices: Choices
    timings: dict[tuple[str, Shape, str], Timing]

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def rows(self) -> Iterator[str]:
        """Yield one table row an op, shape and library, and the geometric means of the speed-ups."""
        missing = []
        for name in self.args.ops:
            if not self.late():
                self.prepare(name)
            for shape in self.args.shapes:
                if self.late():
                    missing.append(f"{name} {'x'.join(map(str, shape))}")
                else:
                    yield from self.rows_of(name, shape)
            yield from self.means(name)
        if missing:
            yield f"\nThe budget of {self.args.budget_s} s left no time for: {', '.join(missing)}."

    def prepare(self, name: str) -> None:
        """Compile ours and a peer's whole space at its tuned shapes, tune it there and compile its choice elsewhere."""
        began, args = time.monotonic(), self.args
        short = [(B, min(T, 1024), H, D) for B, T, H, D in args.shapes]
        tuned = tuned_shapes(args.shapes) if args.peer else []
        jobs = [(f"ours {name}", partial(call_once, name, "ours", group), 4) for group in by_heads(args.shapes)]
        for B, T, H, D in tuned:
            call = partial(call_once, name, args.peer, [(B, min(T, 1024), H, D)])
            jobs.append((f"{args.peer} {name} of {D}", call, args.processes))
        compile_ahead(self.pool, jobs, self.choices)
        compiled = time.monotonic()
        for shape in tuned:
            try:
                call_once(name, args.peer, [shape])
            except Exception as refusal:  # noqa: BLE001 - the table says so, in this shape's row
                print(f"{args.peer} {name}: {type(refusal).__name__}", file=sys.stderr, flush=True)
                return
        chosen = time.monotonic()
        if tuned:
            # One sequence, too: the check has one.
            rest = sorted({*short, *[(1, T, H, D) for _, T, H, D in short]})
            jobs = [(f"{args.peer} {name}", partial(call_once, name, args.peer, group), 4) for group in by_heads(rest)]
            compile_ahead(self.pool, jobs, self.choices)
        print(
            f"{name}: compiled in {compiled - began:.0f} s, tuned in {chosen - compiled:.0f} s, compiled for other "
            f"heads in {time.monotonic() - chosen:.0f} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def rows_of(self, name: str, shape: Shape) -> Iterator[str]:
        op, peer, title = OPS[name], self.args.peer, f"| {name} | {'x'.join(map(str, shape))}"
        inputs = op.inputs(shape)
        floor = floors_ms(inputs, self.bandwidth)
        for who in ["ours", *([peer] if peer else [])]:
            call = getattr(op, who)
            try:
                output, gradient = errors(op, shape, call)
                if who == "ours" and not (output < OUTPUT_TOLERANCE and gradient < GRADIENT_TOLERANCE):
                    yield f"{title} | ours | not timed: off by {output:.4f}, {gradient:.4f} |"
                    return
                timing = measure(call, inputs, self.args.repeat_ms)
            except Exception as refusal:
                if who == "ours":
                    raise
                yield f"{title} | {who} | refused: {type(refusal).__name__} |"
                return
            self.timings[name, shape, who] = timing
            yield row(name, shape, who, timing, floor, f"{output:.4f}, {gradient:.4f}", self.ratios(name, shape, who))
        del inputs
        torch.cuda.empty_cache()

    def ratios(self, name: str, shape: Shape, who: str) -> str:
        """Return a peer's times over ours; of ours with one gate a token, its times over those without gates."""
        other = {"scalar_gated": "linear", "gated_delta": "delta"}.get(name) if who == "ours" else name
        base = self.timings.get((other or name, shape, "ours"))
        if other is None or base is None:
            return ""
        found = self.timings[name, shape, who]
        return f"{found.forward_ms[0] / base.forward_ms[0]:.2f}x, {found.both_ms[0] / base.both_ms[0]:.2f}x"

    def means(self, name: str) -> Iterator[str]:
        """Yield the geometric means over shapes of a peer's times over ours, and the least and the memory's most."""
        pairs = [
            (self.timings[name, shape, "ours"], self.timings[name, shape, self.args.peer])
            for shape in self.args.shapes
            if (name, shape, self.args.peer) in self.timings
        ]
        if not pairs:
            return
        forward = [peer.forward_ms[0] / ours.forward_ms[0] for ours, peer in pairs]
        both = [peer.both_ms[0] / ours.both_ms[0] for ours, peer in pairs]
        memory = max(ours.peak_mib / peer.peak_mib for ours, peer in pairs)
        yield (
            f"| {name} | geometric mean of {len(pairs)} | {self.args.peer} over ours | {mean(forward):.2f}x (least "
            f"{min(forward):.2f}x) | | {mean(both):.2f}x (least {min(both):.2f}x) | | ours at most {memory:.2f}x | | |"
        )


def mean(ratios: list[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def row(name: str, shape: Shape, who: str, timing: Timing, floor: tuple[float, float], error: str, ratios: str) -> str:
    def cell(ms: tuple[float, float, float], lowest: float) -> str:
        return f"{ms[0]:.3f} ({ms[1]:.3f}..{ms[2]:.3f}) | {ms[0] / lowest:.1f}"

    times = f"{cell(timing.forward_ms, floor[0])} | {cell(timing.both_ms, floor[1])}"
    return f"| {name} | {'x'.join(map(str, shape))} | {who} | {times} | {timing.peak_mib:.0f} | {error} | {ratios} |"


def versions_used(peer: str | None) -> str:
    """Return what a result ran on: versions, the peer's too where there is one, and the card."""
    found = f"torch {torch.__version__}, Triton {triton.__version__}, {torch.cuda.get_device_name()}"
    if peer:
        from importlib.metadata import version

        found += f", flash-linear-attention {version('flash-linear-attention')}"
    return found


def header(args: argparse.Namespace, bandwidth: float) -> list[str]:
    versions = versions_used(args.peer)
    tuned = ", ".join("x".join(map(str, shape)) for shape in tuned_shapes(args.shapes))
    return [
        f"Command: `python -m benchmarks.kernels {' '.join(sys.argv[1:])}`",
        f"Commit {args.commit}; {versions}; copy bandwidth {bandwidth / 1e9:.2f} TB/s; bf16.",
        *(
            [f"The peer's autotuner chose from its whole space at {tuned}, and keeps its choice elsewhere."]
            * bool(args.peer)
        ),
        "",
        "Times are ms, median (20th..80th percentile). Floor: multiple of the I/O floor. Error: RMS against fp64 of",
        "the output and the worst gradient, at one sequence of up to 1024 tokens. Ratio, forward and both: a",
        "peer's times over ours; of ours with a gate a token, its times over those without a gate.",
        "",
        "| op | B x T x H x D | who | forward ms | floor | forward + backward ms | floor | peak MiB | error | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["fla"], help="also time this library, which must be installed")
    parser.add_argument("--ops", default="linear,scalar_gated,gla", help=f"comma-separated, of {', '.join(OPS)}")
    parser.add_argument("--shapes", default=SHAPES, help="comma-separated BxTxHxD")
    parser.add_argument("--first-call", action="store_true", help="time ops' first calls, at the first shape, only")
    parser.add_argument("--repeat-ms", type=int, default=100, help="time spent on each measurement")
    parser.add_argument("--processes", type=int, default=16, help="processes that compile ahead")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="seconds after which no row is begun")
    parser.add_argument("--commit", default=None, help="commit to report where git cannot tell")
    parser.add_argument("--write", metavar="FILE", help="also write the table to this file, row by row")
    args = parser.parse_args()
    args.ops = args.ops.split(",")
    for name in args.ops:
        if name not in OPS:
            parser.error(f"--ops: unknown op {name!r}; known are {', '.join(OPS)}")
    args.shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    args.commit = args.commit or current_commit()
    return args


def emit(line: str, file: TextIO | None) -> None:
    """Print a line, and write it where a run that is cut keeps it."""
    print(line, flush=True)
    if file:
        file.write(line + "\n")
        file.flush()


def main() -> None:
    args = parse()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.kernels: no CUDA device is visible; run it on a machine with one.")
    if args.first_call:
        for line in first_calls(args.ops, args.shapes[0]):
            emit(line, None)
        return
    deadline = time.monotonic() + args.budget_s
    if args.peer:
        importlib.import_module(args.peer)  # before many processes do: it compiles much Python, and they find it done
    choices: Choices = {}
    with ExitStack() as stack:
        file = stack.enter_context(Path(args.write).open("w")) if args.write else None
        pool = stack.enter_context(ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")))
        stack.enter_context(sharing_choices(choices))
        if file:
            file.write(f"# Kernels, {torch.cuda.get_device_name()}, {datetime.date.today():%Y-%m}\n\n")
        bandwidth = copy_bandwidth()
        for line in header(args, bandwidth):
            emit(line, file)
        for line in Run(args, pool, bandwidth, deadline, choices, {}).rows():
            emit(line, file)


if __name__ == "__main__":
    main()
