"""Options with values that they cannot have: exit code 2, and one line that says what is required."""

from __future__ import annotations

from pathlib import Path

import pytest

from archspec.commands import main
from archspec.errors import EXIT_ERROR, EXIT_INVALID


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--executor locl", "unknown executor 'locl'; known: inprocess, local, ray. Did you mean 'local'?"),
        ("--address auto", "--address auto: executor local has no address; use --executor ray"),
        ("--executor inprocess --workers 2", "found 2 workers; there is one, the driver itself"),
        ("--executor inprocess --set evaluation_timeout_s=5", "use --executor local"),
        ("--executor ray --device cuda:1", "Ray chooses the GPU; use --device cuda"),
        ("--device banana", "found 'banana'; required: cpu or cuda"),
        ("--timeout -1", "timeout_s: found -1.0; required: greater than 0"),
        ("--timeout soon", "argument --timeout: invalid float value: 'soon'"),
        ("--trials 0", "argument --trials: found 0; required: a whole number of at least 1"),
        ("--trials many", "argument --trials: found many; required: a whole number of at least 1"),
        ("--seed -5", "seed: found -5; required: greater than or equal to 0"),
        ("--study ../x", "study: found '../x'; required: a folder's name"),
        ("--set nonsense", "--set nonsense: required: PATH=VALUE"),
        ("--set sampler=guess", "sampler"),
        ("--storage studies.db", "required: a database's URL"),
    ],
)
def test_of_a_search(
    tmp_path: Path, tiny_file: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(["search", str(tiny_file), "--runs-dir", str(tmp_path / "runs"), *options.split()]) == EXIT_INVALID
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    "command",
    ["explain transformer --vocab-size 0", "explain transformer --context -1", "list --context 0", "list modells"],
)
def test_of_commands_on_specs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code(command.split()) == EXIT_INVALID
    assert "error: archspec" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["resume", "status", "pareto", "replay", "analyze", "compare"])
def test_a_run_that_is_not_there_is_no_usage_error(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [str(tmp_path / "other")] if command == "compare" else []
    assert code([command, str(tmp_path / "none"), *more]) == EXIT_ERROR
    assert "no run here" in capsys.readouterr().err


def code(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as ended:  # argparse's own way out
        return int(str(ended.code))
