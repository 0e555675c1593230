"""The local pool: real workers, and every way they can end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from archspec.errors import UnsupportedError, UsageError
from archspec.search.candidates import Candidate, admit, named
from archspec.search.executors import Outcome, Setup, make_executor
from archspec.search.executors.local import LocalPool
from archspec.search.requests import prepare, requests_for
from archspec.search.resources import Resources

SLEEPER = """
import time
from typing import ClassVar
from archspec.search.families import Metric, MetricContext

class Sleeper(Metric, kind="sleeper"):
    seconds: float = 60.0

    def measure(self, context: MetricContext) -> dict[str, float]:
        time.sleep(self.seconds)
        return {"sleeper": self.seconds}
"""


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module with a metric that takes its time, where workers find it too."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "sleeping_metric.py").write_text(SLEEPER)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture
def request_of(load_tiny: Any, tmp_path: Path) -> Any:
    """Make a training-free request that sleeps for some seconds; the key is the seconds as text."""
    search = load_tiny()
    (tmp_path / "results").mkdir()
    prepared = prepare(search, tmp_path, tmp_path / "results")
    candidate = admit(named(search.space.base(), "candidate"), search)
    assert isinstance(candidate, Candidate)

    def make(key: str, seconds: float) -> dict[str, Any]:
        (request,) = requests_for(prepared, candidate, 0, 0)
        return {**request, "key": key, "metrics": [{"kind": "sleeper", "seconds": seconds}]}

    return make


def pool(tmp_path: Path, num_workers: int = 1, timeout_s: float | None = None) -> LocalPool:
    (tmp_path / "logs").mkdir(exist_ok=True)
    setup = Setup(tmp_path / "logs", ("sleeping_metric",), None, timeout_s)
    found = make_executor("local", num_workers, "cpu", setup)
    assert isinstance(found, LocalPool)
    return found


def until(executor: LocalPool, count: int = 1, limit_s: float = 60.0) -> list[Outcome]:
    stop, found = time.monotonic() + limit_s, list[Outcome]()
    while len(found) < count:
        assert time.monotonic() < stop, f"only {found} within {limit_s} s"
        found += executor.wait(0.2)
    return found


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z" if Path("/proc").is_dir() else True


def gone(pids: list[int], limit_s: float = 10.0) -> bool:
    stop = time.monotonic() + limit_s
    while any(map(alive, pids)) and time.monotonic() < stop:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.usefixtures("plugins")
def test_a_worker_leaves_its_result_and_can_be_killed_outlasted_and_cancelled(tmp_path: Path, request_of: Any) -> None:
    executor = pool(tmp_path, timeout_s=8.0)
    try:
        executor.submit(request_of("quick", 0.0))
        (outcome,) = until(executor)
        assert outcome == Outcome("quick", "finished")
        result = json.loads((tmp_path / "results" / "quick.json").read_bytes())
        assert result["status"] == "ok"
        assert result["value"]["metrics"] == {"sleeper": {"mean": 0.0, "spread": 0.0}}

        executor.submit(request_of("killed", 60.0))
        with pytest.raises(RuntimeError, match="all 1 workers are busy"):
            executor.submit(request_of("more", 0.0))
        (first,) = executor.pids()
        executor.wait(1.0)  # until it says that it has begun
        os.kill(first, signal.SIGKILL)
        (outcome,) = until(executor)
        assert (outcome.key, outcome.status) == ("killed", "died")
        assert outcome.reason == "the worker was ended by SIGKILL: out of memory, or killed by hand"

        executor.submit(request_of("unbegun", 60.0))  # a new worker takes the dead one's place
        (second,) = executor.pids()
        assert second != first
        os.kill(second, signal.SIGKILL)
        assert until(executor) == [Outcome("unbegun", "lost", f"{outcome.reason}, before it began")]

        executor.submit(request_of("long", 60.0))
        (second,) = executor.pids()
        assert until(executor) == [Outcome("long", "overtime", "took longer than 8 s")]
        assert gone([second])

        executor.submit(request_of("cancelled", 60.0))
        executor.cancel("cancelled")
        assert executor.wait(0.1) == []
        assert executor.pids() == []
        assert not any(
            (tmp_path / "results" / f"{key}.json").exists() for key in ("killed", "unbegun", "long", "cancelled")
        )
    finally:
        executor.shutdown()


@pytest.mark.usefixtures("plugins")
def test_a_worker_does_not_outlive_its_driver(tmp_path: Path, request_of: Any) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "request.json").write_text(json.dumps(request_of("long", 60.0)))
    script = textwrap.dedent(f"""
        import json, sys, time
        from pathlib import Path
        sys.path[:] = {sys.path!r}
        from archspec.search.executors import Setup, make_executor
        folder = Path({str(tmp_path)!r})
        executor = make_executor("local", 1, "cpu", Setup(folder / "logs", ("sleeping_metric",)))
        executor.submit(json.loads((folder / "request.json").read_bytes()))
        print(*executor.pids(), flush=True)
        time.sleep(60)
    """)
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pids = [int(word) for word in driver.stdout.readline().split()]
    assert len(pids) == 1
    assert all(map(alive, pids))
    driver.kill()
    driver.wait()
    driver.stdout.close()
    assert gone(pids)


def test_a_worker_that_cannot_start_says_why(tmp_path: Path, request_of: Any) -> None:
    (tmp_path / "logs").mkdir()
    executor = make_executor("local", 1, "cpu", Setup(tmp_path / "logs", ("no_such_module_here",)))
    try:
        executor.submit(request_of("never", 0.0))
        (outcome,) = until(executor)  # type: ignore[arg-type]
        assert outcome.status == "died"
        assert "exit code 1: ModuleNotFoundError: No module named 'no_such_module_here'" in outcome.reason
    finally:
        executor.shutdown()


def test_unknown_executors_and_absent_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError, match=r"unknown executor 'locl'; known: inprocess, local, ray\. Did you mean 'local'\?"
    ):
        make_executor("locl", 1, "cpu", Setup(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UnsupportedError, match="device cuda: this machine has no usable GPU; use --device cpu"):
        make_executor("local", None, "cuda", Setup(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert make_executor("local", None, "cuda", Setup(tmp_path)).capacity == 2
    assert make_executor("local", None, "cuda:1", Setup(tmp_path)).capacity == 1
    with pytest.raises(UnsupportedError, match="device cuda:2: no such GPU; there are 2, from cuda:0"):
        make_executor("local", None, "cuda:2", Setup(tmp_path))


def test_the_drivers_own_process_evaluates_one_at_a_time(tmp_path: Path, request_of: Any) -> None:
    executor = make_executor("inprocess", None, "cpu", Setup(tmp_path))
    request = {**request_of("here", 0.0), "metrics": [{"kind": "state_size"}]}
    executor.submit(request)
    with pytest.raises(RuntimeError, match="busy"):
        executor.submit(request)
    assert executor.wait(0.0) == [Outcome("here", "finished")]
    assert json.loads((tmp_path / "results" / "here.json").read_bytes())["status"] == "ok"
    assert executor.wait(0.0) == []
    executor.submit(request)
    executor.cancel("here")
    assert executor.wait(0.0) == []
    with pytest.raises(UsageError, match="found 2 workers; there is one, the driver itself"):
        make_executor("inprocess", 2, "cpu", Setup(tmp_path))
    with pytest.raises(UsageError, match="evaluation_timeout_s needs a process that can be stopped"):
        make_executor("inprocess", 1, "cpu", Setup(tmp_path, evaluation_timeout_s=1.0))


def test_a_pool_holds_as_many_trials_as_their_resources_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archspec.search.executors.local.available_cores", lambda: 8)
    assert make_executor("local", None, "cpu", Setup(tmp_path, resources=Resources(cpus=3))).capacity == 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert make_executor("local", None, "cuda", Setup(tmp_path, resources=Resources(gpus=0.4))).capacity == 4
