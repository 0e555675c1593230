"""The report of a run: one HTML file that opens anywhere, and the tables the command line prints."""

from __future__ import annotations

import os
from pathlib import Path

from archspec.errors import RunError
from archspec.search.records import Run, load_run
from archspec.search.report.page import render
from archspec.search.report.payload import report_data
from archspec.search.survey import Survey

REPORT = "report.html"


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run's folder and return its path. A reader never sees half a file.

    Raises:
        RunError: when the folder is no run, or the file cannot be written.
    """
    folder = Path(run_dir)
    return save_report(load_run(folder), folder / REPORT)


def save_report(run: Run, path: Path, found: Survey | None = None) -> Path:
    """Write a run's report to ``path`` and return it; ``found`` where the run is surveyed already.

    Raises:
        RunError: when it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(render(report_data(run, found)), encoding="utf-8", newline="\n")
        beside.replace(path)
    except OSError as error:
        raise RunError(
            f"{path}: the report cannot be written ({error.strerror}); choose another file with -o"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
    return path
