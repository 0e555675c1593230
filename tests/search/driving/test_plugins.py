"""A bias, a retention, an update and a memory, each one file outside the package: in YAML, commands and workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from archspec.search.records import load_run

BIAS = '''
"""l = sum_i log cosh r_i: quadratic near zero, linear far away."""
from archspec.families import Bias

class LogCosh(Bias, kind="log_cosh"):
    def loss(self, prediction, value, gates):
        r = (prediction - value).abs()
        return (r + (-2 * r).exp().log1p() - 0.6931471805599453).sum(-1)

    def gradient(self, prediction, value, gates):
        return (prediction - value).tanh()
'''
RETENTION = '''
"""Weights that saturate: W = tanh Z, Z linear in the increments."""
from typing import ClassVar
from archspec.families import Gate, Retention

class Saturating(Retention, kind="saturating"):
    gate: Gate | None = None
    has_link: ClassVar[bool] = True

    @property
    def decay_gate(self):
        return self.gate

    def link(self, dual):
        return dual.tanh()
'''
UPDATE = '''
"""A step along the sign of the gradient."""
from archspec.families import Update

class SignDescent(Update, kind="sign_descent"):
    def increment(self, step, buffers):
        return -step.stepped.sign() * step.gates["step_size"], {}
'''
MEMORY = '''
"""M(W, x) = tanh(W^T x)."""
from archspec.families import Memory

class Saturated(Memory, kind="saturated"):
    def weights(self, dims):
        return {"w": (dims.key_dim, dims.value_dim)}

    def initial(self, dims):
        return {}

    def network(self, linear, x, parameters):
        return linear("w", x).tanh()
'''
MODULES = {"outside_bias": BIAS, "outside_retention": RETENTION, "outside_update": UPDATE, "outside_memory": MEMORY}

SPEC = """
name: outside
model_dim: 16
blocks:
  main:
    mixer:
      num_heads: 2
      qk: {norm: l2}
      memory: saturated
      bias: log_cosh
      retention: {kind: saturating, gate: sigmoid}
      update: {kind: sign_descent, step_size: 0.1}
layout: [main, main]
"""
AGREE = """
import sys, torch, archspec
tokens = torch.arange(24).reshape(2, 12) % 7
models = [archspec.compile(archspec.load(sys.argv[1]), vocab_size=7, seed=0, backend=name).double()
          for name in ("auto", "reference")]
fast, plain = (model(tokens) for model in models)
first = models[0](tokens[:, :5])
rest = models[0](tokens[:, 5:], first.state)
split = torch.cat([first.logits, rest.logits], 1)
print(float((fast.logits - plain.logits).abs().max()), float((fast.logits - split).abs().max()))
"""


@pytest.fixture
def outside(tmp_path: Path) -> dict[str, str]:
    """An environment that finds the four files, and in whose folder the spec lies."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(text)
    (tmp_path / "outside.yaml").write_text(SPEC)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path}


def run(args: list[str], folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=folder, env=env, capture_output=True, text=True, timeout=200)


def plugins() -> list[str]:
    return [word for name in MODULES for word in ("--plugin", name)]


def test_commands_know_the_choices_of_files_outside(tmp_path: Path, outside: dict[str, str]) -> None:
    told = run(["-m", "archspec", "explain", "outside.yaml", *plugins()], tmp_path, outside)
    assert told.returncode == 0, told.stderr
    assert all(kind in told.stdout for kind in ("saturated", "log_cosh")), told.stdout
    unknown = run(["-m", "archspec", "validate", "outside.yaml"], tmp_path, outside)
    assert unknown.returncode == 2
    assert "unknown attentional bias 'log_cosh'" in unknown.stderr
    assert "Traceback" not in unknown.stderr


def test_a_model_of_outside_choices_agrees_in_every_form(tmp_path: Path, outside: dict[str, str]) -> None:
    named = {**outside, "ARCHSPEC_PLUGINS": ",".join(MODULES)}
    done = run(["-c", AGREE, "outside.yaml"], tmp_path, named)
    assert done.returncode == 0, done.stderr
    assert all(float(error) < 1e-10 for error in done.stdout.split()), done.stdout  # fp64 rounding over 12 tokens


def test_workers_train_what_files_outside_define(tmp_path: Path, tiny_file: Path, outside: dict[str, str]) -> None:
    text = tiny_file.read_text()
    choices = {
        "memory: matrix": "memory: saturated",
        "bias: {choice: [dot, l2]}": "bias: {choice: [l2, log_cosh]}",
        "retention: {choice: [none, {kind: decay, gate: sigmoid}]}": (
            "retention: {choice: [none, saturating, {kind: saturating, gate: sigmoid}]}"
        ),
        "update: {kind: gradient_descent, step_size: sigmoid}": (
            "update: {choice: [gradient_descent, {kind: sign_descent, step_size: 0.1}]}"
        ),
        "layout: {choice: [main, attention, [main, attention]]}": "layout: main",
        "promote: {count: 3,": "promote: {count: 4,",
    }
    for old, new in choices.items():
        assert old in text
        text = text.replace(old, new)
    tiny_file.write_text(text)
    words = ["-m", "archspec", "search", tiny_file.name, "--workers", "1", "--quiet", "--json", *plugins()]
    done = run(words, tmp_path, outside)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished"
    trials = [trial for trial in load_run(tmp_path / "runs" / "tiny") if trial.state != "rejected"]
    specs = [(tmp_path / f"runs/tiny/specs/{trial.hash}.yaml").read_text() for trial in trials]
    assert all(any(kind in spec for spec in specs) for kind in ("saturated", "log_cosh", "saturating", "sign_descent"))
    assert not [trial.number for trial in trials if trial.state == "failed"]
    trained = [spec for trial, spec in zip(trials, specs, strict=True) if trial.state == "trained"]
    assert any("saturated" in spec for spec in trained)
