"""``archspec explain FILE``: what a spec compiles to, on which kernels, and why; with its predicted sizes."""

from __future__ import annotations

import argparse
import json
from typing import Any

from archspec.commands import positive
from archspec.errors import EXIT_OK
from archspec.launches import H100_MULTIPROCESSORS


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("explain", help="show families, forms, kernels and sizes", description=__doc__)
    parser.add_argument("file", metavar="FILE", help="a spec or a shipped model's name")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="type of device (default: cpu)")
    parser.add_argument("--vocab-size", type=positive, default=256, help="number of tokens (default: 256, bytes)")
    parser.add_argument("--context", type=positive, default=2048, help="tokens in the context (default: 2048)")
    parser.add_argument("--batch", type=positive, default=1, help="sequences at a time, for launches (default: 1)")
    parser.add_argument(
        "--multiprocessors",
        type=positive,
        default=H100_MULTIPROCESSORS,
        help=f"of the CUDA device (default: {H100_MULTIPROCESSORS}, an H100 or H200)",
    )
    parser.add_argument("--json", action="store_true", help="data instead of text")
    parser.add_argument("--plugin", action="append", metavar="MODULE", help="a module that defines components")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the explanation."""
    from archspec.explanation import explain

    sizes = {"context": args.context, "batch": args.batch, "multiprocessors": args.multiprocessors}
    found = explain(args.file, device=args.device, vocab_size=args.vocab_size, **sizes)
    print(json.dumps(found.data(), indent=2) if args.json else found)
    return EXIT_OK
