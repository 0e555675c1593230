"""Corpora split without leaks, drop near-duplicates, and travel as one checked file."""

from __future__ import annotations

import hashlib
import random
import string
from pathlib import Path

import pytest
import torch

from archspec.search import corpus as corpora
from archspec.search.corpus import Corpus, CorpusError, build, freeze, is_frozen, load
from archspec.search.near_duplicates import repeats, similarity, sketch


def words(seed: int, num_bytes: int) -> bytes:
    """Return text whose longer substrings do not repeat."""
    generator = random.Random(seed)
    return "".join(generator.choices(string.ascii_lowercase + " \n", k=num_bytes)).encode()


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    for number in range(120):
        folder = tmp_path / "source" / f"package{number}"
        folder.mkdir(parents=True)
        for name in ("one", "two"):
            (folder / f"{name}.txt").write_bytes(words(2 * number + (name == "two"), 1500))
    return tmp_path / "source"


@pytest.fixture(scope="module")
def standard_library() -> Corpus:
    return build("stdlib")


def test_standard_library_is_split_by_package(standard_library: Corpus) -> None:
    manifest = standard_library.manifest
    assert manifest["split_by"] == "group"
    sizes = manifest["num_bytes"]
    assert sizes == {name: len(getattr(standard_library, name)) for name in ("train", "validation", "test")}
    total = sum(sizes.values())
    assert sizes["train"] > 0.85 * total
    assert min(sizes["validation"], sizes["test"]) > 0.025 * total
    packages: dict[str, set[str]] = {}
    for document in manifest["documents"]:
        if "split" in document:
            package = document["name"].split("/")[0].removesuffix(".py")
            packages.setdefault(package, set()).add(document["split"])
    assert all(len(splits) == 1 for splits in packages.values())


def test_standard_library_leaves_out_tests_and_repeated_tables(standard_library: Corpus) -> None:
    documents = standard_library.manifest["documents"]
    parts = {part for document in documents for part in document["name"].split("/")}
    assert not parts & {"test", "tests", "site-packages", "__pycache__"}
    encodings = [document for document in documents if document["name"].startswith("encodings/")]
    repeated = [document for document in encodings if "repeats" in document]
    # The code pages are some sixty copies of one table with a few entries changed.
    assert len(repeated) > len(encodings) / 2
    assert {document["repeats"] for document in repeated} <= {document["name"] for document in documents}


def test_building_twice_gives_the_same_corpus(packages: Path) -> None:
    first, second = (build(f"{packages}/**/*.txt") for _ in range(2))
    assert first.manifest == second.manifest
    assert torch.equal(first.train, second.train)


def test_own_files_are_split_by_folder(packages: Path) -> None:
    corpus = build(f"{packages}/**/*.txt")
    assert corpus.manifest["split_by"] == "group"
    splits: dict[str, set[str]] = {}
    for document in corpus.manifest["documents"]:
        splits.setdefault(document["name"].split("/")[0], set()).add(document["split"])
    assert len(splits) == 120
    assert all(len(found) == 1 for found in splits.values())
    for number in (0, 57, 119):
        content = words(2 * number, 1500)
        (split,) = splits[f"package{number}"]
        found = {name for name in ("train", "validation", "test") if content in bytes(getattr(corpus, name))}
        assert found == {split}


def test_one_file_is_split_by_position(tmp_path: Path) -> None:
    content = words(0, 40_000)
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    corpus = build(str(path))
    assert corpus.manifest["split_by"] == "position"
    assert b"".join(bytes(part) for part in (corpus.train, corpus.validation, corpus.test)) == content
    assert len(corpus.validation) == len(corpus.test) == 2000


def test_a_list_of_sources_is_read_once_each(packages: Path) -> None:
    both = build([f"{packages}/**/*.txt", f"{packages}/package3/one.txt"])
    assert both.hash == build(f"{packages}/**/*.txt").hash


def test_near_duplicates_are_found_and_others_kept() -> None:
    original, other = words(0, 6000), words(1, 6000)
    edited = original[:5000] + words(2, 1000)
    assert repeats([original, other, edited, original], 0.3) == {2: 0, 3: 0}
    assert repeats([b"short", b"short", b"brief"], 0.3) == {1: 0}


def test_similarity_estimates_the_share_of_common_shingles() -> None:
    half = words(0, 20_000)
    first, second = half + words(1, 20_000), half + words(2, 20_000)
    # |A & B| / |A | B| = 20,000 / 60,000; five standard errors of a bottom-256 sketch.
    assert similarity(sketch(first), sketch(second)) == pytest.approx(1 / 3, abs=5 * 0.03)


def test_frozen_corpus_travels_unchanged(packages: Path, tmp_path: Path) -> None:
    corpus = build(f"{packages}/**/*.txt")
    path = freeze(corpus, tmp_path / "deep" / "frozen.safetensors")
    assert is_frozen(path)
    loaded = load(path)
    assert loaded.manifest == corpus.manifest
    for split in ("train", "validation", "test"):
        assert torch.equal(getattr(loaded, split), getattr(corpus, split))
    again = freeze(loaded, tmp_path / "again.safetensors")
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(path.read_bytes()).digest()
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["frozen.safetensors"]


def test_open_corpus_reads_frozen_files_and_sources(packages: Path, tmp_path: Path) -> None:
    path = freeze(build(f"{packages}/**/*.txt"), tmp_path / "frozen.safetensors")
    assert corpora.open_corpus(str(path)).hash == corpora.open_corpus(f"{packages}/**/*.txt").hash


def test_an_altered_file_is_refused(packages: Path, tmp_path: Path) -> None:
    path = freeze(build(f"{packages}/**/*.txt"), tmp_path / "frozen.safetensors")
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorpusError, match="the file was altered or cut short: freeze it again"):
        load(path)
    path.write_bytes(content[:-100])
    with pytest.raises(CorpusError, match="cannot be read"):
        load(path)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(CorpusError, match="no such file; required: a file, a glob"):
        build(str(tmp_path / "missing.txt"))
    with pytest.raises(CorpusError, match=r"a folder; required: .* write '.*/\*\*/\*.txt'"):
        build(str(tmp_path))
    with pytest.raises(CorpusError, match="the list of sources is empty"):
        build([])
    for name in ("empty.txt", "short.txt"):
        with pytest.raises(CorpusError, match=r"the \w+ split has \d bytes of \d; at least 1024 are required"):
            build(str(tmp_path / name))
    with pytest.raises(CorpusError, match="give a file written by `archspec corpus`"):
        load(tmp_path / "short.txt")
    with pytest.raises(CorpusError, match="give a file written by `archspec corpus`"):
        load(tmp_path / "missing.safetensors")
    nothing = torch.zeros(1, dtype=torch.uint8)
    blocked = tmp_path / "short.txt" / "corpus.safetensors"
    with pytest.raises(CorpusError, match="cannot be written"):
        freeze(Corpus(nothing, nothing, nothing, manifest={}), blocked)
