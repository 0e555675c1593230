"""The driver's second thread: order, and failures that are not lost."""

from __future__ import annotations

import threading

import pytest

from archspec.errors import RunError
from archspec.search import background
from archspec.search.background import Background


def test_jobs_are_done_in_order_and_all_before_the_end() -> None:
    found: list[int] = []
    worker = Background()
    for number in range(3 * background.MOST_WAITING):
        worker.do(lambda number=number: found.append(number))  # type: ignore[misc]
    worker.finish()
    assert found == list(range(3 * background.MOST_WAITING))


def test_a_failure_is_raised_by_the_next_call_and_what_follows_it_is_done() -> None:
    def fail() -> None:
        assert begin.wait(10)
        raise RunError("no room")

    worker, begin, done, found = Background(), threading.Event(), threading.Event(), list[int]()
    worker.do(fail)
    worker.do(done.set)
    begin.set()
    assert done.wait(10)
    with pytest.raises(RunError, match="no room"):
        worker.do(lambda: found.append(1))
    worker.do(lambda: found.append(2))
    worker.finish()
    assert found == [2]
    last = Background()
    last.do(fail)
    last._thread.submit(found.append, 3)
    with pytest.raises(RunError, match="no room"):
        last.finish()
    assert found == [2, 3]
