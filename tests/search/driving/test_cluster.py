"""The Ray executor on a real cluster of several nodes on one machine: nodes and workers that are lost, code and
results that travel."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

import archspec
from archspec.errors import RunError, UnsupportedError, UsageError
from archspec.search.candidates import Candidate, admit, named
from archspec.search.entry import run as run_search
from archspec.search.eventlog import Event, read_events
from archspec.search.executors import Outcome, Setup, make_executor
from archspec.search.executors.cluster import RayCluster
from archspec.search.executors.remote import Job, serve, versions
from archspec.search.records import load_run
from archspec.search.report.tables import running
from archspec.search.requests import prepare, requests_for
from archspec.search.resources import Resources

PLUGIN = """
import os, signal, time
import archspec
from archspec.search.families import Metric, MetricContext

class Probing(Metric, kind="probing"):
    seconds: float = 0.0
    dies: bool = False

    def measure(self, context: MetricContext) -> dict[str, float]:
        time.sleep(self.seconds)
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"probing": float(archspec.__file__.startswith(os.getcwd() + os.sep))}
"""
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}


@pytest.fixture(scope="module", autouse=True)
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module of the user's, on the driver's path alone."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "probing_metric.py").write_text(PLUGIN)
    sys.path.insert(0, str(folder))
    import probing_metric  # type: ignore[import-not-found]

    assert probing_metric.Probing.kind == "probing"
    yield
    sys.path.remove(str(folder))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that takes no trials, and three nodes that take one each."""
    found = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(3):
            found.add_node(wait=False, **NODE)
        found.wait_for_nodes()
        yield found
    finally:
        ray.shutdown()  # type: ignore[no-untyped-call]
        found.shutdown()  # type: ignore[no-untyped-call]


def request_of(load_tiny: Any, folder: Path, key: str, **options: Any) -> dict[str, Any]:
    search = load_tiny()
    (folder / "results").mkdir(exist_ok=True)
    prepared = prepare(search, folder, folder / "results")
    candidate = admit(named(search.space.base(), "candidate"), search)
    assert isinstance(candidate, Candidate)
    (request,) = requests_for(prepared, candidate, 0, 0)
    return {**request, "key": key, "metrics": [{"kind": "probing", **options}]}


def training_of(load_tiny: Any, folder: Path) -> dict[str, Any]:
    search = load_tiny()
    candidate = admit(named(search.space.base(), "candidate"), search)
    assert isinstance(candidate, Candidate)
    return dict(requests_for(prepare(search, folder, folder / "results"), candidate, 0, 1)[0])


def until(executor: RayCluster, count: int) -> list[Outcome]:
    stop, found = time.monotonic() + 120, list[Outcome]()
    while len(found) < count:
        assert time.monotonic() < stop, f"only {found}"
        found += [outcome for outcome in executor.wait(0.2) if outcome.status != "progress"]
    return found


@pytest.mark.slow
def test_a_search_outlives_the_nodes_it_runs_on(cluster: Cluster, tiny_file: Path, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    shown: set[str] = set()

    def on_event(event: Event) -> None:
        seen[event["event"]] += 1
        if event["event"] in ("progress", "finished"):
            shown.update(line.split("  ", 2)[-1] for line in running(load_run(tmp_path / "runs" / "tiny")))
        if seen["finished"] >= 3 and event.get("phase") == "begun" and len(cluster.worker_nodes) > 1:
            (node,) = [node for node in cluster.worker_nodes if node.node_id == event["node_id"]]
            cluster.remove_node(node)

    overrides = ["ladder[0].metrics=[{kind: probing, seconds: 2.0}]", "ladder[0].promote={count: 2, by: [probing]}"]
    found = run_search(
        tiny_file,
        runs_dir=tmp_path / "runs",
        executor="ray",
        address=cluster.address,
        overrides=overrides,
        on_event=on_event,
    )
    events = list(read_events(found.folder / "events.jsonl"))
    assert found.status == "finished"
    assert [event["workers"] for event in events if event["event"] == "started"] == [3]
    assert seen["lost"] >= 2
    assert {"waiting", f"begun  on {platform.node()}"} <= shown, shown
    assert found.run.counts.failed == 0
    assert (found.run.counts.accepted, found.run.counts.trained) == (6, 3)
    done = [event["key"] for event in events if event["event"] == "finished"]
    assert set(done) == {event["key"] for event in events if event["event"] == "submitted"}
    assert len(done) == len(set(done)) == len(list((found.folder / "results").glob("*.json")))
    measured = [trial for trial in load_run(found.folder) if trial.state != "rejected"]
    assert all(trial.training_free["probing"]["mean"] == 1.0 for trial in measured), "code was not sent"


@pytest.mark.slow
def test_what_becomes_of_an_evaluation(cluster: Cluster, load_tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "id").write_text("this run\n")

    def opened(identity: str, **options: Any) -> RayCluster:
        setup = Setup(
            tmp_path / "logs",
            ("probing_metric",),
            address=cluster.address,
            identity=identity,
            identity_file=tmp_path / "id",
            **options,
        )
        executor = make_executor("ray", None, "cpu", setup)
        assert isinstance(executor, RayCluster)
        return executor

    executor = opened("another run", evaluation_timeout_s=6.0)  # so the folder of this run is not there
    assert executor.capacity == 3
    found = {}
    fates: dict[str, dict[str, Any]] = {"back": {}, "dies": {"dies": True}, "long": {"seconds": 60.0}}
    for key, options in fates.items():
        for _ in range(3):  # a worker that the cluster loses before it begins is asked again, as by the driver
            executor.submit(request_of(load_tiny, tmp_path, key, **options))
            (found[key],) = until(executor, 1)
            if found[key].status != "lost":
                break
    assert [outcome.status for outcome in found.values()] == ["finished", "died", "overtime"], found
    assert found["long"].reason == "took longer than 6 s"
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["back.json"]
    result = json.loads((tmp_path / "results" / "back.json").read_bytes())
    assert result["value"]["metrics"]["probing"]["mean"] == 1.0
    executor.submit(request_of(load_tiny, tmp_path, "cancelled", seconds=60.0))
    executor.cancel("cancelled")
    assert executor.wait(0.1) == []
    with pytest.raises(RunError, match=r"connected to Ray already; call ray\.shutdown\(\)"):
        opened("this run")
    executor.shutdown()
    executor = opened("this run")
    executor.submit({**training_of(load_tiny, tmp_path), "key": "far", "tokens": 200_000})
    stop, said = time.monotonic() + 120, list[dict[str, Any]]()
    while not said or "tokens" not in said[-1]:
        assert time.monotonic() < stop, said
        said += [outcome.data for outcome in executor.wait(0.2)]
    assert said[-1]["node"] == platform.node()
    assert 0 < said[-1]["tokens"] <= said[-1]["budget_tokens"] == 200_000
    executor.cancel("far")
    executor.shutdown()
    with pytest.raises(UnsupportedError, match=r"no node has 2 CPUs for a trial; the nodes have: .*1 CPUs, 0 GPUs"):
        opened("this run", resources=Resources(cpus=2))


def test_data_is_fetched_where_storage_is_not_shared_and_other_versions_are_refused(
    load_tiny: Any, tmp_path: Path
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "text.txt").write_text(" ".join(str(number**2) for number in range(6000)))
    search = load_tiny(
        f"tasks={{text: {{kind: text, sequence_length: 16, corpus: {tmp_path / 'text.txt'}}}}}",
        "objectives=[{metric: text/bits_per_byte, reference: 8.0}]",
    )
    prepared = prepare(search, tmp_path / "cache", tmp_path / "results")
    candidate = admit(named(search.space.base(), "candidate"), search)
    assert isinstance(candidate, Candidate)
    request = requests_for(prepared, candidate, 0, 1)[0]
    here = Path(request["task"]["corpus"])
    content, fetched = here.read_bytes(), list[int]()
    here.unlink()

    def fetch() -> bytes:
        fetched.append(1)
        return content

    job = Job(versions(), "none", str(tmp_path / "id"), data={str(here): fetch})
    for _ in range(2):
        answer = serve(request, job)
        assert answer.status == "done"
        (written,) = [json.loads(content) for name, content in answer.files if name.endswith(".json")]
        assert written["status"] == "ok", written["reason"]
        names = {name for name, _ in answer.files}
        assert names == {f"{request['key']}.json", f"{request['key']}.safetensors"}
    assert len(fetched) <= 1
    refused = serve(request, Job({**versions(), "torch": "0.1"}, "none", ""))
    assert refused.status == "refused"
    assert refused.reason.endswith(" here, 0.1 at the driver: install the same versions on every node")


def test_devices_and_addresses_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="device cuda:1: Ray chooses the GPU; use --device cuda"):
        make_executor("ray", 1, "cuda:1", Setup(tmp_path))
    with pytest.raises(UsageError, match=r"resources\.gpus: found 0\.5 with device cpu"):
        make_executor("ray", 1, "cpu", Setup(tmp_path, resources=Resources(gpus=0.5)))
    with pytest.raises(UsageError, match="executor local has no address; use --executor ray"):
        make_executor("local", 1, "cpu", Setup(tmp_path, address="auto"))
    with pytest.raises(RunError, match=r"no connection to a cluster at auto .*; start one with 'ray start --head'"):
        make_executor("ray", 1, "cpu", Setup(tmp_path / "logs", address="auto"))


def test_resources_are_read_and_counted(load_tiny: Any) -> None:
    found = load_tiny("resources={cpus: 2, gpus: 0.4, memory: 4GiB}").settings.resources
    assert (found.cpus, found.gpus, found.memory, found.memory_fraction) == (2.0, 0.4, 4 * 2**30, 0.4)
    from archspec.search.executors.cluster import _slots

    assert _slots({"CPU": 16, "GPU": 2, "memory": 64e9}, found) == 4
    assert _slots({"CPU": 5, "GPU": 2, "memory": 64e9}, found) == 2
    assert _slots({"CPU": 16, "GPU": 2, "memory": 9e9}, found) == 2
    with pytest.raises(archspec.SpecError, match=r"resources\.memory: found 4 elephants; required: bytes, such as 4GB"):
        load_tiny("resources={memory: 4 elephants}")
