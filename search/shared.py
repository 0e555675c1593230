"""Results shared across studies: one folder that searches fetch finished evaluations from and leave theirs in.

    <folder>/<code>/<machine>/<key>.json      (and <key>.safetensors: trained weights)

``key`` says what determines a result: architecture, work, data, budget, seed, device and version (``requests``).
``code`` is a digest of the sources that computed it, those of a user's tasks and metrics included, and ``machine`` the
processor or GPU, so that a measured time is never taken for another machine's. Only successes are shared.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import archspec
from archspec.errors import RunError
from archspec.search.files import write_atomically, write_json
from archspec.search.rundir import machine

PACKAGE = Path(archspec.__file__).parent


class SharedResults:
    """The results of one code on one machine.

    Args:
        folder: the shared folder; ``user`` is the one in the user's cache directory.
        device: where candidates run.
        modules: modules of the user's that define components.
    """

    def __init__(self, folder: str, device: str, modules: tuple[str, ...] = ()) -> None:
        self._folder = user_folder() if folder == "user" else Path(folder).expanduser()
        self._code = code_version(modules)
        self._machine = machine(device)

    def fetch(self, request: Mapping[str, Any], into: Path) -> bool:
        """Copy a request's result to its place in a run, if there is one; say whether there was."""
        shared = self._place(self._machine) / into.name
        if not self._machine or not shared.is_file() or request.get("is_continued"):
            return False  # checkpoints are not shared: what a higher rung continues from is computed here
        try:
            result = json.loads(shared.read_bytes())
        except (OSError, ValueError) as error:
            raise RunError(f"{shared}: a shared result cannot be read ({error}); remove it") from error
        if result["key"] != request["key"]:
            raise RunError(f"{shared}: this is the result of {result['key']}; remove it")
        weights = shared.with_suffix(".safetensors")
        if request.get("keep_weights") and not weights.is_file():
            return False
        if weights.is_file():
            _copy(weights, into.with_suffix(".safetensors"))
        own = {name: request[name] for name in ("trial", "stage", "rung", "spec", "plan")}
        write_json(into, {**result, **own, "reused": True})
        return True

    def keep(self, path: Path, result: Mapping[str, Any]) -> None:
        """Leave a run's result for others, unless it is a failure, came from here, or is here already."""
        if result["status"] != "ok" or result.get("reused") or not result.get("machine"):
            return
        shared = self._place(result["machine"]) / path.name
        if shared.is_file():
            return
        try:
            shared.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{shared.parent}: cannot be made ({error.strerror}); choose another 'cache'") from error
        weights = path.with_suffix(".safetensors")
        if weights.is_file():
            _copy(weights, shared.with_suffix(".safetensors"))
        write_json(shared, result)

    def _place(self, where: str) -> Path:
        return self._folder / self._code / (re.sub(r"[^A-Za-z0-9._-]+", "_", where) or "unknown")


def user_folder() -> Path:
    """Return the folder in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "archspec" / "results"


@cache
def code_version(modules: tuple[str, ...] = ()) -> str:
    """Return a digest of this package's sources and of the files of the modules named."""
    digest = hashlib.sha256()
    sources = [
        Path(folder) / name
        for folder, _, names in os.walk(PACKAGE, followlinks=True)  # the packages are links in a checkout
        for name in names
        if name.endswith(".py")
    ]
    files = {str(path.relative_to(PACKAGE)): path for path in sources}
    for name in modules:
        found = getattr(sys.modules.get(name), "__file__", None)
        if found:
            files[f"<module {name}>"] = Path(found)
    for label in sorted(files):
        digest.update(label.encode() + b"\0" + files[label].read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        write_atomically(target, lambda out: shutil.copyfileobj(file, out))
