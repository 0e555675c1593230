"""No spec may claim to be exact, or say what differs, without a file here that holds it against its equations."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import archspec
from archspec.loading import MODELS

NAMES = sorted(path.stem for path in MODELS.glob("*.yaml"))


def held(path: Path) -> set[tuple[str, ...]]:
    """Return (model, backends tested) of every call of ``hold`` in a file."""
    found: set[tuple[str, ...]] = set()
    for function in ast.parse(path.read_text()).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        marks = [ast.unparse(mark) for mark in function.decorator_list]
        both = any("'auto', 'reference'" in mark for mark in marks)
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "hold":
                name = ast.literal_eval(call.args[0])
                found.add((name, "auto", "reference") if both else (name,))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_claim_of_fidelity_is_backed_by_a_token_loop(name: str) -> None:
    about = archspec.load(name).about
    if about.fidelity == "own":
        return
    path = Path(__file__).with_name(f"test_{name}.py")
    assert path.is_file(), f"specs/models/{name}.yaml says fidelity: {about.fidelity}; write {path.name}"
    assert (name, "auto", "reference") in held(path), f"{path.name} must hold {name!r} on both backends"


def test_every_shipped_spec_names_its_source() -> None:
    for name in NAMES:
        about = archspec.load(name).about
        assert about.title, name
        assert about.fidelity == "own" or about.source, name
