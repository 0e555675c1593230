"""The wheel holds what the tree holds, and the folders beside ``archspec/`` are nobody's top-level packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("blocks", "kernels", "search", "specs")


def run(*command: str, cwd: Path = ROOT) -> str:
    """Return what a command prints; its errors are the test's."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tree() -> list[str]:
    """Return every file that belongs to the project: what git tracks, and what it would if asked to add all."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    return [file for file in listed if (ROOT / file).is_symlink() or (ROOT / file).is_file()]


def packaged(file: str) -> str | None:
    """Return where a file of the tree stands in the wheel; None when it does not belong there."""
    top = file.partition("/")[0]
    if (ROOT / file).is_symlink() or "/" not in file:
        return None
    return file if top == "archspec" else f"archspec/{file}" if top in LINKED else None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return the names in a wheel built from a clean copy of the tree, as a checkout would be."""
    copy = tmp_path_factory.mktemp("checkout")
    for file in tree():
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, copy / file, follow_symlinks=False)
    out = tmp_path_factory.mktemp("wheel")
    options = ("--no-isolation", "--wheel", "--outdir", str(out))
    run(sys.executable, "-m", "build", *options, cwd=copy)
    (built,) = out.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_file_of_every_package_and_nothing_else(wheel: set[str]) -> None:
    wanted = {name for file in tree() if (name := packaged(file)) is not None}
    found = {name for name in wheel if ".dist-info/" not in name}
    assert sorted(wanted - found) == [], "missing from the wheel: add them to [tool.setuptools] in pyproject.toml"
    assert sorted(found - wanted) == [], "in the wheel and not in the tree"
    assert "archspec/py.typed" in found


def test_package_list_is_the_tree() -> None:
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    names = [packaged(file) for file in tree() if file.endswith("/__init__.py")]
    wanted = sorted(name.removesuffix("/__init__.py").replace("/", ".") for name in names if name is not None)
    assert configured == wanted


def test_every_folder_with_code_is_a_package() -> None:
    files = [name for file in tree() if (name := packaged(file)) is not None and name.endswith(".py")]
    folders = {name.rpartition("/")[0] for name in files}
    assert [folder for folder in sorted(folders) if f"{folder}/__init__.py" not in files] == []


@pytest.mark.parametrize("folder", LINKED)
def test_top_folder_refuses_its_bare_name(folder: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    wanted = (
        f"ImportError: imported as '{folder}'; this folder is the package archspec.{folder}: "
        f"use `from archspec import {folder}`"
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == wanted


@pytest.mark.parametrize("folder", LINKED)
def test_links_point_at_the_folders(folder: str) -> None:
    link = ROOT / "archspec" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{folder}"


def test_no_file_is_named_after_a_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    distributions = {_distribution(requirement) for requirement in listed}
    imported = metadata.packages_distributions()
    names = {name for name, owners in imported.items() if distributions & {_normal(owner) for owner in owners}}
    assert {"torch", "optuna", "yaml", "numpy", "pytest"} <= names
    # Beside a script such a file would be imported instead; ray and jax may come later or from the user.
    taken = names | {"ray", "jax", "triton"}
    clashes = [file for file in tree() if file.endswith(".py") and Path(file).stem in taken]
    assert clashes == []


def _distribution(requirement: str) -> str:
    name = requirement.partition(";")[0]
    for mark in "<>=!~[ ":
        name = name.partition(mark)[0]
    return _normal(name)


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


def test_metadata_names_the_distribution_and_the_command(wheel: set[str]) -> None:
    assert any(name.startswith("archspec_search-") and name.endswith("/entry_points.txt") for name in wheel)
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
