"""Tasks give the same bits for the same arguments, and the sequences and scores they promise."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from archspec.search.corpus import freeze, open_corpus
from archspec.search.families import SPLITS, Batch, Tally, Task
from archspec.search.tasks.recall import Recall
from archspec.search.tasks.text import TextModelling

DIGEST = """
import hashlib
from archspec.search.tasks.recall import Recall
batch = Recall(sequence_length=32).batch("validation", 3, 5, 8)
print(hashlib.sha256(b"".join(part.numpy().tobytes() for part in batch)).hexdigest())
"""


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    letters = np.random.default_rng(0).integers(97, 123, 40_000).astype(np.uint8)
    path = tmp_path / "letters.txt"
    path.write_bytes(letters.tobytes())
    return path


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_tasks_are_written_by_name() -> None:
    assert Task.parse("recall") == Recall()
    assert Task.parse({"kind": "recall", "num_kv_pairs": 8}).dump()["num_kv_pairs"] == 8
    assert isinstance(Task.parse("text"), TextModelling)


@pytest.mark.parametrize("split", SPLITS)
def test_equal_arguments_give_equal_batches(split: str, text_file: Path) -> None:
    for task in (Recall(), TextModelling(corpus=str(text_file), sequence_length=64)):
        assert same(task.batch(split, 1, 2, 8), task.batch(split, 1, 2, 8))  # type: ignore[arg-type]
        assert not same(task.batch(split, 1, 2, 8), task.batch(split, 1, 3, 8))  # type: ignore[arg-type]


def test_recall_is_the_same_in_another_process() -> None:
    runs = [subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout


def test_recall_splits_and_seeds_are_separate_streams() -> None:
    task = Recall()
    batches = [task.batch(split, seed, 0, 64).tokens for split in SPLITS for seed in (0, 1)]
    rows = {tuple(row) for batch in batches for row in batch.tolist()}
    assert len(rows) == 64 * len(batches)


@pytest.mark.parametrize("random_non_queries", [True, False])
def test_recall_asks_every_key_once_for_its_value(random_non_queries: bool) -> None:
    task = Recall(vocab_size=64, sequence_length=48, num_kv_pairs=8, random_non_queries=random_non_queries)
    batch = task.batch("train", 0, 0, 32)
    for tokens, targets, weights in zip(*(part.tolist() for part in batch), strict=True):
        keys, values = tokens[0:16:2], tokens[1:16:2]
        assert len(set(keys)) == len(set(values)) == 8
        assert all(1 <= key < 32 for key in keys)
        assert all(32 <= value < 64 for value in values)
        asked = [place for place, weight in enumerate(weights) if weight == 1]
        assert sum(weights) == len(asked) == 8
        assert all(place >= 16 and place % 2 == 0 for place in asked)
        assert sorted(tokens[place] for place in asked) == sorted(keys)
        answers = dict(zip(keys, values, strict=True))
        assert all(targets[place] == answers[tokens[place]] for place in asked)
        others = {tokens[place] for place in range(16, 48) if place not in asked}
        assert (others == {0}) is not random_non_queries


def test_recall_queries_follow_the_power_law() -> None:
    task = Recall(vocab_size=64, sequence_length=128, num_kv_pairs=1, power_a=0.01)
    weights = task.batch("train", 0, 0, 20_000).weights[:, 2::2]  # [B, slots]
    expected = torch.arange(1, 64).double() ** (0.01 - 1)
    # With one query per sequence each count is binomial: 5 standard deviations of the most frequent slot's share.
    assert torch.allclose(weights.double().mean(0), expected / expected.sum(), atol=5 * math.sqrt(0.17 / 20_000))


def test_accuracy_is_pooled_over_positions_not_averaged_over_batches() -> None:
    task = Recall(vocab_size=8, sequence_length=8, num_kv_pairs=1)
    logits = torch.zeros(1, 4, 8)
    logits[:, :, 5] = 1.0  # answers 5 everywhere
    targets = torch.full((1, 4), 5)
    wrong = torch.full((1, 4), 6)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    one = task.tally(logits, Batch(tokens, targets, torch.tensor([[1.0, 0, 0, 0]])))
    three = task.tally(logits, Batch(tokens, wrong, torch.tensor([[1.0, 1, 1, 0]])))
    assert task.score(one + three)["recall/accuracy"] == 0.25
    log_z = math.log(math.e + 7)
    expected = (log_z - 1 + 3 * log_z) / 4
    # float32 cross-entropy: a few units in the last place.
    assert task.score(one + three)["recall/loss_nats"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequence_length": 63}, "sequence_length=63 is odd"),
        ({"sequence_length": 16, "num_kv_pairs": 8}, "use at least 32"),
        ({"vocab_size": 16, "num_kv_pairs": 8}, "has 7 keys for num_kv_pairs=8"),
    ],
)
def test_recall_refuses_what_does_not_fit(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recall(**fields)  # type: ignore[arg-type]


def test_text_predicts_the_next_byte(text_file: Path) -> None:
    task = TextModelling(corpus=str(text_file), sequence_length=64)
    content = text_file.read_bytes()
    for split in SPLITS:
        batch = task.batch(split, 0, 0, 4)
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            assert bytes([tokens[0], *targets]) in content


def test_text_evaluation_covers_each_window_once(text_file: Path) -> None:
    task = TextModelling(corpus=str(text_file), sequence_length=64)
    count = task.num_sequences("test")
    assert count == 2000 // 64
    batches = [task.batch("test", 0, index, 10).tokens for index in range(4)]
    assert [len(batch) for batch in batches] == [10, 10, 10, 1]
    assert len({tuple(row) for batch in batches for row in batch.tolist()}) == count


def test_text_scores_bits_per_byte() -> None:
    assert TextModelling().score(Tally(loss_nats=8 * math.log(2) * 10, weight=10)) == {
        "text/bits_per_byte": pytest.approx(8.0)
    }


def test_text_reads_the_same_from_a_prepared_folder(text_file: Path, tmp_path: Path) -> None:
    task = TextModelling(corpus=str(text_file), sequence_length=64)
    prepared = task.prepare(tmp_path / "run")
    assert prepared.corpus != task.corpus
    assert prepared.prepare(tmp_path / "run") == prepared
    assert prepared.identity() == task.identity() != task.dump()
    assert same(prepared.batch("train", 4, 5, 6), task.batch("train", 4, 5, 6))


def test_text_says_when_sequences_do_not_fit(text_file: Path, tmp_path: Path) -> None:
    frozen = freeze(open_corpus(str(text_file)), tmp_path / "letters.safetensors")
    with pytest.raises(ValueError, match="sequence_length=4096 does not fit the validation split's 2000 bytes"):
        TextModelling(corpus=str(frozen), sequence_length=4096).batch("validation", 0, 0, 1)


def test_better_follows_the_direction_and_refuses_nan(text_file: Path) -> None:
    recall, text = Recall(), TextModelling(corpus=str(text_file))
    assert recall.better(0.9, than=0.8)
    assert not recall.better(0.8, than=0.8)
    assert text.better(2.0, than=3.0)
    assert text.better(2.0, than=None)
    assert not text.better(math.nan, than=None)
    assert not text.better(math.nan, than=3.0)
