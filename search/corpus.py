"""Text corpora as bytes: built from source files, split without leaks, frozen into one file that travels.

A corpus is three byte strings (train, validation, test). Documents are joined by a zero byte. They are split by
*group*: a package of the standard library, or a top-level folder or file of a user's own sources, so that no
package is both trained on and tested on. Groups are taken in the order of the SHA-256 of their names; validation
and then test are filled to at most ``EVALUATION_SHARE`` of the bytes each, by groups no larger than half of that;
the rest is train. Sources with too few groups for that are split by position instead, and the manifest says so.

Near-duplicates are dropped first: documents in name order, each compared with those already kept; one whose
similarity (``near_duplicates``) reaches ``DUPLICATE_SIMILARITY`` is dropped.

A frozen corpus is a safetensors file of three uint8 tensors and one metadata entry, the manifest: source, hash,
split rule, and every document with its split or the document that it repeats. The hash is the SHA-256 over the
three splits and is checked on loading. Frozen files are memory-mapped: worker processes share their pages.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from archspec.errors import ArchspecError
from archspec.search.near_duplicates import repeats

STANDARD_LIBRARY = "stdlib"
DUPLICATE_SIMILARITY = 0.3
EVALUATION_SHARE = 0.05
MINIMUM_SPLIT_BYTES = 1024
MANIFEST_KEY = "archspec_corpus"
FORMAT_VERSION = 1
SEPARATOR = b"\0"

# Tests and their data are not the library's own prose; topics.py, the bundled wheels and _sysconfigdata are
# generated, the last one per machine.
SKIPPED_FOLDERS = frozenset(
    (
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "_bundled",
        "lib-dynload",
        "pydoc_data",
    )
)
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


class CorpusError(ArchspecError):
    """A corpus that cannot be built, read or trusted."""


@dataclass(frozen=True)
class Document:
    """One source file: its name relative to the source's root, the group it is split with, and its bytes."""

    name: str
    group: str
    content: bytes


@dataclass(frozen=True)
class Corpus:
    """Three byte strings and what is known of them.

    Args:
        train, validation, test: uint8 tensors [n].
        manifest: ``source``, ``hash``, ``split_by`` (group or position), ``num_bytes`` per split, ``documents``.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    manifest: Mapping[str, Any]

    @property
    def hash(self) -> str:
        """The SHA-256 over the three splits."""
        return str(self.manifest["hash"])


def build(source: str | Sequence[str] = STANDARD_LIBRARY) -> Corpus:
    """Read, deduplicate and split a corpus.

    Args:
        source: ``stdlib`` (the running Python's own library source), or a file, a glob (``**`` recurses), or a
            list of these.

    Raises:
        CorpusError: when nothing matches, a file cannot be read, or a split comes out under 1,024 bytes.
    """
    documents = _standard_library() if source == STANDARD_LIBRARY else _own_files(source)
    repeated = repeats([document.content for document in documents], DUPLICATE_SIMILARITY)
    kept = [document for number, document in enumerate(documents) if number not in repeated]
    splits = _split_by_group(kept)
    by_group = splits is not None
    contents = _join(kept, splits) if splits is not None else _split_by_position(kept)
    for name, content in contents.items():
        if len(content) < MINIMUM_SPLIT_BYTES:
            raise CorpusError(
                f"corpus {_shown(source)}: the {name} split has {len(content)} bytes of "
                f"{sum(map(len, contents.values()))}; at least {MINIMUM_SPLIT_BYTES} are required: add more text"
            )
    manifest = {
        "version": FORMAT_VERSION,
        "source": source if isinstance(source, str) else list(source),
        "python": platform.python_version() if source == STANDARD_LIBRARY else None,
        "hash": _hash(contents.values()),
        "split_by": "group" if by_group else "position",
        "num_bytes": {name: len(content) for name, content in contents.items()},
        "duplicate_similarity": DUPLICATE_SIMILARITY,
        "documents": [
            _entry(document, repeated.get(number), documents, splits) for number, document in enumerate(documents)
        ],
    }
    tensors = {name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in contents.items()}
    return Corpus(**tensors, manifest=manifest)


def freeze(corpus: Corpus, path: str | Path) -> Path:
    """Write a corpus into one file, whole or not at all, and return its path. Equal corpora give equal bytes.

    Raises:
        CorpusError: when the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    tensors = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}
    metadata = {MANIFEST_KEY: json.dumps(corpus.manifest, sort_keys=True)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        if partial.exists():
            partial.unlink()
        raise CorpusError(f"corpus {path}: cannot be written ({error}); choose another path") from error
    return path


def load(path: str | Path) -> Corpus:
    """Memory-map a frozen corpus and check its hash.

    Raises:
        CorpusError: when the file is missing, is no frozen corpus, is of another version, or has been altered.
    """
    try:
        with safe_open(path, framework="pt") as file:
            manifest = json.loads((file.metadata() or {}).get(MANIFEST_KEY, "null"))
            if not isinstance(manifest, dict):
                raise CorpusError(f"corpus {path}: not a frozen corpus; write one with `archspec corpus`")
            if manifest.get("version") != FORMAT_VERSION:
                raise CorpusError(
                    f"corpus {path}: format version {manifest.get('version')}, this archspec reads "
                    f"{FORMAT_VERSION}; freeze it again with `archspec corpus`"
                )
            splits = {name: file.get_tensor(name) for name in ("train", "validation", "test")}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CorpusError(
            f"corpus {path}: cannot be read ({error}); give a file written by `archspec corpus`"
        ) from error
    found = _hash(splits[name].numpy().data for name in splits)
    if found != manifest["hash"]:
        raise CorpusError(
            f"corpus {path}: its content hashes to {found[:16]}, its manifest says {manifest['hash'][:16]}; "
            "the file was altered or cut short: freeze it again"
        )
    return Corpus(**splits, manifest=manifest)


def is_frozen(path: str | Path) -> bool:
    """Say whether a file is a frozen corpus, by its header alone."""
    try:
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return length < 1 << 27 and f'"{MANIFEST_KEY}"'.encode() in file.read(length)
    except OSError:
        return False


@lru_cache(maxsize=4)
def open_corpus(source: str | tuple[str, ...] = STANDARD_LIBRARY) -> Corpus:
    """Return a corpus from a frozen file, or built from its source; kept for the life of the process.

    Raises:
        CorpusError: as ``load`` and ``build`` do.
    """
    if isinstance(source, str) and source != STANDARD_LIBRARY and is_frozen(source):
        return load(source)
    return build(source)


def _standard_library() -> list[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(
            name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith(SKIPPED_PREFIXES)
        )
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith(SKIPPED_PREFIXES):
                documents.append(_read(Path(folder) / name, root))
    if not documents:
        raise CorpusError(
            f"corpus stdlib: no .py files under {root}; this Python ships without its library's source: "
            "give files, a glob or a frozen corpus instead"
        )
    return _by_name(documents)


def _own_files(source: str | Sequence[str]) -> list[Document]:
    patterns = [source] if isinstance(source, str) else list(source)
    paths: dict[Path, None] = {}
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(os.path.expanduser(pattern), recursive=True)]
        files = [path.resolve() for path in matches if path.is_file()]
        if not files:
            hint = f"write '{pattern}/**/*.txt'" if matches else "check the path"
            raise CorpusError(
                f"corpus {pattern!r}: {'a folder' if matches else 'no such file'}; required: a file, a glob that "
                f"matches files, a frozen corpus, or stdlib: {hint}"
            )
        paths.update(dict.fromkeys(files))
    if not paths:
        raise CorpusError("corpus: the list of sources is empty; give at least one file or glob")
    root = Path(os.path.commonpath([path.parent for path in paths]))
    return _by_name([_read(path, root) for path in paths])


def _by_name(documents: Iterable[Document]) -> list[Document]:
    return sorted((document for document in documents if document.content), key=lambda document: document.name)


def _read(path: Path, root: Path) -> Document:
    relative = path.relative_to(root)
    group = relative.parts[0] if len(relative.parts) > 1 else relative.stem
    try:
        return Document(relative.as_posix(), group, path.read_bytes())
    except OSError as error:
        raise CorpusError(
            f"corpus {path}: cannot be read ({error.strerror}); fix its permissions or leave it out"
        ) from error


def _split_by_group(documents: Sequence[Document]) -> dict[str, str] | None:
    """Return each group's split, or None when the groups are too few or too large for that."""
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.group] = sizes.get(document.group, 0) + len(document.content) + len(SEPARATOR)
    share = EVALUATION_SHARE * sum(sizes.values())
    order = sorted(sizes, key=lambda group: hashlib.sha256(group.encode()).hexdigest())
    splits = dict.fromkeys(sizes, "train")
    for split in ("validation", "test"):
        filled = 0
        for group in order:
            if splits[group] == "train" and sizes[group] <= share / 2 and filled + sizes[group] <= share:
                splits[group] = split
                filled += sizes[group]
        if filled < share / 2:
            return None
    return splits


def _join(documents: Sequence[Document], splits: Mapping[str, str]) -> dict[str, bytes]:
    return {
        split: SEPARATOR.join(document.content for document in documents if splits[document.group] == split)
        for split in ("train", "validation", "test")
    }


def _split_by_position(documents: Sequence[Document]) -> dict[str, bytes]:
    whole = SEPARATOR.join(document.content for document in documents)
    evaluation = int(EVALUATION_SHARE * len(whole))
    first, second = len(whole) - 2 * evaluation, len(whole) - evaluation
    return {"train": whole[:first], "validation": whole[first:second], "test": whole[second:]}


def _entry(
    document: Document, repeated: int | None, documents: Sequence[Document], splits: Mapping[str, str] | None
) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": document.name, "num_bytes": len(document.content)}
    if repeated is not None:
        entry["repeats"] = documents[repeated].name
    elif splits is not None:
        entry["split"] = splits[document.group]
    return entry


def _hash(splits: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for content in splits:
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _shown(source: str | Sequence[str]) -> str:
    return repr(source) if isinstance(source, str) else ", ".join(map(repr, source))
