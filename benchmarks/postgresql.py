"""A PostgreSQL server of one's own for as long as it is needed, on a socket in a temporary folder, off the network."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_S = 60


@contextmanager
def server(kept: Path | None = None) -> Iterator[str]:
    """Start a server and yield its database's URL.

    Args:
        kept: a folder for its data that stays, and is gone on with; by default they go with the server.

    Raises:
        RuntimeError: when PostgreSQL is not installed, or does not start.
    """
    programs, user = _programs(), _user()
    folder = Path(tempfile.mkdtemp(prefix="archspec-pg-"))
    options: dict[str, Any] = {"cwd": folder, "stdin": subprocess.DEVNULL}
    data = folder / "data" if kept is None else kept.resolve()
    socket = folder if kept is None else data  # the URL stays the same too
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    if user is not None:
        entry = pwd.getpwnam(user)
        for each in (folder, data):
            os.chown(each, entry.pw_uid, entry.pw_gid)
        options |= {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    if not (data / "PG_VERSION").is_file():
        initdb = [str(programs / "initdb"), "-D", str(data), "-U", "archspec", "-A", "trust", "-E", "UTF8", "--no-sync"]
        made = subprocess.run(initdb, capture_output=True, text=True, **options)
        if made.returncode:
            raise RuntimeError(f"initdb: {made.stderr}")
    elif (data / "postmaster.pid").is_file():  # whoever started it was killed, and it may still run
        stop = [str(programs / "pg_ctl"), "stop", "-D", str(data), "-m", "immediate"]
        subprocess.run(stop, capture_output=True, **options)
    command = [str(programs / "postgres"), "-D", str(data), "-k", str(socket), "-c", "listen_addresses=", "-F"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, **options)
    try:
        ready = [str(programs / "pg_isready"), "-h", str(socket), "-q"]
        deadline = time.monotonic() + START_S
        while subprocess.run(ready).returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"postgres: {(folder / 'log').read_text()}")
            time.sleep(0.05)
        yield f"postgresql://archspec@/postgres?host={socket}"
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait()
        shutil.rmtree(folder)


def _programs() -> Path:
    """Return the folder of PostgreSQL's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    named = shutil.which("initdb")
    if named is None and not found:
        raise RuntimeError("PostgreSQL is not installed: no initdb; install it (apt-get install postgresql)")
    return found[-1].parent if found else Path(str(named)).parent


def _user() -> str | None:
    """Return whom the server runs as: it refuses root."""
    if os.getuid():
        return None
    return "postgres" if any(entry.pw_name == "postgres" for entry in pwd.getpwall()) else "nobody"
