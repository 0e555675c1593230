"""The worker's end: reads requests from its socket, evaluates, answers. Ends when the driver does."""

from __future__ import annotations

import importlib
import os
import runpy
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from archspec import catalog
from archspec.errors import RunError

_ran: set[str] = set()


def main(setup: Mapping[str, Any]) -> None:
    """Serve requests until the socket closes.

    Args:
        setup: ``socket`` (a file descriptor), ``modules`` and ``main`` (what defines the user's components),
            ``threads`` and ``memory_fraction`` (what it may take).
    """
    connection: Connection[Any, Any] = Connection(setup["socket"])
    inbox: SimpleQueue[dict[str, Any]] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()

    from archspec.search.evaluation import evaluate

    prepare_device(setup["threads"], setup["memory_fraction"])
    load_components(setup["modules"], setup["main"])
    while True:
        request = inbox.get()
        key = request["key"]

        def report(progress: dict[str, Any], key: str = key) -> None:
            connection.send({"key": key, "status": "progress", "data": progress})

        connection.send({"key": key, "status": "begun"})
        try:
            evaluate(request, report)
        except RunError as error:
            connection.send({"key": key, "status": "unwritable", "reason": str(error)})
        else:
            connection.send({"key": key, "status": "finished"})


def _listen(connection: Connection[Any, Any], inbox: SimpleQueue[dict[str, Any]]) -> None:
    """Pass requests on; when the driver is gone, so is the worker, in the middle of whatever it does."""
    while True:
        try:
            inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(1)


def prepare_device(threads: int, memory_fraction: float | None) -> None:
    """Take no more than this process's share: threads on a CPU, memory on a GPU that others use too."""
    import torch

    if "CUDA_VISIBLE_DEVICES" not in os.environ or not torch.cuda.is_available():
        torch.set_num_threads(threads)
    elif memory_fraction is not None:
        torch.cuda.set_per_process_memory_fraction(memory_fraction)


def load_components(modules: Sequence[str], main: str | None) -> None:
    """Register the components that requests may name: the shipped ones, the user's modules and script. Once."""
    catalog.load_search()
    for module in modules:
        importlib.import_module(module)
    if main is not None and main not in _ran:
        _ran.add(main)
        runpy.run_path(main, run_name="__archspec_worker__")
