"""Near-duplicate documents, by the similarity of their sets of byte shingles.

Jaccard similarity of two documents A, B as sets of their distinct w-byte substrings: |A & B| / |A | B|. It is
estimated from bottom-k sketches, the k smallest hashes of each set: the share of the k smallest hashes of the union
that lie in both (Broder, "On the resemblance and containment of documents", 1997). The standard error at
similarity s is sqrt(s (1 - s) / k), 0.03 at most for k = 256.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

SHINGLE_BYTES = 24
SKETCH_SIZE = 256

Sketch = np.ndarray  # distinct uint64 hashes, ascending


def sketch(document: bytes) -> Sketch:
    """Return the ``SKETCH_SIZE`` smallest hashes among the document's shingles, ascending."""
    text = np.frombuffer(document, np.uint8).astype(np.uint64)
    if len(text) < SHINGLE_BYTES:
        text = np.pad(text, (0, SHINGLE_BYTES - len(text)))
    count = len(text) - SHINGLE_BYTES + 1
    hashes = np.zeros(count, np.uint64)
    for offset in range(SHINGLE_BYTES):  # FNV's multiplier; sums wrap modulo 2^64
        hashes = hashes * np.uint64(0x100000001B3) + text[offset : offset + count] + np.uint64(1)
    hashes ^= hashes >> np.uint64(33)  # the finisher of MurmurHash3, so that the order of hashes is random
    hashes *= np.uint64(0xFF51AFD7ED558CCD)
    hashes ^= hashes >> np.uint64(33)
    kept = 8 * SKETCH_SIZE  # room for repeats, which np.unique then removes
    if count > kept:
        hashes = np.partition(hashes, kept)[:kept]
    return np.unique(hashes)[:SKETCH_SIZE]


def similarity(first: Sketch, second: Sketch) -> float:
    """Return the estimated Jaccard similarity of two documents."""
    union = np.union1d(first, second)[:SKETCH_SIZE]
    return float((np.isin(union, first) & np.isin(union, second)).mean())


def repeats(documents: Sequence[bytes], threshold: float) -> dict[int, int]:
    """Return, for each document that repeats one kept before it, which one.

    A document is compared with those kept so far only: what is dropped drops nothing else.
    """
    sketches: list[Sketch] = []
    holders: defaultdict[int, list[int]] = defaultdict(list)  # hash -> kept documents that have it
    found: dict[int, int] = {}
    for number, document in enumerate(documents):
        own = sketch(document)
        sketches.append(own)
        shared = Counter(other for value in own.tolist() for other in holders[value])
        likeness = {
            other: similarity(own, sketches[other])
            for other, count in shared.items()
            # With J >= t, at least t of the union's k smallest are shared: too few shared hashes cannot reach it.
            if count >= threshold * min(len(own), len(sketches[other]))
        }
        nearest = max(likeness, key=lambda other: (likeness[other], -other), default=None)
        if nearest is not None and likeness[nearest] >= threshold:
            found[number] = nearest
            continue
        for value in own.tolist():
            holders[value].append(number)
    return found
