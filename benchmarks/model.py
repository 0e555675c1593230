"""Train and decode whole compiled models, beside a peer's of the same dimensions, on one CUDA device.

    python -m benchmarks.model --peer fla --models deltanet,kda --write benchmarks/results/model.md

A model is what a user of either library gets: ours by `archspec.compile`, the peer's by its class for causal language
models. Training is forward and backward of the token loss in bf16, in tokens a second: launched from the host and once
more through `archspec.training_graph`, the peer's too where it can be captured. Decoding is one token a sequence and
step after a short prompt: ours through a CUDA graph, the peer's by its own eager step. Small sizes for a trial:
--layers 2 --width 256 --batch 2 --length 256 --decode 1,4.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import archspec
from archspec.decoding import GraphDecoder
from archspec.training_graph import TrainingGraph
from benchmarks.kernels import emit, versions_used
from benchmarks.recording import current_commit
from benchmarks.tuning import Choices, compile_ahead, sharing_choices

# The peer's dependencies look for a package named `kernels`; from the repository's root they would find this folder.
sys.modules["kernels"] = None  # type: ignore[assignment]

MODELS = ("deltanet", "gated_deltanet", "kda")
PROMPT = 32  # tokens; a fixed state makes a decoded token's time independent of it
GRAPH = ", graph"  # ends the measures of training through one
GIB = 2**30

Loss = Callable[[Tensor], Tensor]
Step = Callable[[Tensor], object]


@dataclass(frozen=True)
class Contender:
    """One library's model: its parameters, its loss, and how it starts to decode after a prompt [B, T]."""

    module: nn.Module
    loss: Loss
    decode: Callable[[Tensor], Step]


def spec_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the shipped model at the benchmark's size: heads of ``--head-dim``, the peer's inner width."""
    inner = 256 * -(-(args.width * 8 // 3) // 256)
    feed_forward = {"kind": "swiglu", "expansion": inner / args.width, "multiple_of": 64}
    heads = {"num_heads": args.width // args.head_dim, "key_dim": args.head_dim, "value_dim": args.head_dim}
    return {
        "extends": name,
        "name": f"{name}_benchmark",
        "model_dim": args.width,
        "blocks": {"main": {"mixer": heads, "feed_forward": feed_forward}},
        "layout": {"repeat": args.layers, "of": "main"},
        "output": {"tied": False},
    }


def ours(name: str, args: argparse.Namespace) -> Contender:
    model = archspec.compile(spec_of(name, args), vocab_size=args.vocab, device="cuda", dtype=torch.bfloat16)

    def loss(tokens: Tensor) -> Tensor:
        # The labels are shifted, not the logits: a slice of those would be copied, 2 GB at the default size.
        wanted = functional.pad(tokens[:, 1:], (0, 1), value=-100)
        return functional.cross_entropy(model(tokens).logits.flatten(0, 1), wanted.flatten())

    def decode(prompt: Tensor) -> Step:
        return GraphDecoder(model, model(prompt).state).step

    return Contender(model, loss, decode)


def fla(name: str, args: argparse.Namespace) -> Contender:
    peers = importlib.import_module("fla.models")

    heads = args.width // args.head_dim
    common = {
        "hidden_size": args.width, "num_hidden_layers": args.layers, "num_heads": heads, "vocab_size": args.vocab
    }  # fmt: skip
    config, kind = {
        "deltanet": lambda: (peers.DeltaNetConfig(**common), peers.DeltaNetForCausalLM),
        "gated_deltanet": lambda: (
            peers.GatedDeltaNetConfig(**common, head_dim=args.head_dim, expand_v=1.0),
            peers.GatedDeltaNetForCausalLM,
        ),
        "kda": lambda: (peers.KDAConfig(**common, head_dim=args.head_dim), peers.KDAForCausalLM),
    }[name]()
    model = kind(config).to("cuda", torch.bfloat16)

    def loss(tokens: Tensor) -> Tensor:
        found: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return found

    def decode(prompt: Tensor) -> Step:
        model.eval()
        cache = model(input_ids=prompt, use_cache=True).past_key_values

        def step(token: Tensor) -> object:
            return model(input_ids=token[:, None], past_key_values=cache, use_cache=True).logits

        return step

    return Contender(model, loss, decode)


LIBRARIES: dict[str, Callable[[str, argparse.Namespace], Contender]] = {"ours": ours, "fla": fla}


def timed(call: Callable[[], object], repeats: int, warm_up: int) -> tuple[float, float, float]:
    """Return the median ms of one call by CUDA events, with the fastest and slowest."""
    found = []
    for index in range(warm_up + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if index >= warm_up:
            found.append(start.elapsed_time(end))
    return statistics.median(found), min(found), max(found)


def training(contender: Contender, args: argparse.Namespace, graph: bool) -> tuple[tuple[float, float, float], float]:
    """Return ms of a forward and backward pass, and the peak GiB allocated (at the capture, of a graph)."""
    tokens = torch.randint(args.vocab, (args.batch, args.length), device="cuda")
    contender.module.train()

    def eagerly() -> None:
        contender.module.zero_grad(set_to_none=True)
        torch.autograd.backward(contender.loss(tokens))

    if graph:
        torch.cuda.reset_peak_memory_stats()
        step = TrainingGraph(contender.module, contender.loss, tokens)
        found = timed(lambda: step(tokens), args.repeats, 3)
    else:
        eagerly()
        torch.cuda.reset_peak_memory_stats()
        found = timed(eagerly, args.repeats, 2)
    contender.module.zero_grad(set_to_none=True)
    return found, torch.cuda.max_memory_allocated() / GIB


@torch.no_grad()
def decoding(contender: Contender, batch: int, args: argparse.Namespace) -> tuple[float, float, float]:
    """Return ms of one decoded token of each of ``batch`` sequences."""
    prompt = torch.randint(args.vocab, (batch, PROMPT), device="cuda")
    step = contender.decode(prompt)
    token = prompt[:, -1].contiguous()
    return timed(lambda: step(token), 4 * args.repeats, 5)


def rows(args: argparse.Namespace) -> Iterator[str]:
    """Yield a table row a model, measure and library; peers' rows end with the ratio of their time to ours."""
    missing = []
    for name in args.models:
        if time.monotonic() > args.deadline:
            missing.append(name)
            continue
        own: dict[str, float] = {}
        for who in ["ours", *([args.peer] if args.peer else [])]:
            for measure, found in measures(name, who, args):
                if isinstance(found, str):
                    yield f"| {name} | {measure} | {who} | {found} | | |"
                    continue
                (median, low, high), note = found
                ratio = ratios(median, measure, own)
                if who == "ours":
                    own[measure] = median
                yield f"| {name} | {measure} | {who} | {median:.2f} ({low:.2f}..{high:.2f}) | {note} | {ratio} |"
    if missing:
        yield f"\nThe budget of {args.budget_s} s left no time for: {', '.join(missing)}."


def ratios(median: float, measure: str, own: dict[str, float]) -> str:
    """Return a peer's ms over ours, and over ours through a graph where there is that; "" of what ours has not."""
    found = [(own[measure + ending], ending) for ending in ("", GRAPH) if measure + ending in own]
    return "; ".join(f"{median / ms:.2f}x{ending}" for ms, ending in found)


def measures(
    name: str, who: str, args: argparse.Namespace
) -> Iterator[tuple[str, tuple[tuple[float, float, float], str] | str]]:
    """Yield (measure, times and a note, or why there are none)."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        contender = LIBRARIES[who](name, args)
    except Exception as refusal:  # noqa: BLE001 - the table says that a library refused, and how
        yield "build", _refused(refusal)
        return
    count = sum(parameter.numel() for parameter in contender.module.parameters()) / 1e6
    if args.batch:
        for graph in [False, *([True] if args.graph else [])]:
            measure = f"train B={args.batch} T={args.length}{GRAPH if graph else ''}"
            try:
                times, peak = training(contender, args, graph)
            except Exception as refusal:  # noqa: BLE001 - as above: out of memory, or a compiler the peer refuses
                yield measure, _refused(refusal)
            else:
                rate = args.batch * args.length / times[0]
                yield measure, (times, f"{rate:.1f}k tokens/s, {peak:.1f} GiB, {count:.0f}M parameters")
            gc.collect()
            torch.cuda.empty_cache()
    for batch in args.decode:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            yield f"decode B={batch}", (decoding(contender, batch, args), "ms a token")
        except Exception as refusal:  # noqa: BLE001 - as above
            yield f"decode B={batch}", _refused(refusal)


def run_layer(name: str, who: str, args: argparse.Namespace) -> None:
    """Train and decode one layer once, in a process that compiles it, with a vocabulary whose logits take no memory."""
    few = argparse.Namespace(**vars(args) | {"layers": 1, "repeats": 1, "vocab": 256, "graph": False})
    for measure, found in measures(name, who, few):
        if isinstance(found, str):
            raise RuntimeError(f"{measure}: {found}")


def _refused(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"refused: {type(error).__name__}: {lines[0][:120] if lines else ''}"


def header(args: argparse.Namespace) -> list[str]:
    versions = versions_used(args.peer)
    plans = "; ".join(
        f"{name}: {archspec.explain(spec_of(name, args), device='cuda').plan.summary()}" for name in args.models
    )
    return [
        f"Command: `python -m benchmarks.model {' '.join(sys.argv[1:])}`",
        f"Commit {args.commit}; {versions}; bf16; {args.layers} layers, width {args.width}, heads of {args.head_dim},",
        f"{args.vocab} tokens in the vocabulary. What ours runs on: {plans}.",
        "",
        "Times are ms, median (fastest..slowest). Last column: the peer's time over ours, of training from the host",
        "also over ours through a graph; above 1, ours is faster.",
        "",
        "| model | measure | who | ms | note | ratio |",
        "|---|---|---|---|---|---|",
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["fla"], help="also time this library, which must be installed")
    parser.add_argument("--models", default="deltanet,kda", help=f"comma-separated, of {', '.join(MODELS)}")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024, help="channels of the model")
    parser.add_argument("--head-dim", type=int, default=128, help="channels of a key and of a value")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=16, help="sequences of a training step; 0 does not train")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a training sequence")
    parser.add_argument(
        "--graph", action=argparse.BooleanOptionalAction, default=True, help="train through a CUDA graph too"
    )
    parser.add_argument("--decode", default="1,64", help="comma-separated batch sizes of decoding; empty: none")
    parser.add_argument("--repeats", type=int, default=5, help="timed training steps; four times as many tokens")
    parser.add_argument("--processes", type=int, default=16, help="processes that compile ahead")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="seconds after which no measure is begun")
    parser.add_argument("--commit", default=None, help="commit to report where git cannot tell")
    parser.add_argument("--write", metavar="FILE", help="also write the table to this file, row by row")
    args = parser.parse_args()
    args.models = args.models.split(",")
    for name in args.models:
        if name not in MODELS:
            parser.error(f"--models: unknown model {name!r}; known are {', '.join(MODELS)}")
    args.decode = [int(batch) for batch in args.decode.split(",") if batch]
    if args.width % args.head_dim:
        parser.error(f"--width {args.width} is not a multiple of --head-dim {args.head_dim}")
    args.commit = args.commit or current_commit()
    return args


def compile_models(args: argparse.Namespace, choices: Choices) -> None:
    """Compile all models' kernels in processes that are gone, with their share of the card, when models are timed."""
    began = time.monotonic()
    jobs = [("ours", 2), *([(args.peer, args.processes)] if args.peer else [])]
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        compile_ahead(
            pool,
            [
                (f"{who} {name}", partial(run_layer, name, who, args), parts)
                for name in args.models
                for who, parts in jobs
            ],
            choices,
        )
    print(f"compiled in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    args = parse()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.model: no CUDA device is visible; run it on a machine with one.")
    args.deadline = time.monotonic() + args.budget_s
    if args.peer:
        importlib.import_module(f"{args.peer}.models")  # before many processes do: it compiles much Python
    choices: Choices = {}
    with ExitStack() as stack:
        file = stack.enter_context(Path(args.write).open("w")) if args.write else None
        if file:
            file.write(f"# Whole models, {torch.cuda.get_device_name()}, {datetime.date.today():%Y-%m}\n\n")
        stack.enter_context(sharing_choices(choices))
        compile_models(args, choices)
        for line in header(args):
            emit(line, file)
        for line in rows(args):
            emit(line, file)


if __name__ == "__main__":
    main()
