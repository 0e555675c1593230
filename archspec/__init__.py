"""archspec: sequence models as specs. Check one, compile it to a torch module, search a space of them.

    import archspec

    spec = archspec.load("gated_deltanet")           # a file, a shipped model's name, or a mapping
    model = archspec.compile(spec, vocab_size=256)   # a torch.nn.Module
    print(archspec.explain(spec))
    result = archspec.search("specs/searches/quickstart.yaml")

Nothing heavy is imported until it is used: ``import archspec`` loads neither torch nor optuna.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archspec import search as search
    from archspec.blocks.carry import State as State
    from archspec.blocks.model import Output as Output
    from archspec.canonical import architecture_hash as architecture_hash
    from archspec.compiler import compile as compile  # noqa: A004
    from archspec.complexity import predict as predict
    from archspec.errors import ArchspecError as ArchspecError
    from archspec.errors import SpecError as SpecError
    from archspec.explanation import explain as explain
    from archspec.loading import load as load
    from archspec.loading import loads as loads
    from archspec.lowering import plan as plan
    from archspec.schema import Spec as Spec
    from archspec.search.export import load_exported as load_exported

__version__ = "0.1.0"

_HOMES = {
    "ArchspecError": "errors",
    "Output": "blocks.model",
    "Spec": "schema",
    "SpecError": "errors",
    "State": "blocks.carry",
    "architecture_hash": "canonical",
    "compile": "compiler",
    "explain": "explanation",
    "load": "loading",
    "load_exported": "search.export",
    "loads": "loading",
    "plan": "lowering",
    "predict": "complexity",
}

__all__ = [*sorted(_HOMES), "__version__", "search"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is not None:
        value = getattr(importlib.import_module(f"archspec.{home}"), name)
    elif name == "search":
        value = importlib.import_module("archspec.search")
    else:
        raise AttributeError(f"module 'archspec' has no attribute {name!r}")
    # Bound here, so that the submodule of the same name (archspec.canonical) does not shadow it later.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
