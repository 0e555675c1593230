"""``archspec.search.run``: a search from Python, the same as from the command line."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from archspec.errors import RunError
from archspec.search.driver import Driver, Limits, OnEvent
from archspec.search.executors import Executor, Setup, make_executor
from archspec.search.families import Metric, Task
from archspec.search.records import Run
from archspec.search.resources import Resources
from archspec.search.rundir import IDENTITY, RunFolder
from archspec.search.searchfile import SearchFile, load_search_file
from archspec.search.survey import survey
from archspec.search.trial import Trial

RUNS = Path("runs")


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Fields:
        run: every trial, as ``archspec.search.records.load_run`` reads it.
        status: ``finished``, ``interrupted``, ``timeout`` or ``exhausted``.
        report: the HTML report.
    """

    run: Run
    status: str
    report: Path | None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.folder

    @property
    def trials(self) -> list[Trial]:
        """Every trial that was not rejected, by number."""
        return [trial for trial in self.run if trial.state != "rejected"]

    @property
    def front(self) -> list[Trial]:
        """The trained trials that none beats in every objective, baselines included."""
        return [self.run.trials[number] for number in sorted(survey(self.run).front)]

    @property
    def feasible(self) -> bool:
        """Whether any draw was accepted."""
        return any(trial.origin == "sampled" for trial in self.trials)


def run(
    search_file: str | Path | Mapping[str, Any],
    *,
    trials: int | None = None,
    timeout: float | None = None,
    workers: int | None = None,
    device: str | None = None,
    seed: int | None = None,
    study: str | None = None,
    run_dir: str | Path | None = None,
    runs_dir: str | Path = RUNS,
    tasks: Mapping[str, Task] | None = None,
    metrics: Sequence[Metric] | None = None,
    on_event: OnEvent | None = None,
    on_start: Callable[[Run], None] | None = None,
    executor: str = "local",
    address: str | None = None,
    storage: str | None = None,
    overrides: Sequence[str] = (),
    relative_to: Path | None = None,
    command: str = "",
) -> SearchResult:
    """Search, or continue a search where it stands.

    Args:
        search_file: a file, a shipped search's name, or a mapping.
        trials: distinct feasible draws in all; default: the file's, or one round of the ladder.
        timeout: seconds until the search stops, to be continued by the same call.
        workers: worker processes.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        seed, study: replace the file's.
        run_dir: the run's folder; default: ``runs_dir/<study>``.
        tasks, metrics: replace the file's; classes of your own must live in a module, or in the script that runs.
        on_event: called with every event as it is logged, and with the progress of evaluations.
        on_start: called once with the run, which is kept up to date while the search goes on.
        executor: ``local``, ``inprocess`` or ``ray``; ``address`` of a running Ray cluster, or ``auto``.
        storage: a database's URL for the Optuna study, instead of the journal in the run's folder.
        overrides: texts ``a.b=value`` on the file.
        relative_to: what the file's paths are relative to; default: its own folder.
        command: what continues this run, for the record.

    Raises:
        SpecError: when the file is not a valid search.
        RunError: when the folder is in use, or holds a run of another file.
    """
    _refuse_in_worker()
    changes = {"seed": seed, "study": study, "device": device, "trials": trials, "timeout_s": timeout}
    changes |= {"workers": workers, "storage": storage}
    search = load_search_file(search_file, overrides, tasks=tasks, metrics=metrics, changes=changes, folder=relative_to)
    path = Path(run_dir) if run_dir is not None else Path(runs_dir) / search.settings.study
    return _carried_out(search, path, (executor, address), command, on_event, on_start)


def _refuse_in_worker() -> None:
    if os.environ.get("ARCHSPEC_WORKER"):
        raise RunError(
            "this script starts a search while a worker imports it for its tasks or metrics; "
            "put the call under `if __name__ == '__main__':`, or move the classes to a module"
        )


def _carried_out(
    search: SearchFile,
    path: Path,
    executor: tuple[str, str | None],
    command: str,
    on_event: OnEvent | None,
    on_start: Callable[[Run], None] | None,
) -> SearchResult:
    """Search in a folder, with the executor of that name and address; see ``run``."""
    settings = search.settings
    limits = Limits(settings.trials or settings.candidates, settings.timeout_s, command)
    with RunFolder(path, search) as folder:
        driver = Driver(search, folder, _executor(search, folder, *executor), limits, on_event)
        if on_start is not None:
            on_start(driver.run)
        with _signals(limits.stop.append):
            status = driver.execute()
        report = _report(folder.path)
    return SearchResult(driver.run, status, report)


def _executor(search: SearchFile, folder: RunFolder, name: str, address: str | None) -> Executor:
    settings = search.settings
    setup = Setup(
        folder.path / "logs",
        *_sources(search),
        settings.evaluation_timeout_s,
        settings.resources or Resources(),
        address,
        folder.identity,
        folder.path / IDENTITY,
    )
    return make_executor(name, settings.workers, settings.device, setup)


def _report(folder: Path) -> Path:
    from archspec.search.report import write_report

    return write_report(folder)


def _sources(search: SearchFile) -> tuple[tuple[str, ...], str | None]:
    """Return the modules and the script that workers must import to know the search's components.

    Raises:
        RunError: when a component is defined where no worker can import it from.
    """
    foreign = search.modules
    if "__main__" not in foreign:
        return foreign, None
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None:
        raise RunError(
            "a task or metric is defined in an interactive session, where workers cannot import it from; "
            "write it to a module"
        )
    return tuple(name for name in foreign if name != "__main__"), str(Path(script).resolve())


@contextmanager
def _signals(stop: Callable[[str], Any]) -> Iterator[None]:
    """Turn the first Ctrl-C (or SIGTERM) into a request to stop, and leave the second its usual force."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        stop("interrupted")
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
