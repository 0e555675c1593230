"""Loads every component module: the package's one dynamic import.

A new choice is one new file in one of the folders below, or a module outside the package that is named by
``--plugin``, by ``ARCHSPEC_PLUGINS`` (a comma-separated list, which worker processes inherit), or by an entry point
of the group ``archspec.components``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
from collections.abc import Iterable

from archspec.errors import ArchspecError

BLOCK_FOLDERS = (
    "archspec.blocks.memories",
    "archspec.blocks.biases",
    "archspec.blocks.retentions",
    "archspec.blocks.updates",
    "archspec.blocks.feature_maps",
    "archspec.blocks.gates",
    "archspec.blocks.projections",
    "archspec.blocks.norms",
    "archspec.blocks.positions",
    "archspec.blocks.feed_forwards",
    "archspec.blocks.mixers",
    "archspec.blocks.nodes",
    "archspec.blocks.outputs",
    "archspec.blocks.inputs",
    "archspec.blocks.heads",
)
SEARCH_FOLDERS = ("archspec.search.tasks", "archspec.search.metrics")
PLUGINS_VARIABLE = "ARCHSPEC_PLUGINS"
ENTRY_POINT_GROUP = "archspec.components"

_loaded: set[str] = set()


def load_blocks() -> None:
    """Register every choice a spec can make: the shipped ones and those of plug-ins."""
    _load_folders(BLOCK_FOLDERS)
    _load_plugins()


def load_search() -> None:
    """Register every task and metric as well."""
    load_blocks()
    _load_folders(SEARCH_FOLDERS)


def add_plugins(modules: Iterable[str]) -> None:
    """Import modules that define components, here and in every process started from now on.

    Raises:
        ArchspecError: when a module cannot be imported; the message says which and why.
    """
    names = [name for name in os.environ.get(PLUGINS_VARIABLE, "").split(",") if name]
    names.extend(name for name in modules if name not in names)
    for name in names:
        _load_plugin(name, f"--plugin {name}")
    os.environ[PLUGINS_VARIABLE] = ",".join(names)


def plugins() -> list[str]:
    """Return the plug-in modules in force, in the order they were named."""
    return [name for name in os.environ.get(PLUGINS_VARIABLE, "").split(",") if name]


def _load_folders(folders: Iterable[str]) -> None:
    for folder in folders:
        if folder in _loaded:
            continue
        package = importlib.import_module(folder)
        for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
            importlib.import_module(f"{folder}.{module}")
        _loaded.add(folder)


def _load_plugins() -> None:
    for name in plugins():
        _load_plugin(name, f"{PLUGINS_VARIABLE}={name}")
    if ENTRY_POINT_GROUP in _loaded:
        return
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        _load_plugin(point.value.partition(":")[0], f"entry point {point.name}")
    _loaded.add(ENTRY_POINT_GROUP)


def _load_plugin(name: str, origin: str) -> None:
    if name in _loaded:
        return
    try:
        importlib.import_module(name)
    except Exception as error:
        raise ArchspecError(
            f"{origin}: the plug-in cannot be imported ({type(error).__name__}: {error}); "
            "it must be a module on Python's path that defines archspec components"
        ) from error
    _loaded.add(name)
