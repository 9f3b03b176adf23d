"""Replicas on a Ray cluster of several nodes on this machine: the answers, errors, cancelling, where requests go,
scaling, and a node that is killed while it works. Everything through the command, and Ray's own gRPC server.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime.errors import DeadlineExceeded, EnginecastError, InvalidInput, NotFound, PermissionDenied
from runtime.vision.images import decode_image
from serving.dialects.grpc.client import Client
from serving.enginecast_pb import chat_pb2, common_pb2, image_pb2, model_pb2

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
ray = pytest.importorskip("ray")

REPLICAS: Final = 2
SHARE: Final = 0.25
"""Cores of a replica: a node of one core has room for four."""


@dataclass
class Served:
    """A cluster with nodes, and `enginecast serve` on it."""

    cluster: Any
    nodes: list[Any]
    address: str

    def client(self) -> Client:
        return Client(self.address)

    def model(self, name: str) -> model_pb2.Model:
        with self.client() as client:
            return client.model(name, timeout=10)

    def replicas(self, name: str) -> int:
        """Replicas of a model that report."""
        note = next((note for note in self.model(name).notes if "on the cluster" in note), "It has 0")
        return int(note.split()[2])


def until(condition: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def served(diffusion_bundle: Path, vlm_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from ray.cluster_utils import Cluster

    repository = tmp_path_factory.mktemp("repository")
    shutil.copytree(vlm_bundle, repository / "extra" / "1")

    environment = {
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        nodes = [cluster.add_node(num_cpus=1) for _ in range(REPLICAS)]
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        command = [
            *(
                sys.executable,
                "-m",
                "serving.cli.commands",
                "serve",
                "--engine",
                "ray",
                "--ray-address",
                cluster.address,
            ),
            *("--address", f"127.0.0.1:{port}", f"draw={diffusion_bundle}", f"talk={vlm_bundle}"),
            *("--repository", str(repository), "--models-memory", "4GiB", "--keep-alive", "60"),
            *("--target", "onnxruntime", "--threads", "1", "--replica-cpus", str(SHARE), "--scale-down", "4"),
            *("--min-replicas", str(REPLICAS), "--max-replicas", "3"),
        ]
        output: list[str] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            reader = threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True)
            reader.start()
            try:
                until(lambda: len([line for line in output if " is ready" in line]) == 3, 180)
                yield Served(cluster, nodes, f"127.0.0.1:{port}")
            finally:
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
                reader.join(10)
                print("".join(output[-300:]))
                cluster.shutdown()


def drawing(**fields: Any) -> image_pb2.GenerateRequest:
    return image_pb2.GenerateRequest(**{"model": "draw", "prompt": "a red circle", "steps": 4, "seed": 1, **fields})


def question(*texts: str, **fields: Any) -> chat_pb2.ChatRequest:
    """A conversation: the texts of the user and of the model in turn."""
    roles = [chat_pb2.ROLE_USER, chat_pb2.ROLE_ASSISTANT]
    turns = [chat_pb2.Message(role=roles[i % 2], parts=[chat_pb2.Part(text=text)]) for i, text in enumerate(texts)]
    return chat_pb2.ChatRequest(**{"model": "talk", "messages": turns, "temperature": 0, "max_tokens": 8, **fields})


def text(responses: list[chat_pb2.ChatResponse]) -> str:
    return "".join(one.delta.text for one in responses)


def test_answers_equal_those_of_the_python_api(served: Served, diffusion_bundle: Path, vlm_bundle: Path) -> None:
    import enginecast

    with served.client() as client:
        drawn = [one.image.png for one in client.generate(drawing(), timeout=60) if one.HasField("image")]
        said = text(list(client.chat(question("What is a circle?"), timeout=60)))
    with enginecast.load(diffusion_bundle, target="onnxruntime", threads=1) as model:
        picture = model.generate("a red circle", steps=4, seed=1).image
    with enginecast.load(vlm_bundle, target="onnxruntime", threads=1) as model:
        answer = model.chat("What is a circle?", temperature=0, max_tokens=8).text
    assert said == answer
    assert len(drawn) == 1
    np.testing.assert_array_equal(decode_image(drawn[0]), picture)


def test_errors_are_those_of_a_server_of_one_process(served: Served) -> None:
    with served.client() as client:
        with pytest.raises(InvalidInput, match=r"^steps: is 5000, expected 1 to 1000$") as wrong:
            list(client.generate(drawing(steps=5000), timeout=20))
        assert wrong.value.field == "steps"
        with pytest.raises(NotFound, match="model 'drow' is not served here: did you mean 'draw'"):
            list(client.generate(drawing(model="drow"), timeout=20))
        with pytest.raises(InvalidInput, match="talk has the task chat, expected a model with the task image"):
            list(client.generate(drawing(model="talk"), timeout=20))
        for name, terms in (
            ("collect", common_pb2.Terms(collect="x")),
            ("on_disconnect", common_pb2.Terms(on_disconnect=common_pb2.ON_DISCONNECT_FINISH)),
        ):
            with pytest.raises(InvalidInput, match=rf"^terms.{name}: is"):
                list(client.generate(drawing(terms=terms), timeout=20))
        with pytest.raises(DeadlineExceeded):
            list(client.generate(drawing(steps=1000), timeout=1))
        with pytest.raises(EnginecastError, match="UNIMPLEMENTED"):
            client.unload("draw", timeout=10)


def test_a_server_of_loopback_refuses_calls_from_elsewhere(served: Served) -> None:
    """Ray's server listens on every address."""
    elsewhere = ray.util.get_node_ip_address()
    with Client(f"{elsewhere}:{served.address.rpartition(':')[2]}") as client, pytest.raises(PermissionDenied):
        client.models(timeout=10)


def test_a_request_that_is_cancelled_stops(served: Served) -> None:
    with served.client() as client:
        stream = client.generate(drawing(steps=1000), timeout=100)
        while not next(stream).HasField("progress"):
            pass
        stream.close()
    until(lambda: served.model("draw").running == 0, 4)
    runs = served.model("draw").counts["runs"]
    time.sleep(2.5)  # two reports
    assert served.model("draw").counts["runs"] == runs


def test_a_conversation_goes_on_where_it_began(served: Served) -> None:
    reused = []
    for number in range(10):
        first = f"Here is number {number}. What do you know about circles, squares and triangles of any colour?"
        with served.client() as client:
            said = text(list(client.chat(question(first), timeout=60)))
        with served.client() as client:  # a new connection
            again = list(client.chat(question(first, said, "And which of them is red?"), timeout=60))
        reused.append(again[-1].done.reused_tokens)
    assert min(reused) >= 16, reused


def test_models_of_the_repository_are_loaded_for_requests(served: Served) -> None:
    with served.client() as client:
        until(lambda: "extra@1" in [model.name for model in client.models()], 10)
        assert client.model("extra").loads_on_demand
        said = {text(list(client.chat(question("What is a circle?", model=name), timeout=60)))
                for name in ("extra", "extra@1", "talk")}  # fmt: skip
        assert len(said) == 1
        until(lambda: client.model("extra").state == model_pb2.MODEL_STATE_READY, 5)
        with pytest.raises(NotFound, match="model 'extra@2' is not served here"):
            list(client.chat(question("What is a circle?", model="extra@2"), timeout=60))


def test_health(served: Served) -> None:
    with grpc.insecure_channel(served.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "draw", "talk", "enginecast.v1.ChatService"):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == 1


class Load:
    """Clients that send pictures, one after another, until the block ends."""

    def __init__(self, served: Served, clients: int, steps: int) -> None:
        self._served, self._steps = served, steps
        self._stop = threading.Event()
        self.done, self.errors = 0, list[EnginecastError]()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def _run(self) -> None:
        with self._served.client() as client:
            while not self._stop.is_set():
                try:
                    responses = list(client.generate(drawing(steps=self._steps), timeout=120))
                    self.done += sum(one.HasField("image") for one in responses)
                except EnginecastError as error:
                    self.errors.append(error)


def test_replicas_follow_the_load(served: Served) -> None:
    until(lambda: served.replicas("draw") == 2, 30)
    with Load(served, 6, 200) as load:
        until(lambda: served.replicas("draw") == 3, 90)
    assert not load.errors
    until(lambda: served.replicas("draw") == 2, 90)


def test_no_request_is_lost_with_a_node(served: Served) -> None:
    with Load(served, 4, 30) as load:
        until(lambda: load.done >= 8, 60)
        served.cluster.remove_node(served.nodes.pop(), allow_graceful=False)
        began = load.done
        until(lambda: load.done >= began + 12, 90)
        served.nodes.append(served.cluster.add_node(num_cpus=1))
        until(lambda: served.replicas("draw") >= 2, 90)
    assert not load.errors
    with served.client() as client:
        assert list(client.chat(question("What is a circle?"), timeout=60))[-1].HasField("done")
