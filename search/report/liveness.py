"""Whether the driver of a run is still at work, told from the name it leaves in the lock file."""

from __future__ import annotations

import os
import re
import socket

from archspec.search.records import Run

LOCK = "lock"
WORDS = {
    "killed": "killed: the same command continues it",
    "timeout": "stopped at its timeout",
    "exhausted": "finished: the space is exhausted",
}


def status_of(run: Run) -> str:
    """Return a run's state in words for people."""
    return WORDS.get(state_of(run), state_of(run))


def state_of(run: Run) -> str:
    """Return a run's state as its log has it, or ``killed`` when its driver is gone without a word.

    The lock itself is not tried: for a moment that would keep a driver from starting.
    """
    holder = run.folder / LOCK
    if run.status != "running" or not holder.is_file():
        return run.status
    named = re.fullmatch(r"process (\d+) on (\S+)\s*", holder.read_text(errors="replace"))
    if named is None or named[2] != socket.gethostname():
        return "running"  # as far as can be told from here
    return "running" if _exists(int(named[1])) else "killed"


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
