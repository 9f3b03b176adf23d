"""How far jobs are, and that each client stops only its own."""

from __future__ import annotations

import base64
import io
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webuiapi import WebUIApi

from serving.security import tokens
from serving.security.gate import Gate
from serving.security.protection import Security
from serving.security.scopes import Scope
from tests.fakes.proofs import proves
from tests.fakes.serving import FakeServer, until
from tests.fakes.web import send, serve
from tests.serving.dialects.a1111.conftest import Studio

PREVIEWS = {"override_settings": {"show_progress_every_n_steps": 1}}


class Call(threading.Thread):
    """A call in a thread of its own."""

    def __init__(self, call: Callable[..., Any], *args: Any, **fields: Any) -> None:
        super().__init__(daemon=True)
        self._call = lambda: call(*args, **fields)
        self.start()

    def run(self) -> None:
        self.result = self._call()

    def end(self) -> Any:
        self.join(20)
        return self.result


def stopping(fake: FakeServer, begun: int = 2) -> int:
    """How many of so many jobs have ended or are about to."""
    return begun - len([run for run in fake.host.catalog.find("draw").runs if not run.job.stopped_by])


def pixels(text: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.rpartition(",")[2]))))


@proves("GET /sdapi/v1/progress", "skip_current_image", "id_task")
def test_progress_of_the_client_library(studio: Studio) -> None:
    fake, api = studio.fake, studio.api
    assert api.get_progress()["state"]["job_count"] == 0
    api.util_wait_for_ready(0.1)
    fake.draw.hold()
    call = Call(api.txt2img, prompt="a", steps=4, n_iter=2, **PREVIEWS)
    until(lambda: fake.draw.calls == 1)
    fake.draw.let(2)
    until(lambda: fake.draw.calls == 3)
    until(lambda: api.get_progress()["state"]["sampling_step"] == 2)
    found = api.get_progress()
    state = found["state"]
    assert found["progress"] == pytest.approx(0.25) and found["eta_relative"] > 0
    assert (state["job"], state["job_count"], state["job_no"], state["sampling_steps"]) == ("txt2img", 2, 0, 4)
    assert np.array_equal(pixels(found["current_image"]), fake.draw.picture)
    fake.draw.let(3)
    until(lambda: api.get_progress()["state"]["job_no"] == 1)
    assert api.get_progress()["progress"] >= 0.5
    id = state["id_task"]
    assert api.custom_get(f"sdapi/v1/progress?id_task={id}&skip_current_image=true")["current_image"] is None
    with pytest.raises(AssertionError):
        assert send(studio.server, f"/sdapi/v1/progress?id_task={id}x", verb="GET")[0].status == 200
    assert send(studio.server, "/sdapi/v1/progress?ghost=1", verb="GET")[0].status == 400
    fake.draw.release()
    assert len(call.end().images) == 2
    assert api.custom_get(f"sdapi/v1/progress?id_task={id}")["progress"] == 1


@proves("POST /internal/progress", "id_task", "id_live_preview", "live_preview")
def test_progress_as_the_page_of_the_web_ui_asks(studio: Studio) -> None:
    fake = studio.fake
    fake.draw.hold()

    def news(**fields: Any) -> Any:
        return studio.post("/internal/progress", {"id_task": "task(1)", "id_live_preview": -1, **fields})[1]

    assert news()["textinfo"] == "Waiting..." and not news()["queued"]
    body = {"steps": 4, "force_task_id": "task(1)", **PREVIEWS}
    call = Call(studio.post, "/sdapi/v1/txt2img", body)
    until(lambda: fake.draw.calls == 1)
    fake.draw.let(2)
    until(lambda: news()["progress"] == 0.5)
    found = news()
    assert found["active"] and not found["completed"] and found["live_preview"].startswith("data:image/png;base64,")
    assert np.array_equal(pixels(found["live_preview"]), fake.draw.picture)
    assert news(id_live_preview=found["id_live_preview"])["live_preview"] is None
    assert news(live_preview=False)["live_preview"] is None
    twice, content = studio.post("/sdapi/v1/txt2img", body)
    assert twice == 400 and content["detail"].startswith("force_task_id: 'task(1)' is that of another job")
    fake.draw.release()
    assert call.end()[0] == 200
    done = news()
    assert done["completed"] and not done["active"] and done["progress"] == 1
    assert studio.post("/sdapi/v1/txt2img", body)[0] == 200  # the id is free again


@proves("POST /sdapi/v1/interrupt", "id_task")
def test_each_client_stops_its_own_jobs(studio: Studio) -> None:
    fake, mine, other = studio.fake, studio.api, WebUIApi(port=studio.server.port)
    fake.draw.hold()
    calls = [Call(api.txt2img, prompt="a", steps=4, n_iter=3) for api in (mine, other)]
    by_id = Call(studio.post, "/sdapi/v1/txt2img", {"steps": 4, "force_task_id": "third"})
    until(lambda: fake.busy() == 3)
    assert other.get_progress()["state"]["job_count"] == 3
    stranger = studio.post("/sdapi/v1/interrupt", {})
    assert stranger[0] == 400 and stranger[1]["detail"].startswith(
        "id_task: is missing, and this client sent no cookie"
    )
    assert mine.interrupt() == {}
    until(lambda: stopping(fake, 3) == 1)
    assert studio.post("/sdapi/v1/interrupt", {"id_task": "fourth"})[0] == 404
    assert studio.post("/sdapi/v1/interrupt", {"id_task": "third"})[0] == 200
    fake.draw.release()
    stopped, whole = calls[0].end(), calls[1].end()
    assert stopped.images == [] and stopped.info["interrupted"]
    assert len(whole.images) == 3 and not whole.info["interrupted"]
    assert by_id.end()[1]["images"] == []
    assert fake.alive()


def test_others_see_no_picture(studio: Studio) -> None:
    fake = studio.fake
    fake.draw.hold()
    call = Call(studio.api.txt2img, prompt="a", steps=4, **PREVIEWS)
    until(lambda: fake.draw.calls == 1)
    fake.draw.let(1)
    until(lambda: studio.api.get_progress()["current_image"] is not None)
    seen = WebUIApi(port=studio.server.port).get_progress()
    assert seen["current_image"] is None and "id_task" not in seen["state"] and seen["progress"] == 0.25
    fake.draw.release()
    call.end()


@proves("POST /sdapi/v1/skip", "id_task")
def test_a_skipped_batch(studio: Studio) -> None:
    fake = studio.fake
    fake.draw.hold()
    call = Call(studio.post, "/sdapi/v1/txt2img", {"steps": 2, "n_iter": 3, "seed": 1, "force_task_id": "a"})
    until(lambda: fake.draw.calls == 1)
    assert studio.post("/sdapi/v1/skip", {"id_task": "a"})[0] == 200
    fake.draw.release()
    status, content = call.end()
    assert status == 200 and len(content["images"]) == 2
    assert [request.seed for request in studio.requests] == [1, 2, 3] and '"all_seeds": [2, 3]' in content["info"]


def test_a_client_that_leaves_stops_its_job(studio: Studio) -> None:
    fake = studio.fake
    fake.draw.hold()
    with socket.create_connection(("127.0.0.1", studio.server.port)) as connection:
        body = b'{"steps": 4, "n_iter": 2}'
        head = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(f"POST /sdapi/v1/txt2img HTTP/1.1\r\n{head}".encode() + body)
        until(lambda: fake.draw.calls == 1)
    until(fake.leaving)
    fake.draw.release()
    until(lambda: fake.busy() == 0)
    assert fake.alive() and len(studio.requests) == 2  # its first batch, and that of `alive`


def test_errors_end_a_job(studio: Studio) -> None:
    studio.fake.draw.failure = RuntimeError("secret")
    status, content = studio.post("/sdapi/v1/txt2img", {"steps": 1, "force_task_id": "a"})
    assert status == 500 and "secret" not in str(content)
    assert studio.post("/internal/progress", {"id_task": "a"})[1]["completed"]
    assert studio.fake.alive()


def test_tokens_tell_clients_apart(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    one, two = (tokens.new(file, name, {Scope.INFER}, None, None) for name in ("a", "b"))
    with FakeServer(tmp_path / "bundles", ready=True) as fake:
        server = serve(fake, Security(gate=Gate(file)))

        def post(token: str, path: str, body: Any) -> tuple[int, Any]:
            response, content = send(server, path, body, authorization=f"Bearer {token}")
            assert "set-cookie" not in response.headers
            return response.status, content

        fake.draw.hold()
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(post, token, "/sdapi/v1/txt2img", {"steps": 2, "force_task_id": "same"})
                for token in (one, two)]  # fmt: skip
            until(lambda: fake.busy() == 2)
            assert post(one, "/sdapi/v1/interrupt", {})[0] == 200
            until(lambda: stopping(fake) == 1)
            fake.draw.release()
            assert [len(call.result()[1]["images"]) for call in calls] == [0, 1]
        assert post(one, "/sdapi/v1/unload-checkpoint", {})[0] == 403
        assert post(one, "/sdapi/v1/options", {"show_progress_every_n_steps": 2})[0] == 200
        content = send(server, "/sdapi/v1/options", verb="GET", authorization=f"Bearer {one}")[1]
        assert content["show_progress_every_n_steps"] == 2
        other = send(server, "/sdapi/v1/options", verb="GET", authorization=f"Bearer {two}")[1]
        assert other["show_progress_every_n_steps"] == 10
        assert send(server, "/sdapi/v1/txt2img", {})[0].status == 401
        as_password: Any = WebUIApi(port=server.port, username="anyone", password=two)
        assert len(as_password.txt2img(prompt="a", steps=1).images) == 1
        as_password.set_auth("anyone", f"{two}x")
        assert as_password.interrupt()["error"] == "Unauthenticated"
        fake.do(server.stop())


@pytest.mark.parametrize("verb", ["interrupt", "skip"])
def test_a_stopped_batch_has_its_newest_preview(studio: Studio, verb: str) -> None:
    fake = studio.fake
    fake.draw.hold()
    body = {"steps": 4, "n_iter": 2, "batch_size": 2, "seed": 3, "force_task_id": verb, **PREVIEWS}
    call = Call(studio.post, "/sdapi/v1/txt2img", body)
    until(lambda: fake.draw.calls == 1)
    fake.draw.let(2)
    until(lambda: studio.post("/internal/progress", {"id_task": verb})[1]["progress"] == 0.25)
    assert studio.post(f"/sdapi/v1/{verb}", {"id_task": verb})[0] == 200
    fake.draw.release()
    status, content = call.end()
    seeds = [3] if verb == "interrupt" else [3, 5, 6]
    assert status == 200 and f'"all_seeds": {seeds}' in content["info"] and len(content["images"]) == len(seeds)
    assert np.array_equal(pixels(content["images"][0]), fake.draw.picture) and "Seed: 3, " in content["info"]
