"""The search: spaces, ladders, drivers, tasks, metrics and reports.

    result = archspec.search("specs/searches/quickstart.yaml")       # the module can be called: it is ``run``
    result = archspec.search.run("quickstart", trials=96, workers=2)

Nothing heavy is imported until a search is started.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if not __name__.startswith("archspec."):
    raise ImportError(
        f"imported as {__name__!r}; this folder is the package archspec.search: use `from archspec import search`"
    )

if TYPE_CHECKING:
    from archspec.search.entry import SearchResult as SearchResult
    from archspec.search.entry import run as run
    from archspec.search.records import load_run as load_run

_HOMES = {"SearchResult": "entry", "run": "entry", "load_run": "records"}


class _Callable(ModuleType):
    """A module that starts a search when called."""

    def __call__(self, *arguments: Any, **options: Any) -> SearchResult:
        """Search; see ``archspec.search.entry.run``."""
        result: SearchResult = self.run(*arguments, **options)
        return result


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


sys.modules[__name__].__class__ = _Callable
