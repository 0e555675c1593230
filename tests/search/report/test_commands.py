"""``archspec pareto``, ``show`` and ``status``: what they print, how wide, and what they say when they cannot."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len

from archspec.commands import main
from archspec.errors import EXIT_ERROR, EXIT_OK
from archspec.search.eventlog import EVENTS

MakeRun = Callable[..., Path]
Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("columns", [50, 80, 120])
@pytest.mark.parametrize("verb", ["pareto", "show", "status"])
def test_no_line_is_wider_than_the_terminal(
    make_run: MakeRun, capsys: Captured, monkeypatch: pytest.MonkeyPatch, verb: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    folder = make_run(60, names={20: "a-name-that-goes-on-" * 5})
    monkeypatch.chdir(folder.parent.parent)
    assert main([verb, "quick", *(["20"] if verb == "show" else [])]) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    # A command and a spec are there to be copied: they are never broken, and come last.
    end = next((at for at, line in enumerate(lines) if line.startswith(("continue: ", "spec"))), len(lines))
    assert max(map(cell_len, lines[:end])) <= columns
    assert not [line for line in lines if line.strip() in ("…", "│", "|")]


def test_pareto_shows_the_front_and_writes_the_report(make_run: MakeRun, capsys: Captured) -> None:
    folder = make_run(60)
    assert main(["pareto", str(folder)]) == EXIT_OK
    captured = capsys.readouterr()
    assert "11 of 14 trained trials are on the front" in captured.out
    assert "0.867±0.012" in captured.out
    assert "baseline: 2x matrix / l2 / decay(gdn) / gradient_descent" in captured.out
    assert "knee" in captured.out
    assert "reference point" in captured.out
    assert "not enough evidence" in captured.out
    assert captured.err == f"report: {folder / 'report.html'}\n"
    assert (folder / "report.html").is_file()


def test_pareto_all_adds_what_lies_behind_the_front(make_run: MakeRun, capsys: Captured, tmp_path: Path) -> None:
    folder = make_run(60)
    assert main(["pareto", str(folder), "--json"]) == EXIT_OK
    front = json.loads(capsys.readouterr().out)
    assert main(["pareto", str(folder), "--json", "--all", "-o", str(tmp_path / "mine.html")]) == EXIT_OK
    everything = json.loads(capsys.readouterr().out)
    assert [trial["number"] for trial in front["trials"]] == [
        trial["number"] for trial in everything["trials"] if trial["front"]
    ]
    assert len(everything["trials"]) == 14
    accuracies = [trial["scores"]["recall/accuracy"]["mean"] for trial in everything["trials"]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert everything["front"] == front["front"] == sorted(trial["number"] for trial in front["trials"])
    assert (tmp_path / "mine.html").read_text() == (folder / "report.html").read_text()


def test_show_finds_a_trial_by_number_name_and_hash(make_run: MakeRun, capsys: Captured) -> None:
    folder = make_run(20)
    shown = []
    for name in ("5", "#5", "quick-5", f"{5 * 2654435761:016x}"[:13]):
        assert main(["show", str(folder), name]) == EXIT_OK
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1
    parts = ["quick-5  #5  trained", "promoted by rank", "lp p=3", "recall accuracy", "▁", "n = 3", "name: quick-5"]
    parts += ["no faster form computes this function", "results/0005-1-train-recall.json", "archspec export"]
    text = " ".join(shown[0].split())
    for part in parts:
        assert " ".join(part.split()) in text


def test_show_json_holds_the_whole_trial(make_run: MakeRun, capsys: Captured) -> None:
    assert main(["show", str(make_run(20)), "transformer", "--json"]) == EXIT_OK
    data = json.loads(capsys.readouterr().out)
    assert data["number"] == 0
    assert data["spec"]["model_dim"] == 64
    assert data["plan"][0]["family"] == "softmax"
    assert [point["tokens"] for point in data["curves"]["recall"]][:2] == [20_000, 40_000]
    assert Path(data["files"]["1/train/text"]).is_file()


def test_show_says_why_a_trial_was_rejected(make_run: MakeRun, capsys: Captured) -> None:
    assert main(["show", str(make_run(20)), "20"]) == EXIT_OK
    assert "constraint state_bytes: state_bytes is 2097152, over the maximum of 1048576" in capsys.readouterr().out


def test_status_counts_and_names_the_best(make_run: MakeRun, capsys: Captured) -> None:
    folder = make_run(60)
    assert main(["status", str(folder)]) == EXIT_OK
    out = capsys.readouterr().out
    assert "0.867±0.012  #1 gated_deltanet" in out
    assert "archspec search specs/searches/quickstart.yaml --study quick" in out
    assert main(["status", str(folder), "--json"]) == EXIT_OK
    data = json.loads(capsys.readouterr().out)
    assert (data["counts"]["trained"], data["counts"]["duplicates"], data["running"]) == (14, 1, [])


def test_names_cannot_command_the_terminal(make_run: MakeRun, capsys: Captured) -> None:
    folder = make_run(10, names={5: "\x1b[2Jgone\x07[bold]\n\u202ename"})
    for arguments in (["pareto", str(folder), "--all"], ["show", str(folder), "5"], ["status", str(folder)]):
        assert main(arguments) == EXIT_OK
        out = capsys.readouterr().out
        assert not [c for c in out if not c.isprintable() and c != "\n"]
        assert "[bold]" in out or arguments[0] == "status"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pareto", "quikc"], "no run here (events.jsonl is missing, also under runs); did you mean 'runs/quick'?"),
        (["status", "elsewhere"], "runs under runs: quick"),
        (["show", "quick", "quick-55"], "no trial 'quick-55'; known: numbers 0 to 22"),
        (["show", "quick", "transfromer"], "Did you mean 'transformer'"),
    ],
)
def test_errors_say_what_is_there(
    make_run: MakeRun, capsys: Captured, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(make_run(20).parent.parent)
    assert main(arguments) == EXIT_ERROR
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_pareto_of_a_run_without_trained_trials_says_so(make_run: MakeRun, capsys: Captured) -> None:
    folder = make_run(10)
    lines = (folder / EVENTS).read_text().splitlines(keepends=True)
    (folder / EVENTS).write_text("".join(line for line in lines if "1/train" not in line))
    assert main(["pareto", str(folder)]) == EXIT_ERROR
    assert "no trial is trained yet (10 evaluated, 0 failed); required: at least one" in capsys.readouterr().err


def test_without_any_run_the_first_step_is_named(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["status", "anything"]) == EXIT_ERROR
    assert "start one with 'archspec search FILE'" in capsys.readouterr().err


def test_looking_at_results_imports_no_torch(make_run: MakeRun) -> None:
    folder = make_run(10)
    code = (
        "import sys; from archspec.commands import main\n"
        "for verb, *rest in (['pareto'], ['show', '5'], ['status']):\n"
        f"    assert main([verb, {str(folder)!r}, *rest]) == 0\n"
        "print(sorted({'torch', 'optuna', 'ray', 'pydantic'} & set(sys.modules)), file=sys.stderr)"
    )
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_killed_driver_is_told_from_a_running_one(make_run: MakeRun, capsys: Captured) -> None:
    folder = make_run(10, status=None)
    states = []
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    for process, host in ((os.getpid(), socket.gethostname()), (int(gone.stdout), socket.gethostname()), (1, "other")):
        (folder / "lock").write_text(f"process {process} on {host}\n")
        assert main(["status", str(folder), "--json"]) == EXIT_OK
        states.append(json.loads(capsys.readouterr().out)["status"])
    assert states == ["running", "killed", "running"]
