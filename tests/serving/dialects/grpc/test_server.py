"""The server on real loopback gRPC, over fake engines."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image

from runtime.errors import (
    BundleError,
    Cancelled,
    DeadlineExceeded,
    EnginecastError,
    EngineError,
    EngineUnavailable,
    InvalidInput,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from runtime.placing.choices import Decision
from serving.dialects.grpc.client import Client
from serving.dialects.grpc.server import Server
from serving.enginecast_pb import chat_pb2, image_pb2, image_pb2_grpc, model_pb2
from serving.host.models import ModelHost
from serving.host.offers import Limits, Offer
from tests.fakes.serving import FakeModel, FakeServer, bundle, request, until

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def ask(text: str = "what is it?", **fields: object) -> chat_pb2.ChatRequest:
    turn = chat_pb2.Message(role=chat_pb2.ROLE_USER, parts=[chat_pb2.Part(text=text)])
    return chat_pb2.ChatRequest(**{"model": "talk", "messages": [turn], **fields})  # type: ignore[arg-type]


def show(image: bytes) -> chat_pb2.ChatRequest:
    return ask(messages=[chat_pb2.Message(role=chat_pb2.ROLE_USER, parts=[chat_pb2.Part(image=image)])])


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims this size, with no pixels behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def kinds(responses: list[image_pb2.GenerateResponse]) -> list[str | None]:
    return [response.WhichOneof("event") for response in responses]


GENERATE = "/enginecast.v1.ImageService/Generate"


def other(server: FakeServer) -> grpc.Channel:
    """Another client's connection."""
    return grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])


class TestGenerate:
    def test_stream(self, warm: FakeServer) -> None:
        responses = list(warm.client.generate(request(steps=3, seed=5, images=2, preview_every=2)))
        assert kinds(responses) == ["queued", "progress", "progress", "progress", "image", "image", "done"]
        steps = [r.progress for r in responses if r.HasField("progress")]
        assert [(p.step, p.total, p.HasField("preview_png")) for p in steps] == [
            (1, 3, False),
            (2, 3, True),
            (3, 3, False),
        ]
        assert steps[0].eta_seconds > 0 and steps[-1].eta_seconds == 0
        images = [r.image for r in responses if r.HasField("image")]
        assert [(i.width, i.height, i.seed, i.index) for i in images] == [(16, 8, 5, 0), (16, 8, 6, 1)]
        assert Image.open(io.BytesIO(images[0].png)).size == (16, 8)
        done = responses[-1].done
        assert [(use.submodel, use.target, use.device, use.calls) for use in done.engines] == [
            ("denoiser", "fake", "none", 3)
        ]
        assert (
            done.engines[0].precision == "int8 W8A8, float32"
            and not done.engines[0].fallbacks
            and done.engines[0].reload_seconds == 0
        )
        assert 0 < done.timings.first_output_seconds <= done.timings.run_seconds

    def test_progress_arrives_while_it_runs(self, warm: FakeServer) -> None:
        warm.draw.hold()
        responses = warm.client.generate(request(steps=2))
        assert next(responses).HasField("queued")
        warm.draw.let(1)
        assert next(responses).progress.step == 1
        assert warm.draw.calls <= 2
        warm.draw.release()
        assert kinds(list(responses)) == ["progress", "image", "done"]

    def test_zero_differs_from_unset(self, warm: FakeServer) -> None:
        with pytest.raises(InvalidInput, match=r"^steps: is 0") as caught:
            list(warm.client.generate(request(steps=0)))
        assert caught.value.field == "steps"
        assert kinds(list(warm.client.generate(request())))[-1] == "done"


class TestChat:
    def test_stream(self, warm: FakeServer) -> None:
        responses = list(warm.client.chat(ask()))
        assert "".join(r.delta.text for r in responses) == "a red círcle"
        done = responses[-1].done
        assert (done.reason, done.prompt_tokens, done.completion_tokens) == (chat_pb2.FINISH_REASON_STOP, 7, 3)
        assert done.timings.HasField("first_output_seconds")
        assert done.engines[0].calls == 3

    def test_cut_at_max_tokens(self, warm: FakeServer) -> None:
        assert list(warm.client.chat(ask(max_tokens=1)))[-1].done.reason == chat_pb2.FINISH_REASON_LENGTH


class TestBadInput:
    @pytest.mark.parametrize(
        ("wanted", "field"),
        [
            (request(steps=0), "steps"),
            (request(steps=1_000_000), "steps"),
            (request(model="talk"), "model"),
            (request(model=""), "model"),
            (request(guidance_scale=float("nan")), "guidance_scale"),
            (request(seed=2**64 - 1), "seed"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_picture(self, warm: FakeServer, wanted: image_pb2.GenerateRequest, field: str) -> None:
        with pytest.raises(InvalidInput) as caught:
            list(warm.client.generate(wanted))
        assert caught.value.field == field
        assert warm.alive()

    @pytest.mark.parametrize(
        ("wanted", "field"),
        [
            (ask(messages=[]), "messages"),
            (show(b"no picture"), "messages[0].parts[0].image"),
            (show(png(10_000, 10_000)), "messages[0].parts[0].image"),
            (show(png(64, 64)), "messages[0].parts[0].image"),
            (
                ask(messages=[chat_pb2.Message(role=chat_pb2.ROLE_USER, parts=[chat_pb2.Part()])]),
                "messages[0].parts[0]",
            ),
            (ask(messages=[chat_pb2.Message(parts=[chat_pb2.Part(text="hi")])]), "messages[0].role"),
            (ask(max_tokens=0), "max_tokens"),
        ],
        ids=[
            "no messages",
            "corrupt picture",
            "100 megapixels",
            "truncated picture",
            "empty part",
            "no role",
            "no tokens",
        ],
    )
    def test_chat(self, warm: FakeServer, wanted: chat_pb2.ChatRequest, field: str) -> None:
        with pytest.raises(InvalidInput) as caught:
            list(warm.client.chat(wanted))
        assert caught.value.field == field
        assert list(warm.client.chat(ask()))[-1].HasField("done")

    def test_unknown_model(self, warm: FakeServer) -> None:
        with pytest.raises(NotFound, match="did you mean 'draw'"):
            list(warm.client.generate(request(model="drow")))

    def test_a_message_too_large_is_refused(self, warm: FakeServer) -> None:
        stub = image_pb2_grpc.ImageServiceStub(
            grpc.insecure_channel(warm.address, [("grpc.max_send_message_length", -1)])
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request(prompt="x" * (65 << 20))))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert warm.alive()

    @pytest.mark.parametrize(
        "data", [b"\xff", b"\x0a\x02\xff\xfe", b"\x0a\x7f", b"\x0b" * 200], ids=["tag", "utf-8", "cut", "groups"]
    )
    def test_bytes_that_are_no_message(self, warm: FakeServer, caplog: pytest.LogCaptureFixture, data: bytes) -> None:
        with other(warm) as channel:
            for method in (
                GENERATE,
                "/enginecast.v1.ChatService/Chat",
                "/enginecast.v1.ModelService/GetModel",
                "/grpc.health.v1.Health/Check",
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    list(channel.unary_stream(method, None, None)(data))
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, method
                assert "cannot be decoded" in caught.value.details()
        assert not caplog.records

    def test_a_call_without_a_request(self, warm: FakeServer) -> None:
        with other(warm) as channel, pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream(GENERATE, None, None)(iter(())))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    def test_names_of_control_characters_are_escaped(self, warm: FakeServer) -> None:
        with pytest.raises(NotFound, match=r"model 'dr\\x00\\x1bw' is not served here") as caught:
            list(warm.client.generate(request(model="dr\0\x1bw")))
        assert str(caught.value).isprintable()

    def test_raw_status(self, warm: FakeServer) -> None:
        """What a client that is not ours sees."""
        stub = image_pb2_grpc.ImageServiceStub(grpc.insecure_channel(warm.address))
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request(steps=0)))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert dict(caught.value.trailing_metadata() or ())["enginecast-field"] == "steps"  # type: ignore[arg-type]  # pairs they are

    def test_a_long_message_still_arrives(self, warm: FakeServer) -> None:
        with pytest.raises(NotFound, match=r"is not served here|…"):
            list(warm.client.generate(request(model="ü" * 50_000)))

    def test_unexpected_failure(self, warm: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
        warm.draw.failure = ValueError("a secret of the engine")
        with pytest.raises(EnginecastError) as caught:
            list(warm.client.generate(request()))
        assert "secret" not in str(caught.value) and "INTERNAL" in str(caught.value)
        assert "a secret of the engine" in caplog.text
        assert warm.alive()


class TestLeaving:
    def test_cancelling_frees_the_engine_within_one_step(self, warm: FakeServer) -> None:
        draw = warm.draw
        draw.hold()
        responses = warm.client.generate(request(steps=1000))
        draw.let(3)
        assert [next(responses).WhichOneof("event") for _ in range(4)][-1] == "progress"
        until(lambda: draw.calls == 4)
        responses.close()  # type: ignore[attr-defined]
        until(warm.leaving)
        draw.release()
        until(lambda: warm.busy() == 0)
        assert draw.calls == 4
        assert warm.alive()

    def test_a_killed_client_frees_the_engine_within_one_step(self, warm: FakeServer) -> None:
        draw = warm.draw
        draw.hold()
        program = (
            "from serving.dialects.grpc.client import Client; from tests.fakes.serving import request\n"
            f"for r in Client('{warm.address}').generate(request(steps=1000)): print(r.WhichOneof('event'), flush=True)"
        )
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "queued\n"
            draw.let(2)
            assert process.stdout.readline() == "progress\n"
            until(lambda: draw.calls == 3)
            process.kill()
        until(warm.leaving)
        draw.release()
        until(lambda: warm.busy() == 0)
        assert draw.calls == 3
        assert warm.alive()

    def test_deadline(self, warm: FakeServer) -> None:
        warm.draw.hold()
        with pytest.raises(DeadlineExceeded):
            list(warm.client.generate(request(steps=1000), timeout=0.3))
        until(warm.leaving)
        warm.draw.release()
        until(lambda: warm.busy() == 0)
        assert warm.draw.calls == 1
        assert warm.alive()

    def test_a_waiting_request_that_is_cancelled_never_runs(self, warm: FakeServer) -> None:
        warm.draw.hold()
        first = warm.client.generate(request(steps=1))
        next(first)
        second = warm.client.generate(request(steps=1))
        assert next(second).queued.position == 1
        second.close()  # type: ignore[attr-defined]
        until(lambda: warm.busy() == 1)
        warm.draw.release()
        assert kinds(list(first))[-1] == "done"
        assert warm.draw.calls == 1

    def test_closing_the_channel(self, warm: FakeServer) -> None:
        warm.draw.hold()
        client = Client(warm.address)
        responses = client.generate(request(steps=1000))
        next(responses)
        client.close()
        with pytest.raises(Cancelled):
            list(responses)
        until(warm.leaving)


class TestAnUnreadAnswer:
    def test_a_reader_that_stands_still_frees_the_engine(
        self, warm: FakeServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("serving.dialects.grpc.status.UNREAD_SECONDS", 0.5)
        noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)
        monkeypatch.setattr(FakeModel, "picture", noise)
        warm.draw.engine.function = lambda inputs: time.sleep(0.01) or {}
        responses = warm.client.generate(request(steps=1000, preview_every=1))
        assert next(responses).HasField("queued")
        until(lambda: warm.busy() == 0)
        assert warm.draw.calls < 1000
        assert warm.alive()
        with pytest.raises(Cancelled, match="read nothing"):
            list(responses)

    @pytest.mark.parametrize(
        ("seconds", "most"), [(1, 10), pytest.param(None, 31, marks=pytest.mark.full)], ids=["short", "as promised"]
    )
    def test_a_suspended_client_frees_the_engine(self, tmp_path: Path, seconds: int | None, most: float) -> None:
        """Its machine still acknowledges what arrives, and nothing else of it answers."""
        names = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
        server = FakeServer(tmp_path, Limits(), {} if seconds is None else dict.fromkeys(names, 1000 * seconds))
        program = (
            "from serving.dialects.grpc.client import Client; from tests.fakes.serving import request\n"
            f"for r in Client('{server.address}').generate(request(steps=1000)): print(r.WhichOneof('event'), "
            "flush=True)"
        )
        try:
            server.load_all()
            server.draw.engine.function = lambda inputs: time.sleep(0.1) or {}
            with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                assert [process.stdout.readline() for _ in range(2)] == ["queued\n", "progress\n"]
                process.send_signal(signal.SIGSTOP)
                until(lambda: server.busy() == 0, most)
                process.kill()
        finally:
            server.end()


def queued(client: Client, count: int) -> list[Any]:
    """Requests for pictures, each sent when the one before it has its place in the queue."""
    found: list[Any] = []
    for position in range(count):
        found.append(client.generate(request(steps=1)))
        assert next(found[-1]).queued.position == position
    return found


class TestQueue:
    def test_the_last_places_are_for_other_clients(self, tmp_path: Path) -> None:
        server = FakeServer(tmp_path, Limits(slots=1, max_queue=4))
        try:
            server.load_all()
            server.draw.hold()
            mine = queued(server.client, 4)
            with pytest.raises(ResourceExhausted, match="kept for other clients"):
                list(server.client.generate(request()))
            with other(server) as channel:
                theirs = channel.unary_stream(GENERATE, None, image_pb2.GenerateResponse.FromString)(
                    request(steps=1).SerializeToString()
                )
                assert next(theirs).queued.position == 4
                server.draw.release()
                assert kinds([*theirs])[-1] == "done"
            assert [kinds(list(responses))[-1] for responses in mine] == ["done"] * 4
        finally:
            server.end()

    def test_full(self, warm: FakeServer) -> None:
        warm.draw.hold()
        waiting = queued(warm.client, 3)
        model = warm.client.model("draw")
        assert (model.running, model.queued) == (1, 2)
        with pytest.raises(ResourceExhausted, match="queue of model draw is full"):
            list(warm.client.generate(request()))
        assert list(warm.client.chat(ask()))[-1].HasField("done"), "the other model has its own queue"
        warm.draw.release()
        assert [kinds(list(responses))[-1] for responses in waiting] == ["done"] * 3
        assert warm.alive()

    def test_one_at_a_time(self, warm: FakeServer) -> None:
        with ThreadPoolExecutor(3) as pool:
            streams = list(pool.map(lambda _: list(warm.client.generate(request(steps=5))), range(3)))
        assert [kinds(stream)[-1] for stream in streams] == ["done"] * 3
        assert warm.draw.calls == 15


class TestModels:
    def test_list_and_get(self, cold: FakeServer) -> None:
        assert [model.name for model in cold.client.models()] == ["draw", "talk"]
        assert cold.client.model("draw").state == model_pb2.MODEL_STATE_UNLOADED
        with pytest.raises(NotFound):
            cold.client.model("sing")

    def test_load_and_unload(self, cold: FakeServer) -> None:
        model = cold.client.load("draw", target="openvino")
        assert (model.state, model.kind, model.target, model.device) == (
            model_pb2.MODEL_STATE_READY,
            model_pb2.MODEL_KIND_DIFFUSION,
            "fake",
            "none",
        )
        assert cold.loads == [("draw", "openvino")]
        cold.client.load("draw")
        assert len(cold.loads) == 1, "loading what is loaded changes nothing"
        with pytest.raises(InvalidInput, match="unload it before"):
            cold.client.load("draw", target="onnxruntime")
        model = cold.client.unload("draw")
        assert model.state == model_pb2.MODEL_STATE_UNLOADED and not model.HasField("target")
        assert cold.draw.closed
        cold.client.unload("draw")

    def test_requests_wait_while_it_loads(self, cold: FakeServer) -> None:
        cold.load_gate.clear()
        with ThreadPoolExecutor(2) as pool:
            loading = pool.submit(cold.client.load, "draw")
            until(lambda: cold.client.model("draw").state == model_pb2.MODEL_STATE_LOADING)
            with pytest.raises(Unavailable, match="is loading"):
                cold.client.load("draw")
            early = pool.submit(lambda: kinds(list(cold.client.generate(request()))))
            until(lambda: cold.client.model("draw").queued == 1)
            cold.load_gate.set()
            assert loading.result(10).state == model_pb2.MODEL_STATE_READY
            assert early.result(10)[-1] == "done"
        assert len(cold.loads) == 1

    def test_a_request_loads_it(self, cold: FakeServer) -> None:
        assert kinds(list(cold.client.generate(request(), timeout=20)))[-1] == "done"
        assert cold.client.model("draw").state == model_pb2.MODEL_STATE_READY
        with pytest.raises(InvalidInput, match="has the task chat"):
            list(cold.client.generate(request(model="talk")))
        assert cold.loads == [("draw", None)], "a mistake loads nothing"

    def test_loading_counts_against_the_deadline(self, cold: FakeServer) -> None:
        cold.load_gate.clear()
        with pytest.raises(DeadlineExceeded):
            list(cold.client.generate(request(), timeout=0.2))
        until(lambda: cold.busy() == 0)
        cold.load_gate.set()
        until(lambda: cold.client.model("draw").state == model_pb2.MODEL_STATE_READY)
        assert cold.alive()

    def test_a_request_does_not_load_what_was_unloaded(self, warm: FakeServer) -> None:
        warm.client.unload("draw")
        with pytest.raises(Unavailable, match="is unloaded"):
            list(warm.client.generate(request()))
        warm.client.load("draw")
        assert warm.alive()

    def test_loading_survives_the_caller(self, cold: FakeServer) -> None:
        cold.load_gate.clear()
        with pytest.raises(DeadlineExceeded):
            cold.client.load("draw", timeout=0.2)
        cold.load_gate.set()
        until(lambda: cold.client.model("draw").state == model_pb2.MODEL_STATE_READY)

    @pytest.mark.parametrize("target", ["missing", "x" * 5_000_000, ""], ids=["unknown", "5 MB", "empty"])
    def test_a_wrong_target_changes_nothing(self, cold: FakeServer, target: str) -> None:
        with pytest.raises(InvalidInput) as caught:
            cold.client.load("draw", target=target)
        assert caught.value.field == "target" and len(str(caught.value)) < 1000
        model = cold.client.model("draw")
        assert model.state == model_pb2.MODEL_STATE_UNLOADED and not model.HasField("error") and not cold.loads

    def test_a_target_that_cannot_be_used_changes_nothing(self, cold: FakeServer) -> None:
        cold.load_failure = EngineUnavailable("tensorrt: no device")
        with pytest.raises(EngineUnavailable, match="no device"):
            cold.client.load("draw", target="tensorrt")
        assert cold.client.model("draw").state == model_pb2.MODEL_STATE_UNLOADED
        with pytest.raises(EngineUnavailable):
            cold.client.load("draw")
        assert cold.client.model("draw").state == model_pb2.MODEL_STATE_FAILED
        with pytest.raises(EngineUnavailable):
            cold.client.load("draw", target="tensorrt")
        assert cold.client.model("draw").state == model_pb2.MODEL_STATE_FAILED

    def test_clients_get_names_and_the_log_paths(
        self, cold: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        cold.load_failure = BundleError(
            f"bundle {tmp_path}/draw is damaged: see {Path.home()}/.cache/x" + "y" * 5_000_000
        )
        with pytest.raises(BundleError, match="bundle draw is damaged: see") as caught:
            cold.client.load("draw")
        error = cold.client.model("draw").error
        assert (
            "bundle draw is damaged" in error and len(error) <= 1000 and str(tmp_path) not in f"{caught.value}{error}"
        )
        assert str(Path.home()) not in error and str(tmp_path) in caplog.text
        assert [model.name for model in cold.client.models()] == ["draw", "talk"]

    @pytest.mark.parametrize("seconds", [1e9, float("nan"), float("inf"), -1.0])
    def test_a_grace_period_out_of_range(self, warm: FakeServer, seconds: float) -> None:
        with pytest.raises(InvalidInput, match=r"grace_seconds: is .*, expected 0 to 3600"):
            warm.client.unload("draw", seconds)
        assert warm.client.model("draw").state == model_pb2.MODEL_STATE_READY

    def test_a_step_that_never_ends_is_left_behind(self, warm: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("serving.host.lifecycle.STUCK_SECONDS", 0.2)
        warm.draw.hold()
        responses = warm.client.generate(request())
        assert next(responses).HasField("queued")
        until(lambda: warm.draw.calls == 1)
        assert warm.client.unload("draw", 0, timeout=10).state == model_pb2.MODEL_STATE_UNLOADED
        with pytest.raises(Unavailable):
            list(responses)
        assert not warm.draw.closed, "its step still runs"
        warm.draw.release()
        until(lambda: warm.draw.closed)
        warm.client.load("draw")
        assert warm.alive()

    def test_failing_to_load(self, cold: FakeServer) -> None:
        cold.load_failure = BundleError("unet was altered")
        with pytest.raises(BundleError, match="unet was altered"):
            cold.client.load("draw")
        model = cold.client.model("draw")
        assert model.state == model_pb2.MODEL_STATE_FAILED and model.error == "unet was altered"
        with pytest.raises(Unavailable, match="unet was altered"):
            list(cold.client.generate(request()))
        cold.load_failure = None
        cold.client.load("draw")
        assert cold.alive()

    def test_unloading_lets_requests_finish(self, warm: FakeServer) -> None:
        warm.draw.hold()
        responses = warm.client.generate(request(steps=2))
        next(responses)
        with ThreadPoolExecutor(1) as pool:
            unloading = pool.submit(warm.client.unload, "draw", 10)
            until(lambda: warm.client.model("draw").state == model_pb2.MODEL_STATE_UNLOADING)
            with pytest.raises(Unavailable, match="is unloading"):
                list(warm.client.generate(request()))
            assert not warm.draw.closed
            warm.draw.release()
            assert kinds(list(responses))[-1] == "done"
            unloading.result(10)
        assert warm.draw.closed

    def test_unloading_without_grace_stops_them(self, warm: FakeServer) -> None:
        warm.draw.hold()
        responses = warm.client.generate(request(steps=1000))
        next(responses)
        until(lambda: warm.draw.calls == 1)
        with ThreadPoolExecutor(1) as pool:
            unloading = pool.submit(warm.client.unload, "draw", 0)
            with pytest.raises(Unavailable, match="being unloaded"):
                list(responses)
            assert not warm.draw.closed, "the step that runs still needs the engine"
            warm.draw.release()
            unloading.result(10)
        assert warm.draw.closed and warm.draw.calls == 1


class TestWhatReallyRuns:
    def test_placements_and_notes_of_a_model(self, cold: FakeServer) -> None:
        cold.draw.engine.fallbacks = ("3 of 120 nodes on the CPU: Loop",)
        cold.draw.engine.decisions = {
            "attention": Decision("float32", "measured on this processor: 1.24 x as fast as the default")
        }
        cold.draw.notes = ("denoiser is on fake since cuda:0 is full",)
        model = cold.client.load("draw")
        (one,) = model.placements
        assert (one.submodel, one.target, one.device, one.precision) == (
            "denoiser",
            "fake",
            "none",
            "int8 W8A8, float32",
        )
        assert list(one.choices) == ["attention=float32: measured on this processor: 1.24 x as fast as the default"]
        assert (list(one.fallbacks), list(model.notes)) == (list(cold.draw.engine.fallbacks), list(cold.draw.notes))
        done = list(cold.client.generate(request()))[-1].done.engines[0]
        assert (done.fallbacks, done.choices) == (one.fallbacks, one.choices)
        assert not cold.client.unload("draw").placements

    def test_notes_are_in_every_answer_of_either_kind(self, warm: FakeServer) -> None:
        for model in warm.models.values():
            model.notes = ("one is replaced", "the other is left out")
        question = chat_pb2.Message(role=chat_pb2.ROLE_USER, parts=[chat_pb2.Part(text="?")])
        drawn = list(warm.client.generate(request()))[-1].done
        said = list(warm.client.chat(chat_pb2.ChatRequest(model="talk", messages=[question])))[-1].done
        assert list(drawn.notes) == list(said.notes) == ["one is replaced", "the other is left out"]

    def test_the_time_of_loading_again_is_reported(self, warm: FakeServer) -> None:
        warm.draw.engine.reload_seconds = 5.0
        responses = warm.client.generate(request(steps=2))
        assert next(responses).HasField("queued")
        next(responses)
        warm.draw.engine.reload_seconds = 7.5
        assert list(responses)[-1].done.engines[0].reload_seconds in (0.0, 2.5), "what was spent during this request"


class TestALostDevice:
    """Engines that raise on requests and on samples."""

    def lose(self, server: FakeServer, successor: FakeModel | Exception) -> None:
        server.draw.successor = successor
        server.draw.failure = EngineError("CUDA could not run: device was lost")
        with pytest.raises(EnginecastError, match="device was lost"):
            list(server.client.generate(request()))

    def test_the_model_is_loaded_elsewhere(self, warm: FakeServer) -> None:
        lost, successor = warm.draw, FakeModel()
        self.lose(warm, successor)
        until(lambda: warm.host.status("draw").state.value == "ready" and lost.closed)
        warm.models["draw"] = successor
        assert warm.alive() and successor.calls

    def test_or_failed_with_the_reason(self, warm: FakeServer) -> None:
        self.lose(warm, EngineError("no other place"))
        until(lambda: warm.client.model("draw").state == model_pb2.MODEL_STATE_FAILED)
        error = warm.client.model("draw").error
        assert (
            "denoiser of model draw stopped working" in error
            and "device was lost" in error
            and "no other place" in error
        )
        with pytest.raises(Unavailable, match="device was lost"):
            list(warm.client.generate(request()))
        assert list(warm.client.chat(ask()))[-1].HasField("done"), "the other model goes on"
        warm.draw.successor = None
        warm.client.load("draw")
        assert warm.alive()

    def test_requests_that_wait_are_answered(self, warm: FakeServer) -> None:
        warm.draw.hold()
        warm.draw.successor = FakeModel()
        streams = [warm.client.generate(request()) for _ in range(3)]
        assert all(next(stream).HasField("queued") for stream in streams)
        warm.draw.failure = EngineError("device was lost")
        lost = warm.draw
        lost.release()
        for stream in streams:
            with pytest.raises(EnginecastError, match="device was lost"):
                list(stream)
        until(lambda: warm.host.status("draw").state.value == "ready" and lost.closed)
        assert isinstance(lost.successor, FakeModel)
        warm.models["draw"] = lost.successor
        assert warm.alive()

    def test_an_error_of_one_request_changes_nothing(self, warm: FakeServer) -> None:
        warm.draw.failure = EngineError("unet gave NaN")
        with pytest.raises(EnginecastError, match="gave NaN"):
            list(warm.client.generate(request()))
        until(lambda: warm.host.catalog.find("draw").check is None)
        assert warm.client.model("draw").state == model_pb2.MODEL_STATE_READY and not warm.draw.closed
        assert warm.alive()

    def test_unloading_while_it_is_checked(self, warm: FakeServer) -> None:
        self.lose(warm, FakeModel())
        lost = warm.draw
        until(lambda: lost.closed or warm.host.catalog.find("draw").check is None)
        until(lambda: warm.host.status("draw").state.value == "ready")
        assert warm.client.unload("draw").state == model_pb2.MODEL_STATE_UNLOADED


class TestHealthAndReflection:
    @staticmethod
    def check(server: FakeServer, service: str) -> int:
        with grpc.insecure_channel(server.address) as channel:
            return int(health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service)).status)

    def test_watching(self, cold: FakeServer) -> None:
        """One watcher's leaving, or not reading, is nothing to another."""
        with other(cold) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch
            leaving, idle, watching = (watch(health_pb2.HealthCheckRequest(service="draw")) for _ in range(3))
            assert next(leaving).status == next(watching).status == NOT_SERVING
            leaving.cancel()
            cold.client.load("draw")
            assert next(watching).status == SERVING
            assert (
                next(watch(health_pb2.HealthCheckRequest(service="nothing"))).status
                == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            )
            idle.cancel()

    def test_a_service_that_is_not_known(self, cold: FakeServer) -> None:
        for name, code in (("nothing", grpc.StatusCode.NOT_FOUND), ("x" * 1_000_000, grpc.StatusCode.INVALID_ARGUMENT)):
            with pytest.raises(grpc.RpcError) as caught:
                self.check(cold, name)
            assert caught.value.code() is code

    def test_health(self, cold: FakeServer) -> None:
        images, chats = "enginecast.v1.ImageService", "enginecast.v1.ChatService"
        assert [self.check(cold, name) for name in ("", images, "draw")] == [NOT_SERVING] * 3
        assert self.check(cold, "enginecast.v1.ModelService") == SERVING
        cold.client.load("draw")
        until(lambda: self.check(cold, "") == SERVING)
        assert [self.check(cold, name) for name in (images, chats, "draw", "talk")] == [
            SERVING,
            NOT_SERVING,
            SERVING,
            NOT_SERVING,
        ]
        cold.client.unload("draw")
        until(lambda: self.check(cold, "") == NOT_SERVING)

    def test_reflection(self, cold: FakeServer) -> None:
        with grpc.insecure_channel(cold.address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            queries = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="enginecast.v1.ImageService"),
            ]
            listed, found = stub.ServerReflectionInfo(iter(queries))
        names = {service.name for service in listed.list_services_response.service}
        assert {f"enginecast.v1.{kind}Service" for kind in ("Image", "Chat", "Model")} | {
            "grpc.health.v1.Health"
        } <= names
        files = [FileDescriptorProto.FromString(data) for data in found.file_descriptor_response.file_descriptor_proto]
        assert "enginecast/v1/image.proto" in [file.name for file in files]


class TestStopping:
    def test_running_requests_finish(self, warm: FakeServer) -> None:
        warm.draw.hold()
        responses = warm.client.generate(request(steps=2))
        next(responses)
        stopping = threading.Thread(target=warm.stop)
        stopping.start()
        until(lambda: warm.host.stopping)
        with pytest.raises(Unavailable, match="stopping"):
            list(warm.client.generate(request()))
        warm.draw.release()
        assert kinds(list(responses))[-1] == "done"
        stopping.join(10)
        assert warm.draw.closed

    def test_what_does_not_finish_is_cancelled(self, warm: FakeServer) -> None:
        warm.draw.hold()
        responses = warm.client.generate(request(steps=1000))
        next(responses)
        until(lambda: warm.draw.calls == 1)
        stopping = threading.Thread(target=warm.stop, args=[0.1])
        stopping.start()
        with pytest.raises(Unavailable, match="the server is stopping"):
            list(responses)
        warm.draw.release()
        stopping.join(10)
        assert warm.draw.closed and warm.draw.calls == 1

    def test_the_servers_period_bounds_that_of_an_unload(self, warm: FakeServer) -> None:
        warm.draw.hold()
        responses = warm.client.generate(request(steps=1000))
        next(responses)
        with ThreadPoolExecutor(1) as pool:
            unloading = pool.submit(warm.client.unload, "draw", 3600)
            until(lambda: warm.host.status("draw").state.value == "unloading")
            stopping = threading.Thread(target=warm.stop, args=[0.1])
            stopping.start()
            with pytest.raises(Unavailable, match="did not finish"):
                list(responses)
            warm.draw.release()
            stopping.join(10)
            assert not stopping.is_alive() and warm.draw.closed
            unloading.exception(10)

    def test_a_load_is_not_waited_for(self, cold: FakeServer) -> None:
        cold.load_gate.clear()
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(cold.client.load, "draw")
            until(lambda: cold.client.model("draw").state == model_pb2.MODEL_STATE_LOADING)
            began = time.monotonic()
            cold.stop(20)
            assert time.monotonic() - began < 10
            cold.load_gate.set()
            assert loading.exception(10) is not None


class TestAddress:
    @pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:99999", ":1", "127.0.0.1:x"])
    def test_malformed(self, cold: FakeServer, address: str) -> None:
        async def make() -> None:
            Server(cold.host, address)

        with pytest.raises(InvalidInput, match="HOST:PORT"):
            cold.do(make())

    def test_in_use(self, cold: FakeServer) -> None:
        async def make() -> None:
            Server(cold.host, cold.address)

        with pytest.raises(Unavailable, match="in use"):
            cold.do(make())

    def test_no_server(self) -> None:
        with Client("127.0.0.1:1") as client, pytest.raises(Unavailable, match="no server answers"):
            client.models(timeout=5)

    def test_two_bundles_of_one_name(self, tmp_path: Path) -> None:
        same = bundle(tmp_path, "twin")
        with pytest.raises(
            InvalidInput, match=r"both called 'twin': give one another name, as in `enginecast serve twin=.* twin-2=.*`"
        ):
            ModelHost([same, same], lambda *_: FakeModel())
        host = ModelHost([Offer.of(same.root), Offer.of(same.root, "other")], lambda *_: FakeModel())
        assert [status.name for status in host.statuses()] == ["other", "twin"]

    @pytest.mark.parametrize("name", ["", " ", "a\nb", "a\0", " a", "x" * 201])
    def test_a_name_that_cannot_be_served(self, tmp_path: Path, name: str) -> None:
        root = bundle(tmp_path, "twin").root
        with pytest.raises(InvalidInput) as caught:
            ModelHost([Offer(name, root)], lambda *_: FakeModel())
        assert caught.value.field == "name"


def test_sigterm_finishes_what_runs(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys; from pathlib import Path; from tests.fakes.serving import FakeModel, bundle\n"
        "from serving.host.models import ModelHost; from serving.dialects.grpc.server import serve; import time\n"
        "model = FakeModel(); model.engine.function = lambda inputs: time.sleep(0.05) or {}\n"
        "async def main(): await serve(ModelHost([bundle(Path(sys.argv[1]), 'draw')], lambda *_: model), "
        "'127.0.0.1:0', "
        "lambda line: print(line, flush=True))\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        assert process.stdout.readline() == "draw is ready on fake (none)\n"
        with Client(address) as client:
            responses = client.generate(request(steps=10))
            assert next(responses).HasField("queued")
            os.kill(process.pid, signal.SIGTERM)
            assert kinds(list(responses))[-1] == "done"
        assert process.wait(20) == 0


def test_a_stopped_server_leaves_no_task(warm: FakeServer) -> None:
    """Also none that would return the memory of a large message a second later."""
    with pytest.raises(InvalidInput, match="prompt"):
        list(warm.client.generate(request(prompt="x" * (2 << 20))))
    warm.stop(0)

    async def left() -> set[str]:
        return {str(task.get_coro()) for task in asyncio.all_tasks() if task is not asyncio.current_task()}

    assert not [task for task in warm.do(left()) if "return_memory" in task]
