"""How far evaluations in progress are: a small file that the driver rewrites now and then, for who looks from outside.

    progress.json    key of a running evaluation -> what it said last

It is news, not record: nothing is decided by it, and the log alone says what is running.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from archspec.search.files import write_json
from archspec.search.records import Run

PROGRESS = "progress.json"
WRITE_EVERY_S = 2.0


class Watch:
    """Keeps what running evaluations said last; what another driver left is removed."""

    def __init__(self, folder: Path) -> None:
        self._path, self._said = folder / PROGRESS, dict[str, Mapping[str, Any]]()
        self._is_news, self._written = False, -math.inf
        self._path.unlink(missing_ok=True)

    def note(self, data: Mapping[str, Any]) -> None:
        """Take note of what an evaluation says."""
        self._said[data["key"]] = data
        self._is_news = True

    def write(self, run: Run) -> None:
        """Write what is new, unless that was done a moment ago."""
        if self._is_news and time.monotonic() - self._written >= WRITE_EVERY_S:
            self._said = {key: said for key, said in self._said.items() if key in run.running}
            write_json(self._path, self._said)
            self._is_news, self._written = False, time.monotonic()


def said(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what evaluations said last, by key; those of a run that is over included."""
    path = folder / PROGRESS
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}


def how_far(data: Mapping[str, Any]) -> str:
    """Return in words how far an evaluation is: ``40%  train  validation 0.31  on node-3``."""
    words = []
    if "tokens" in data:
        score = data["validation"]
        words.append(f"{min(1.0, data['tokens'] / max(1, data['budget_tokens'])):4.0%}  {data['phase']}")
        words.append(f"validation {score:.4g}" if isinstance(score, float) else "validation -")
    elif "phase" in data:
        words.append(data["phase"])
    return "  ".join([*words, *([f"on {data['node']}"] if "node" in data else [])])
