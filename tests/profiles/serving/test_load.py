from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

import pytest

from profiles.serving.load import Load, Refused, observe


def test_clients_of_a_closed_load_have_one_request_each_at_a_time() -> None:
    gate, running, most, seen = threading.Lock(), 0, 0, list[int]()

    def send(number: int, output: Callable[[], None]) -> float:
        nonlocal running, most
        with gate:
            running, most = running + 1, max(most, running + 1)
            seen.append(number)
        time.sleep(0.02)
        output()
        output()  # only the first counts
        time.sleep(0.02)
        with gate:
            running -= 1
        return 3.0

    found = observe(Load("closed", 2, 6), send, itertools.count(10))
    assert most == 2 and sorted(seen) == [10, 11, 12, 13, 14, 15]
    assert found["amount"] == 18 and len(found["first"]) == 6 and found["refused"] == 0
    assert found["seconds"] >= 3 * 0.04 and all(0.02 <= first < found["seconds"] for first in found["first"])


def test_requests_of_an_open_load_wait_for_a_slow_server() -> None:
    """The time that a request waits counts from its arrival, and all arrive though none is answered."""
    server = threading.Lock()

    def send(number: int, output: Callable[[], None]) -> float:
        if number == 3:
            raise Refused("too many")
        with server:
            time.sleep(0.03)
            output()
        return 1.0

    found = observe(Load("open", 200, 8), send, itertools.count())
    assert found["refused"] == 1 and found["amount"] == 7 and len(found["first"]) == 7
    assert max(found["first"]) > 4 * 0.03, "the last one waited for most others"


def test_other_errors_end_the_measurement() -> None:
    def send(number: int, output: Callable[[], None]) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        observe(Load("closed", 1, 2), send, itertools.count())


def test_loads_are_lines() -> None:
    assert Load.parse(str(Load("open", 0.25, 7))) == Load("open", 0.25, 7)
    with pytest.raises(ValueError, match="closed or open, not ajar"):
        Load.parse("ajar 1 1")
