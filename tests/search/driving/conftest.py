"""A search of a few seconds: real specs of width 16, a real task, a real worker."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from archspec.search.searchfile import SearchFile, load_search_file

TINY = """
study: tiny
seed: 3
space:
  model_dim: {choice: [16, 24]}
  blocks:
    main:
      mixer:
        num_heads: 2
        key_dim: {var: head_dim}
        value_dim: {var: head_dim}
        memory: matrix
        bias: {choice: [dot, l2]}
        retention: {choice: [none, {kind: decay, gate: sigmoid}]}
        update: {kind: gradient_descent, step_size: sigmoid}
      feed_forward: {kind: swiglu, expansion: 2.0}
    attention:
      mixer: {num_heads: 2, memory: kv, update: nonparametric}
  layout: {choice: [main, attention, [main, attention]]}
variables:
  head_dim: {choice: [8, 16]}
context: 64
tasks:
  recall: {kind: recall, vocab_size: 16, sequence_length: 16, num_kv_pairs: 2}
training: {learning_rates: [1e-3], batch_size: 4, eval_tokens: 256}
constraints: {non_embedding_parameters: {max: 9_000}}
objectives:
  - {metric: recall/accuracy, reference: 0.0}
  - {metric: state_bytes, reference: 10_000}
ladder:
  - rung: training_free
    candidates: 6
    init_seeds: 1
    metrics:
      - non_embedding_parameters
      - {kind: memory_capacity, lags: [1, 2], num_sequences: 8, positions: 8}
      - {kind: recall_at_init, num_pairs: [4], num_sets: 2}
    promote: {count: 3, by: [recall_at_init, memory_capacity], random: 1}
  - {rung: short_train, tokens: 640}
cost: {repeats: 3, limit_s: 0.1}
baselines: [transformer]
"""

Load = Callable[..., SearchFile]


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """The tiny search as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def load_tiny(tiny_file: Path) -> Load:
    """Load the tiny search with overrides."""

    def load(*overrides: str, **options: Any) -> SearchFile:
        return load_search_file(tiny_file, overrides, **options)

    return load


def server_programs() -> Path:
    """Return the folder of PostgreSQL's programs; a machine without them fails the tests, which skip nothing."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    named = shutil.which("initdb")
    if named is None and not found:
        raise RuntimeError("PostgreSQL is not installed: no initdb; install it (apt-get install postgresql)")
    return found[-1].parent if found else Path(str(named)).parent


def server_user() -> str | None:
    """Return whom the server runs as: it refuses root."""
    if os.getuid():
        return None
    return "postgres" if any(entry.pw_name == "postgres" for entry in pwd.getpwall()) else "nobody"


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """A real PostgreSQL server of the tests' own, on a socket in a folder of its own; the URL of its database."""
    programs, user = server_programs(), server_user()
    folder = Path(tempfile.mkdtemp(prefix="archspec-pg-"))
    options: dict[str, Any] = {"cwd": folder, "stdin": subprocess.DEVNULL}
    if user is not None:
        entry = pwd.getpwnam(user)
        os.chown(folder, entry.pw_uid, entry.pw_gid)
        options |= {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    data = str(folder / "data")
    initdb = [str(programs / "initdb"), "-D", data, "-U", "archspec", "-A", "trust", "-E", "UTF8", "--no-sync"]
    made = subprocess.run(initdb, capture_output=True, text=True, **options)
    assert made.returncode == 0, made.stderr
    command = [str(programs / "postgres"), "-D", data, "-k", str(folder), "-c", "listen_addresses=", "-F"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, **options)
    try:
        ready = [str(programs / "pg_isready"), "-h", str(folder), "-q"]
        stop = time.monotonic() + 60
        while subprocess.run(ready).returncode:
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < stop, (folder / "log").read_text()
            time.sleep(0.05)
        yield f"postgresql://archspec@/postgres?host={folder}"
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait()
        shutil.rmtree(folder)
