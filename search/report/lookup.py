"""Finding what a user named: a run by folder or study, a trial by number, name or hash."""

from __future__ import annotations

import gc
from difflib import get_close_matches
from pathlib import Path

from archspec.errors import RunError
from archspec.search.eventlog import EVENTS
from archspec.search.records import Run, load_run
from archspec.search.trial import Trial

RUNS = Path("runs")
MIN_HASH_DIGITS = 4


def find_run(name: str | Path, runs_dir: Path = RUNS) -> Run:
    """Return the run in a folder, or of a study under ``runs_dir``.

    Raises:
        RunError: when neither exists; the message names the runs that do.
    """
    places = [Path(name), runs_dir / name]
    for folder in places:
        if (folder / EVENTS).is_file():
            return _loaded(folder)
    known = sorted(path.parent.name for path in runs_dir.glob(f"*/{EVENTS}"))
    near = get_close_matches(Path(name).name, known, n=1)
    if near:
        advice = f"did you mean {str(runs_dir / near[0])!r}?"
    elif known:
        advice = f"runs under {runs_dir}: {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}"
    else:
        advice = "start one with 'archspec search FILE'"
    raise RunError(f"{name}: no run here ({EVENTS} is missing, also under {runs_dir}); {advice}")


def _loaded(folder: Path) -> Run:
    """Read a run without the collector looking, again and again, at what lasts as long as the command."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        run = load_run(folder)
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()
    return run


def find_trial(run: Run, name: str) -> Trial:
    """Return a trial by its number (``12`` or ``#12``), its name, or the first digits of its hash.

    Raises:
        RunError: when none fits or several do; the message gives the nearest names.
    """
    text = name.removeprefix("#")
    if text.isdecimal() and int(text) in run.trials:
        return run.trials[int(text)]
    named = [trial for trial in run if trial.name == name]
    hashed = [trial for trial in run if len(text) >= MIN_HASH_DIGITS and trial.hash.startswith(text)]
    alive = [trial for trial in hashed if trial.state != "rejected"]
    for found in (named, alive or hashed):
        if len(found) == 1:
            return found[0]
        if found:
            numbers = ", ".join(f"#{trial.number} {trial.name}".strip() for trial in found[:8])
            raise RunError(f"{run.folder}: {name!r} fits {len(found)} trials: {numbers}; give a number")
    known = [trial.name for trial in run if trial.name]
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    numbers = f"numbers 0 to {max(run.trials)}" if run.trials else "the run has no trial yet"
    suggestion = f" Did you mean {' or '.join(repr(found) for found in near)}?" if near else ""
    raise RunError(f"{run.folder}: no trial {name!r}; known: {numbers}, names and hashes.{suggestion}")
