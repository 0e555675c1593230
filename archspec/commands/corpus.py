"""``archspec corpus [SOURCE...] -o FILE``: freeze a text corpus, split and hashed, into one file that travels."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from archspec.errors import EXIT_OK, ArchspecError


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("corpus", help="freeze a text corpus into one file", description=__doc__)
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="files, globs, or a frozen corpus to describe (default: the Python standard library's source)",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="where to write it; without, it is only described")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument("--json", action="store_true", help="data instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build or open the corpus, write it when asked, and say what is in it."""
    from archspec.search import corpus

    if args.output and Path(args.output).exists() and not args.force:
        raise ArchspecError(f"{args.output}: the file exists; name another or add --force.")
    found = corpus.open_corpus(_source(args.sources, corpus.STANDARD_LIBRARY))
    if args.output:
        corpus.freeze(found, args.output)
    sizes = found.manifest["num_bytes"]
    documents = found.manifest["documents"]
    dropped = sum("repeats" in document for document in documents)
    data = {"source": found.manifest["source"], "hash": found.hash, "bytes": sizes, "dropped": dropped}
    if args.output:
        data["file"] = args.output
    if args.json:
        print(json.dumps(data))
    else:
        print(f"corpus   {data['source']}")
        print(f"hash     {found.hash}")
        print(f"bytes    {', '.join(f'{name} {size:,}' for name, size in sizes.items())}")
        print(f"kept     {len(documents) - dropped:,} documents; {dropped:,} near-duplicates dropped")
        if args.output:
            print(f"written  {args.output}")
    return EXIT_OK


def _source(sources: list[str], default: str) -> str | tuple[str, ...]:
    return default if not sources else sources[0] if len(sources) == 1 else tuple(sources)
