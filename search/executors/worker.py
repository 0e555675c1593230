"""The worker's end: reads requests from its socket, evaluates, answers. Ends when the driver does."""

from __future__ import annotations

import importlib
import os
import runpy
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from archspec import catalog


def main(setup: Mapping[str, Any]) -> None:
    """Serve requests until the socket closes.

    Args:
        setup: ``socket`` (a file descriptor), ``modules`` and ``main`` (what defines the user's components).
    """
    connection: Connection[Any, Any] = Connection(setup["socket"])
    inbox: SimpleQueue[dict[str, Any]] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()

    import torch

    from archspec.search.evaluation import evaluate

    if "CUDA_VISIBLE_DEVICES" not in os.environ or not torch.cuda.is_available():
        torch.set_num_threads(1)
    _load_components(setup)
    while True:
        request = inbox.get()
        key = request["key"]

        def report(progress: dict[str, Any], key: str = key) -> None:
            connection.send({"key": key, "status": "progress", "data": progress})

        evaluate(request, report)
        connection.send({"key": key, "status": "finished"})


def _listen(connection: Connection[Any, Any], inbox: SimpleQueue[dict[str, Any]]) -> None:
    """Pass requests on; when the driver is gone, so is the worker, in the middle of whatever it does."""
    while True:
        try:
            inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(1)


def _load_components(setup: Mapping[str, Any]) -> None:
    catalog.load_search()
    for module in setup["modules"]:
        importlib.import_module(module)
    if setup["main"] is not None:
        runpy.run_path(setup["main"], run_name="__archspec_worker__")
