"""``archspec export``: a folder that stands alone, written whole, whose model is the one that was trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from archspec import load_exported
from archspec.commands import main
from archspec.compiler import compile as compile_spec
from archspec.errors import EXIT_ERROR, EXIT_OK, RunError, UsageError
from archspec.search import evaluation
from archspec.search.export import export
from archspec.search.recipe import Recipe
from archspec.search.records import Run, load_run
from archspec.search.tasks.recall import Recall
from archspec.search.training import evaluate

MakeRun = Callable[..., Path]
Captured = pytest.CaptureFixture[str]

TASK = Recall(vocab_size=24, sequence_length=16, num_kv_pairs=2)
RECIPE = {"batch_size": 8, "learning_rates": [0.01], "eval_tokens": 256, "test_tokens": 512, "precision": "fp32"}
TRAINED = {1: "a delta rule", 2: "an anchored MLP with momentum", 10: "attention"}


@pytest.fixture
def trained(make_run: MakeRun) -> Run:
    """Return a run in which some trials were truly trained, by the search's own evaluation."""
    folder = make_run(12)
    run = load_run(folder)
    for number in TRAINED:
        trial = run.trials[number]
        request: dict[str, Any] = {
            "key": f"{number:04d}-1-train-recall", "trial": number, "stage": "1/train/recall", "rung": 1,
            "kind": "train", "spec": trial.spec, "hash": trial.hash, "plan": trial.plan, "figures": trial.figures,
            "results": str(folder / "results"), "seed": 0, "device": "cpu", "task_name": "recall", "task": TASK.dump(),
            "recipe": RECIPE, "tokens": 8 * 16 * 6, "keep_weights": True,
        }  # fmt: skip
        result = evaluation.evaluate(request)
        assert result["status"] == "ok", result
    return load_run(folder)


@pytest.fixture
def exported(trained: Run, tmp_path: Path) -> Path:
    """Return an export of the delta rule."""
    return export(trained, trained.trials[1], tmp_path / "winner")


@pytest.mark.parametrize("number", TRAINED, ids=TRAINED.get)
def test_the_exported_model_is_the_trained_one(trained: Run, tmp_path: Path, number: int) -> None:
    trial = trained.trials[number]
    model = load_exported(export(trained, trial, tmp_path / "out"))
    assert not model.training
    # The same bits in, the same bits out: the recorded test scores come back without any rounding.
    recorded = trial.result("1/train/recall")["value"]["result"]["runs"][0]["test"]
    assert evaluate(model, TASK, Recipe.model_validate(RECIPE), "test") == recorded
    original = compile_spec(trial.spec, vocab_size=24, seed=5).eval()
    original.load_state_dict(load_file(trial.weights["recall"]))
    tokens = torch.randint(24, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, original(tokens).logits)
        fresh = compile_spec(trial.spec, vocab_size=24, seed=0).eval()
        assert not torch.equal(model(tokens).logits, fresh(tokens).logits), "training must have changed something"


def test_the_folder_stands_alone(exported: Path, trained: Run) -> None:
    names = sorted(path.name for path in exported.iterdir())
    assert names == ["README.md", "environment.json", "scores.json", "spec.yaml", "weights.safetensors"]
    scores = json.loads((exported / "scores.json").read_text())
    assert scores["weights"] == {"task": "recall", "vocab_size": 24, "file": "weights.safetensors",
                                 "split": "best step on validation"}  # fmt: skip
    assert scores["trial"]["scores"]["recall/accuracy"]["n"] == 3
    environment = json.loads((exported / "environment.json").read_text())
    assert environment["packages"]["torch"] == "2.13.0"
    readme = (exported / "README.md").read_text()
    assert "archspec.load_exported('winner')" in readme
    assert "2x matrix / l2 / decay(gdn) / gradient_descent" in readme
    assert "| recall accuracy | 0.867±0.012 |" in readme
    assert str(trained.folder) not in readme


def test_the_readme_s_lines_run_where_nothing_else_is(exported: Path) -> None:
    code = (exported / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("logits =", "import torch; tokens = torch.zeros(2, 5, dtype=torch.int64)\nlogits =")
    code += "print(tuple(logits.shape))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=exported.parent, env=os.environ, check=False)
    assert done.stdout == "(2, 5, 24)\n", done.stderr


def test_an_existing_folder_is_kept_unless_forced(exported: Path, trained: Run, capsys: Captured) -> None:
    again = ["export", str(trained.folder), "transformer", "-o", str(exported)]
    before = (exported / "spec.yaml").read_text()
    assert main(["export", str(trained.folder), "10", "-o", str(exported)]) == EXIT_ERROR
    assert "exists already; give another folder, or --force" in capsys.readouterr().err
    assert (exported / "spec.yaml").read_text() == before
    assert main(["export", str(trained.folder), "10", "-o", str(exported), "--force"]) == EXIT_OK
    assert capsys.readouterr().out == f"{exported}\n"
    assert "kv" in (exported / "spec.yaml").read_text()
    # A forced export that fails leaves the earlier one in place, and nothing beside it.
    assert main([*again, "--force"]) == EXIT_ERROR
    assert "kv" in (exported / "spec.yaml").read_text()
    assert [path.name for path in exported.parent.iterdir() if "winner" in path.name] == ["winner"]


def test_force_does_not_replace_what_is_no_export(trained: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with pytest.raises(RunError, match="is not an export, so --force does not replace it"):
        export(trained, trained.trials[1], tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "precious"


def test_a_trial_without_weights_is_refused_with_those_that_have_some(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"trial 4 \(quick-4\) has no stored weights: it is evaluated; .*#1 gated_delta"):
        export(trained, trained.trials[4], tmp_path / "out")
    with pytest.raises(UsageError, match=r"unknown task with weights 'txt'; known: recall"):
        export(trained, trained.trials[1], tmp_path / "out", task="txt")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_spec_are_refused(exported: Path) -> None:
    stored = load_file(exported / "weights.safetensors")
    stored["layers.0.mixer.output"] = stored["layers.0.mixer.output"][:-1].clone()
    save_file(stored, exported / "weights.safetensors")
    with pytest.raises(RunError, match=r"disagree on layers\.0\.mixer\.output; export the trial again"):
        load_exported(exported)
    (exported / "weights.safetensors").write_bytes(b"not tensors")
    with pytest.raises(RunError, match=r"holds no tensor 'embedding\.weight'"):
        load_exported(exported)
    (exported / "weights.safetensors").unlink()
    with pytest.raises(RunError, match=r"weights\.safetensors is missing; required: a folder that 'archspec export'"):
        load_exported(exported)


def test_exporting_imports_no_torch(trained: Run, tmp_path: Path) -> None:
    code = (
        "import sys; from archspec.commands import main\n"
        f"assert main(['export', {str(trained.folder)!r}, '1', '-o', {str(tmp_path / 'lean')!r}]) == 0\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("False\n"), done.stderr
