"""The folder of a run: its lock, its frozen search file, and writing that a kill cannot tear."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import socket
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from archspec import __version__
from archspec.errors import RunError
from archspec.search.files import write_atomically, write_json
from archspec.search.growth import GROWING, NotGrowth, additions
from archspec.search.report.spectext import spec_text
from archspec.search.searchfile import SearchFile, differences, plain
from archspec.yamltext import parse

SEARCH = "search.yaml"
ENVIRONMENT = "environment.json"
LOCK = "lock"
IDENTITY = "id"
PACKAGES = ("torch", "triton", "optuna", "numpy", "pydantic")


class RunFolder:
    """A run's folder, held by this process until it is closed.

    The lock is the kernel's (flock), so that it ends with its process however that ends: one left by a kill is no
    obstacle. The file says who holds it.
    """

    def __init__(self, path: Path, search: SearchFile) -> None:
        self.path = path
        for folder in (path, path / "results", path / "specs", path / "logs"):
            _make(folder)
        self._lock = _locked(path / LOCK)
        try:
            self._freeze(search)
        except BaseException:
            self.close()
            raise

    @property
    def cache(self) -> Path:
        """What runs side by side share."""
        folder = self.path.parent / ".cache"
        _make(folder)
        return folder

    @property
    def identity(self) -> str:
        """What tells this run from every other, wherever its folder is moved to or seen from."""
        path = self.path / IDENTITY
        if not path.is_file():
            write_atomically(path, lambda file: file.write(f"{uuid.uuid4().hex}\n".encode()))
        return path.read_text().strip()

    @property
    def generation(self) -> int:
        """How often the space of the search file has grown: every file before is kept."""
        return sum(1 for _ in self.path.glob("search-*.yaml"))

    def result(self, key: str) -> Path:
        """Return the file of an evaluation's result."""
        return self.path / "results" / f"{key}.json"

    def spec(self, code: str) -> Path:
        """Return the file of a spec, by its hash."""
        return self.path / "specs" / f"{code}.yaml"

    def write_spec(self, code: str, document: Mapping[str, Any]) -> None:
        """Keep a spec as readable YAML; what a power cut takes of it is drawn again from the event log."""
        text = spec_text(document).encode()
        write_atomically(self.spec(code), lambda file: file.write(text), durable=False)

    def close(self) -> None:
        """Let others have the folder."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _freeze(self, search: SearchFile) -> None:
        path = self.path / SEARCH
        if not path.is_file():
            if any((self.path / "results").iterdir()):
                raise RunError(f"{self.path}: {SEARCH} is missing from a run that has results; restore it")
            write_json(self.path / ENVIRONMENT, environment(search))
            write_atomically(path, lambda file: file.write(spec_text(search.document).encode()))
            return
        frozen = plain(parse(path.read_bytes(), str(path)))
        document = json.loads(json.dumps(search.document))
        changed = list(differences(frozen, document))
        if changed and self._has_grown(frozen, document):
            before = self.path / f"search-{self.generation + 1}.yaml"
            write_atomically(before, lambda file: file.write(spec_text(frozen).encode()))
            write_atomically(path, lambda file: file.write(spec_text(search.document).encode()))
        elif changed:
            shown = "\n  ".join(changed[:10]) + (f"\n  and {len(changed) - 10} more" if len(changed) > 10 else "")
            raise RunError(
                f"{self.path}: this run was started from another search file:\n  {shown}\n"
                "A run keeps its file, so that its trials can be compared. Give the changed one a new name "
                f"(--study {search.settings.study}-2, or 'study:' in the file), or undo the changes to continue. "
                "A space may grow: options after those of a choice, a wider range."
            )

    def _has_grown(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
        """Say whether a file differs from another only in that its space is larger."""
        old, new = ({key: value for key, value in each.items() if key not in GROWING} for each in (before, after))
        try:
            return not list(differences(old, new)) and bool(additions(before, after))
        except NotGrowth:
            return False


def environment(search: SearchFile) -> dict[str, Any]:
    """Return versions, machine and device, for the record."""
    import torch

    found: dict[str, Any] = {
        "archspec": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": available_cores(),
        "host": socket.gethostname(),
        "device": search.settings.device,
        "search_folder": str(search.folder.resolve()),
    }
    if search.settings.device.startswith("cuda") and torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found


def machine(device: str) -> str:
    """Return what evaluations on a device run on: the GPU's name, or the processor's; empty without such a GPU."""
    if not device.startswith("cuda"):
        return _processor()
    import torch

    index = int(device.partition(":")[2] or 0)
    return torch.cuda.get_device_name(index) if torch.cuda.is_available() else ""


def available_cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be made ({error.strerror}); choose another folder with --runs-dir") from error


def _locked(path: Path) -> IO[str]:
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RunError(
            f"{path.parent}: this run is in progress ({holder}); wait for it, stop it, or give a new name with --study"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
