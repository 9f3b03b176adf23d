"""What is refused before anything is started, and what is announced of each model."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")
from ray.serve.schema import ApplicationStatus

from enginecast.testing.server import bundle
from runtime.errors import InvalidInput, NotFound, Unavailable
from serving.cluster import deploying
from serving.host.offers import Offer
from serving.host.states import ModelState
from serving.settings import Settings


def start(settings: Settings) -> None:
    deploying.start(replace(settings, engine="ray"), lambda line: None)


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"^ray_address: 'nonsense' is none, expected HOST:PORT"):
        start(Settings(["a"], ray_address="nonsense"))


def test_a_cluster_that_does_not_answer_is_reported_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(Unavailable, match="no Ray cluster answers at 127"):
        start(Settings(["a"], ray_address=f"127.0.0.1:{port}"))


def test_models_are_checked_before_a_cluster_is_started(tmp_path: Path) -> None:
    bundle(tmp_path, "draw")
    with pytest.raises(InvalidInput, match=r"^name: 'a#b' has a #, which Ray does not allow"):
        start(Settings([f"a#b={tmp_path / 'draw'}"]))
    with pytest.raises(NotFound, match="there is no folder"):
        start(Settings(None, repository=tmp_path / "nowhere"))


def test_a_model_without_a_replica_is_loading_unless_none_always_runs(tmp_path: Path) -> None:
    offer = Offer.of(bundle(tmp_path, "draw").root)
    found = deploying._status(offer, 1)
    assert (found.state, found.on_demand, found.task) == (ModelState.LOADING, False, "image")
    found = deploying._status(offer, 0)
    assert (found.state, found.on_demand) == (ModelState.UNLOADED, True)
    found = deploying._status(Offer.of(tmp_path / "gone"), 1)
    assert found.state is ModelState.FAILED
    assert found.error and str(tmp_path) not in found.error


def test_each_model_is_announced_when_it_is_ready_or_fails(tmp_path: Path) -> None:
    loading = deploying._status(Offer.of(bundle(tmp_path, "draw").root), 1)
    ready = replace(loading, state=ModelState.READY, target="openvino", device="CPU")
    running = SimpleNamespace(status=ApplicationStatus.RUNNING, message="")
    starting = SimpleNamespace(status=ApplicationStatus.DEPLOYING, message="")
    failed = SimpleNamespace(status=ApplicationStatus.DEPLOY_FAILED, message="no room")
    assert deploying._line("draw", loading, starting) is None
    assert deploying._line("draw", ready, running) == "draw is ready on openvino (CPU)"
    assert deploying._line("draw", loading, failed) == "draw cannot be served: no room"
    broken = replace(loading, state=ModelState.FAILED, error="it is damaged")
    assert deploying._line("draw", broken, running) == "draw cannot be served: it is damaged"
    assert deploying._line("(repository)", None, running) == "(repository) is ready"
