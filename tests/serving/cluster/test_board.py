from __future__ import annotations

from dataclasses import replace

import pytest

from serving.cluster import board as module
from serving.cluster.board import Board
from serving.host.states import ModelState, Status

COLD = Status("draw", ModelState.UNLOADED, "int8", "image", None, None, None, 0, 0, on_demand=True)
LOADING = replace(COLD, state=ModelState.LOADING, on_demand=False)
READY = replace(LOADING, state=ModelState.READY, target="openvino", device="CPU", notes=("Slow.",), running=2)


def test_a_model_without_replicas_is_loaded_on_demand() -> None:
    overview = Board([COLD], repository=True).overview()
    assert overview.statuses == [COLD]
    assert overview.named == ("draw",)
    assert overview.repository


def test_replicas_are_joined() -> None:
    board = Board([COLD], repository=False)
    board.report("a", [replace(LOADING, queued=1)])
    board.report("b", [replace(READY, counts={"runs": 2.0}, memory={"cpu": 5})])
    board.report("c", [replace(READY, counts={"runs": 3.0, "failed": 1.0}, memory={"cpu": 7})])
    board.report("c", [replace(READY, counts={"runs": 4.0, "failed": 1.0}, memory={"cpu": 7})])
    (found,) = board.overview().statuses
    assert found.state is ModelState.READY
    assert (found.running, found.queued, found.target) == (4, 1, "openvino")
    assert found.counts == {"runs": 6.0, "failed": 1.0}
    assert found.memory == {"cpu": 12}
    assert found.notes == ("Slow.", "It has 3 replicas on the cluster.")


def test_models_of_the_repository_are_those_that_replicas_report() -> None:
    board = Board([COLD], repository=True)
    board.report("a", [replace(READY, name="talk")])
    assert [status.name for status in board.overview().statuses] == ["draw", "talk"]
    assert board.overview().named == ("draw",)


def test_a_silent_replica_counts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    board = Board([COLD], repository=False)
    board.report("a", [READY])
    now += module.SILENT_SECONDS - 1
    assert board.overview().statuses[0].state is ModelState.READY
    now += 1
    assert board.overview().statuses == [COLD]


def test_a_board_says_that_the_cluster_stops() -> None:
    board = Board([COLD], repository=False)
    assert not board.overview().stopping
    board.stop()
    assert board.overview().stopping
