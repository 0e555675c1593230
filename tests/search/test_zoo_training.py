"""The training figure over all shipped models: resumable, and honest about what was not run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from archspec import complexity, loading
from archspec.canonical import architecture_hash
from archspec.search.baselines import resized
from benchmarks import zoo

QUICK = ["--steps", "2", "--batch-size", "2", "--length", "16", "--parameters", "20000", "--test-tokens", "64"]


def test_results_are_kept_after_every_model_and_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "zoo.json"
    assert zoo.main([*QUICK, "--models", "transformer", "--output", str(output)]) == 0
    first = json.loads(output.read_text())
    more = ["--models", "transformer,gla,retnet", "--processes", "2"]
    assert zoo.main([*QUICK, *more, "--output", str(output)]) == 0
    both = json.loads(output.read_text())
    assert both["models"]["transformer"] == first["models"]["transformer"]
    assert set(both["models"]) == {"transformer", "gla", "retnet"}
    assert "gla" in first["not_run"]
    assert "gla" not in both["not_run"]
    found = both["models"]["gla"]
    assert found["tokens"] == 2 * 2 * 16
    assert found["architecture"] == architecture_hash(loading.load("gla"))
    assert 0 < found["bits_per_byte"] < 16
    assert abs(found["parameters"] - 20_000) < 2_000
    table = output.with_suffix(".md").read_text()
    assert f"| {found['bits_per_byte']:.3f} |" in table
    assert "Not run:" in table
    assert "3 trained, 0 diverged" in capsys.readouterr().out


def test_a_file_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    output = tmp_path / "zoo.json"
    zoo.write({}, zoo.Settings(steps=1), output)
    with pytest.raises(SystemExit, match="written with other settings"):
        zoo.main([*QUICK, "--models", "gla", "--output", str(output)])


def test_a_model_that_changed_is_trained_again(tmp_path: Path) -> None:
    output = tmp_path / "zoo.json"
    settings = zoo.Settings(2, 2, 2, 16, test_tokens=64)
    now = architecture_hash(loading.load("gla"))
    rows = {"gla": {"architecture": now}, "retnet": {"architecture": "another"}, "kda": {}, "renamed": {}}
    zoo.write({name: {"parameters": 1, "device": "cpu", **row} for name, row in rows.items()}, settings, output)
    assert set(zoo.recorded(output, settings)) == {"gla", "kda"}


def test_divergence_is_a_result_and_an_exit_code(tmp_path: Path) -> None:
    output = tmp_path / "zoo.json"
    arguments = [*QUICK, "--models", "linear_attention", "--learning-rate", "1e6", "--output", str(output)]
    assert zoo.main([*arguments, "--steps", "20"]) == 1
    assert "training diverged at step" in json.loads(output.read_text())["models"]["linear_attention"]["diverged"]
    assert "| diverged |" in output.with_suffix(".md").read_text()


@pytest.mark.parametrize("name", ["s4d", "atlas", "rwkv7"])
def test_models_of_one_channel_a_head_and_of_many_heads_reach_the_size(name: str) -> None:
    path = loading.find(name, Path())
    document, _ = resized(loading.resolve(loading.read(path), path.parent), 300_000, 256)
    found = complexity.predict(loading.validate(document), 256).non_embedding_parameters
    assert abs(found - 300_000) <= 0.05 * 300_000
