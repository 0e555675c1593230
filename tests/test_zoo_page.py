"""``archspec list``: the zoo as a table that fits the terminal, as BibTeX, and as docs/zoo.md, which is up to date."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from archspec.canonical import architecture_hash
from archspec.commands import main
from archspec.loading import MODELS, load

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "zoo.md"
RESULTS = ROOT / "benchmarks" / "results" / "zoo_training.json"
NAMES = sorted(path.stem for path in MODELS.glob("*.yaml"))


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["list", *arguments]) == 0
    return capsys.readouterr().out


def test_the_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    results = ["--results", str(RESULTS)] if RESULTS.exists() else []
    scored = " --results benchmarks/results/zoo_training.json" if results else ""
    message = f"stale: run `archspec list --markdown{scored} > docs/zoo.md`"
    assert listed(capsys, "--markdown", *results) == PAGE.read_text(encoding="utf-8"), message


def test_scores_enter_the_page_when_there_are_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "zoo_training.json"
    common = {"parameters": 300_000, "steps": 200, "device": "cpu"}
    models = {
        "gla": {"bits_per_byte": 3.25, **common},
        "kda": {"bits_per_byte": 3.25, "architecture": "another", **common},
        "retnet": {"bits_per_byte": 3.5, "architecture": architecture_hash(load("retnet")), **common},
        "transformer": {"bits_per_byte": 3.375, **common},
        "yaad": {"diverged": "loss is nan", **common},
    }
    path.write_text(json.dumps({"settings": {}, "models": models, "not_run": []}))
    found = listed(capsys, "--markdown", "--results", str(path))
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in found.splitlines() if line.startswith("| ")}
    assert rows["gla"].endswith("| arXiv:2312.06635 | 3.250 (-0.125) |")
    assert rows["retnet"].endswith("| 3.500 (+0.125) |")
    assert rows["transformer"].endswith("| 3.375 (+0.000) |")
    assert rows["yaad"].endswith("| diverged |")
    assert rows["kda"].endswith("|  |")
    assert rows["mamba"].endswith("|  |")
    assert "Not trained since they changed: kda." in found
    assert "after 200 steps, at 300,000 to 300,000 parameters, on cpu" in found


@pytest.mark.parametrize("text", ["{", "[]", '{"models": [1]}'])
def test_a_file_that_holds_no_scores_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text)
    assert main(["list", "--markdown", "--results", str(path)]) == 1
    assert "name a file of benchmarks.zoo" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["list", "--results", str(path)])
    assert "only the page of the models has scores" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    found = listed(capsys)
    assert max(map(len, found.splitlines())) <= width
    for header in ("memory", "bias", "retention", "update", "family", "state", "time", "fidelity", "source"):
        assert header in found
    assert "…" not in found
    for name in NAMES:
        assert name[:21] in found
    for whole in ("gradient_descent@16", "conjugate_gradient", "complex_decay/value", "2412.06464", "softmax"):
        assert whole in found


def test_rows_say_how_work_grows(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in json.loads(listed(capsys, "--json"))}
    assert sorted(rows) == NAMES
    assert {
        name: rows[name]["time"] for name in ("transformer", "sliding_window", "gla", "hybrid_3_1", "titans_mac")
    } == {
        "transformer": "T^2",
        "sliding_window": "T",
        "gla": "T",
        "hybrid_3_1": "T^2",
        "titans_mac": "T",
    }
    assert rows["gated_deltanet"]["retention"] == "decay(ssd/head)"
    assert rows["hybrid_3_1"]["memory"] == "matrix + kv"


def test_every_source_is_a_bibtex_entry(capsys: pytest.CaptureFixture[str]) -> None:
    entries = listed(capsys, "--bibtex").split("\n\n")
    rows = [row for row in json.loads(listed(capsys, "--json")) if row["source"]]
    assert len(entries) == len(rows)
    for row, entry in zip(rows, entries, strict=True):
        assert entry.startswith(f"@misc{{{row['name']},\n  title = {{{row['title']}}},")
        assert row["source"].partition(":")[2] in entry
        assert entry.count("{") == entry.count("}")
