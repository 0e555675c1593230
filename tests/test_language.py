"""The language end to end: what loads, what is refused and with which words, what is the same architecture."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from archspec import yamltext
from archspec.canonical import architecture_hash
from archspec.errors import SpecError
from archspec.json_schema import spec_schema
from archspec.loading import MODELS, load, loads
from archspec.lowering import plan

SHIPPED = sorted(MODELS.glob("*.yaml"))

BASE = """\
name: base
model_dim: 32
blocks:
  main:
    mixer:
      num_heads: 2
      memory: {memory}
      bias: {bias}
      retention: {retention}
      update: {update}
layout: {layout}
"""


def text(
    memory: str = "matrix",
    bias: str = "l2",
    retention: str = "none",
    update: str = "gradient_descent",
    layout: str = "main",
) -> str:
    return BASE.format(memory=memory, bias=bias, retention=retention, update=update, layout=layout)


def problems(document: str | bytes) -> list[str]:
    with pytest.raises(SpecError) as caught:
        loads(document if isinstance(document, str) else document.decode("latin-1"), "my.yaml")
    return [str(problem) for problem in caught.value.problems]


def same(first: dict[str, str], second: dict[str, str]) -> bool:
    return architecture_hash(loads(text(**first))) == architecture_hash(loads(text(**second)))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_specs_load_and_satisfy_the_json_schema(path: Path) -> None:
    spec = load(path)
    document = yamltext.parse(path.read_text(), path.name)
    jsonschema.Draft202012Validator(spec_schema()).validate(document)
    dumped = load(json.loads(json.dumps(spec.dump())))
    assert dumped == spec
    assert architecture_hash(dumped) == architecture_hash(spec)
    assert plan(spec).layers


def test_the_json_schema_refuses_what_the_loader_refuses() -> None:
    validator = jsonschema.Draft202012Validator(spec_schema())
    good = yamltext.parse(text(), "good.yaml")
    validator.validate(good)
    for change in ({"bias": "hubber"}, {"memory": {"kind": "mlp", "depht": 2}}, {"num_heads": "two"}):
        bad = json.loads(json.dumps(good))
        bad["blocks"]["main"]["mixer"].update(change)
        assert not validator.is_valid(bad)
        with pytest.raises(SpecError):
            load(bad)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("3:1", "3:1"),
        ("1e-3", 1e-3),
        ("no", "no"),
        ("yes", "yes"),
        ("5_000_000", 5_000_000),
        ("0x10", "0x10"),
        ("010", "010"),
        ("2023-13-45", "2023-13-45"),
        ("2023-01-02", "2023-01-02"),
        ("null", None),
        ("true", True),
        (".5", 0.5),
        (".inf", ".inf"),
        ("'1'", "1"),
    ],
)
def test_scalars_mean_what_they_look_like(written: str, value: object) -> None:
    found = yamltext.parse(f"x: {written}", "my.yaml")["x"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("a: 1\na: 2\n", "my.yaml:2: the key 'a' stands twice here (first at line 1); keep one."),
        ("a: &x 1\n", "my.yaml:1 a: found the anchor &x; anchors are not part of the language: use 'extends'."),
        ("a: *x\n", "my.yaml:1 a: found the alias *x; aliases are not part of the language: use 'extends'."),
        ("a: !!python/object:os.system x\n", "tags are not part of the language."),
        ("a: {<<: {b: 1}}\n", "my.yaml:1 a: found the merge key '<<'"),
        ("a: 1\n---\nb: 2\n", "found a second document; a file holds one."),
        ("[" * 5000, "nested deeper than 40 levels"),
        (f"a: {'9' * 5000}\n", "a number of 5000 digits; at most 18 are allowed."),
        ("a: 1e999\n", "is too large"),
        ("1: a\n", "found '1' as a key; keys are text"),
        ("", "found nothing at the top of the document; required: a mapping."),
        ("- a\n", "found a list at the top of the document; required: a mapping."),
        ("a: [1, 2\n", "not YAML"),
        ("a: \0\n", "not YAML"),
    ],
)
def test_what_yaml_gets_wrong_is_one_clear_error(document: str, said: str) -> None:
    assert any(said in problem for problem in problems(document)), problems(document)


def test_a_file_that_is_no_text_is_refused() -> None:
    with pytest.raises(SpecError, match="not UTF-8 text"):
        yamltext.parse(b"a: \xff\xfe", "my.yaml")
    with pytest.raises(SpecError, match="a document has at most"):
        yamltext.parse("a" * 1_000_001, "my.yaml")


def test_errors_carry_line_and_path_and_come_together() -> None:
    document = text(memory="{kind: mlp, depht: 3}", bias="hubber", update="{kind: gradient_descent, anchor: tokn}")
    memory, bias, anchor = problems(document)
    assert memory.startswith("my.yaml:7 blocks.main.mixer.memory.depht: unknown key 'depht'; known here: activation, ")
    assert memory.endswith(" Did you mean 'depth'?")
    assert bias.startswith("my.yaml:8 blocks.main.mixer.bias: unknown attentional bias 'hubber'; known: dot, huber, ")
    assert bias.endswith(" Did you mean 'huber'?")
    assert anchor == (
        "my.yaml:10 blocks.main.mixer.update.anchor: an anchor is 'token', a chunk length or {every, ...}; "
        "found 'tokn'."
    )


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"layout": "mian"}, "layout: no block 'mian'; known: main. Did you mean 'main'?"),
        ({"memory": "kv"}, "memory kv stores tokens and has no weights for gradient_descent to move"),
        ({"update": "nonparametric"}, "update nonparametric reads stored tokens, and memory matrix stores none"),
        ({"memory": "{kind: matrix, normalizer: {}}"}, "the sum of written keys is a normaliser only when writing"),
        ({"retention": "{kind: decay, gate: linear}"}, "keeps a fraction in [0, 1], and linear ranges over"),
        ({"retention": "{kind: decay, gate: nowhere}"}, "unknown gate 'nowhere'"),
        ({"update": "{kind: gradient_descent, step_size: tanh}"}, "must not be negative, and tanh ranges over [-1, 1]"),
        ({"memory": "mlp", "retention": "{kind: decay, gate: {kind: sigmoid, per: value}}"}, "per value has no axis"),
        ({"retention": "{kind: lq, gate: sigmoid}"}, "lq has no value at zero weights"),
        ({"bias": "lp"}, "the required key 'p' is missing"),
        (
            {"memory": "mlp", "update": "conjugate_gradient"},
            "conjugate_gradient solves linear regression: it needs memory matrix and bias l2.",
        ),
        (
            {"bias": "{kind: huber, form: norm, threshold: {kind: softplus, per: value}}"},
            "compares the threshold with a norm over the channels",
        ),
    ],
)
def test_what_means_nothing_names_the_rule_and_a_remedy(choices: dict[str, str], said: str) -> None:
    assert any(said in problem for problem in problems(text(**choices))), problems(text(**choices))


DECAY = "{{kind: decay, gate: {gate}, order: {order}}}"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"bias": "{kind: lp, p: 2}"}, {"bias": "l2"}),
        ({"bias": "{kind: lp, p: 1}"}, {"bias": "l1"}),
        ({"retention": "{kind: decay, gate: 1}"}, {"retention": "none"}),
        ({"retention": "{kind: decay, gate: gdn}"}, {"retention": "{kind: decay, gate: {kind: gdn}}"}),
        ({"update": "{kind: momentum, momentum: 0}"}, {"update": "gradient_descent"}),
        ({"bias": "dot", "update": "{kind: gradient_descent, anchor: 16}"}, {"bias": "dot"}),
        (
            {"bias": "dot", "retention": DECAY.format(gate="gdn", order="together")},
            {"bias": "dot", "retention": DECAY.format(gate="gdn", order="decay_first")},
        ),
        (
            {
                "update": "{kind: gradient_descent, anchor: 1}",
                "retention": DECAY.format(gate="gdn", order="decay_first"),
            },
            {"retention": DECAY.format(gate="gdn", order="together")},
        ),
        ({"layout": "{repeat: 2, of: main}"}, {"layout": "[main, main]"}),
        ({"layout": "{cycle: 3, of: main}"}, {"layout": "{repeat: 3, of: [main]}"}),
        ({"update": "{kind: gradient_descent, step_size: {kind: constant, value: 1, per: key}}"}, {}),
    ],
)
def test_true_merges_share_a_hash(first: dict[str, str], second: dict[str, str]) -> None:
    assert same(first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"bias": "{kind: lp, p: 2, smoothing: 10}"}, {"bias": "l2"}),
        ({"bias": "{kind: huber, threshold: 1}"}, {"bias": "{kind: huber, threshold: 2}"}),
        (
            {"retention": DECAY.format(gate="gdn", order="together")},
            {"retention": DECAY.format(gate="gdn", order="decay_first")},
        ),
        (
            {"bias": "dot", "retention": DECAY.format(gate="gdn", order="step_first")},
            {"bias": "dot", "retention": DECAY.format(gate="gdn", order="together")},
        ),
        ({"update": "{kind: gradient_descent, anchor: 16}"}, {}),
        ({"layout": "{loop: 2, of: main}"}, {"layout": "{repeat: 2, of: main}"}),
        ({"memory": "{kind: mlp, depth: 1}"}, {"memory": "matrix"}),
        ({"update": "implicit"}, {}),
    ],
)
def test_tempting_merges_do_not(first: dict[str, str], second: dict[str, str]) -> None:
    assert not same(first, second)


def test_extends_amends_restarts_and_replaces(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text(text(retention="{kind: decay, gate: {kind: sigmoid, temperature: 4}}"))
    amended = loads(
        "extends: parent.yaml\nname: child\nblocks: {main: {mixer: {retention: {gate: {floor: 0.5}}}}}\n",
        folder=tmp_path,
    )
    gate: Any = amended.blocks["main"].mixer.retention.gate  # type: ignore[attr-defined]
    assert (gate.temperature, gate.floor) == (4.0, 0.5)
    restarted = loads(
        "extends: parent.yaml\nname: child\nblocks: {main: {mixer: {retention: {gate: {kind: sigmoid}}}}}\n",
        folder=tmp_path,
    )
    assert restarted.blocks["main"].mixer.retention.gate.temperature == 1.0  # type: ignore[attr-defined]
    (tmp_path / "loop.yaml").write_text("extends: loop.yaml\nname: loop\n")
    with pytest.raises(SpecError, match="extends itself"):
        load(tmp_path / "loop.yaml")
    with pytest.raises(SpecError, match=r"no block 'mian' in parent.yaml; known: main. Did you mean 'main'\?"):
        loads("name: x\nmodel_dim: 8\nblocks: {a: parent.yaml#mian}\nlayout: a\n", folder=tmp_path)


def archspec(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "archspec", *arguments], capture_output=True, text=True, check=False)


def test_the_command_line_validates_without_torch(tmp_path: Path) -> None:
    good = archspec("validate", *(str(path) for path in SHIPPED))
    assert (good.returncode, good.stderr) == (0, "")
    (tmp_path / "bad.yaml").write_text(text(bias="hubber"))
    bad = archspec("validate", str(tmp_path / "bad.yaml"))
    assert bad.returncode == 2
    assert "bad.yaml:8 blocks.main.mixer.bias: unknown attentional bias 'hubber'" in bad.stderr
    assert "Traceback" not in bad.stderr
    verbs = "; ".join(f"main([{verb!r}, {str(SHIPPED[0])!r}])" for verb in ("validate", "explain"))
    program = f"import sys; from archspec.commands import main; {verbs}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("arguments", [(), ("nosuchverb",), ("validate",), ("explain", "nosuch.yaml")])
def test_usage_errors_exit_with_2_and_no_traceback(arguments: tuple[str, ...]) -> None:
    found = archspec(*arguments)
    assert found.returncode == 2
    assert "error: " in found.stderr
    assert "Traceback" not in found.stderr


def mutated(source: str, rng: random.Random) -> str:
    """Damage a document as people and disks do: characters, lines, indentation, values."""
    lines = source.splitlines()
    for _ in range(rng.randint(1, 4)):
        index = rng.randrange(len(lines))
        kind = rng.randrange(7)
        if kind == 0:
            lines[index] = lines[index][: rng.randrange(len(lines[index]) + 1)]
        elif kind == 1:
            lines.insert(index, lines[rng.randrange(len(lines))])
        elif kind == 2:
            lines[index] = " " * rng.randrange(6) + lines[index].strip()
        elif kind == 3:
            place = rng.randrange(len(lines[index]) + 1)
            lines[index] = lines[index][:place] + rng.choice("{}[]:,&*!|>%@`\"'#-\t\0é💥0 ") + lines[index][place:]
        elif kind == 4:
            head, _, _ = lines[index].partition(":")
            lines[index] = (
                f"{head}: {rng.choice(['null', '-1', '1e400', '[]', '{}', 'true', '1e-3', '{kind: 3}', 'x'])}"
            )
        elif kind == 5:
            del lines[index]
            lines = lines or [""]
        else:
            lines[index] = lines[index].replace(rng.choice("aeiou: "), rng.choice("aeiou_"), 1)
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_documents_are_refused_or_mean_something(seed: int) -> None:
    """ARCHSPEC_FUZZ sets how many documents there are in all; nothing but SpecError may come out."""
    import os

    rng = random.Random(seed)
    refused = 0
    count = int(os.environ.get("ARCHSPEC_FUZZ", "400")) // 4
    for _ in range(count):
        path = rng.choice(SHIPPED)
        document = mutated(path.read_text(), rng)
        try:
            load_result = loads(document, path.name, path.parent)
        except SpecError as error:
            refused += bool(error.problems)
        else:
            assert architecture_hash(load_result)
    assert 0 < refused <= count
