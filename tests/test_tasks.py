"""A task is a file in each of the rooms for tasks. A third one, and a pipeline, are added here from tests/toy/ alone.

No other source knows a task or a pipeline by its name.
"""

from __future__ import annotations

import asyncio
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from google.protobuf.message_factory import GetMessageClass

import calibration.requests.task
import export.task
import profiles.probes
import profiles.task
import runtime.pipeline
import runtime.task
import serving.cli.task
import serving.dialects.grpc.task
from calibration.capture.data import record
from calibration.capture.sets import CalibrationSet
from calibration.requests.requests import built_in
from runtime.bundle.manifest import MANIFEST, Artifact, Bundle, Manifest, Source, Submodel, sha256
from runtime.bundle.precision import Precision
from runtime.bundle.signature import Dim, Signature, Tensor
from runtime.placing.loading import load_model
from serving.dialects.grpc import health
from serving.dialects.grpc.connection import OPTIONS
from serving.dialects.grpc.server import Server
from serving.dialects.grpc.status import error_of
from serving.host.models import ModelHost

ROOT = Path(__file__).parent.parent
TOY = Path(__file__).parent / "toy"
ROOMS = (
    *("runtime.tasks", "runtime.pipelines", "serving.dialects.grpc.tasks", "profiles.tasks"),
    *("calibration.requests.tasks", "export.tasks", "serving.cli.tasks"),
)
LISTED = (
    runtime.task.tasks,
    runtime.pipeline.pipelines,
    serving.dialects.grpc.task.grpc_tasks,
    profiles.task.profile_tasks,
    calibration.requests.task.task_requests,
    export.task.comparisons,
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files of tests/toy/ lie in the rooms as well."""
    before = set(sys.modules)
    for room in ROOMS:
        package = importlib.import_module(room)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(TOY / room.replace(".", "/"))])
    for listed in LISTED:
        listed.cache_clear()
    yield
    for listed in LISTED:
        listed.cache_clear()
    added = {module.__name__ for module in toys()}
    for name in added - before:
        del sys.modules[name]


def toys() -> list[Any]:
    """The modules of the toy that were imported."""
    return [module for module in list(sys.modules.values()) if str(TOY) in (getattr(module, "__file__", None) or "")]


@pytest.fixture
def bundle(toy: None, tmp_path: Path) -> Bundle:
    """A bundle of the toy task: its submodel doubles numbers."""
    numbers = (Dim(name="numbers", min=1, opt=4, max=64),)
    root, graph = tmp_path / "toy", "onnx/doubler/model.onnx"
    (root / graph).parent.mkdir(parents=True)
    value = onnx.helper.make_tensor_value_info
    onnx.save(
        onnx.helper.make_model(
            onnx.helper.make_graph(
                [onnx.helper.make_node("Add", ["x", "x"], ["y"])],
                "doubler",
                [value("x", onnx.TensorProto.FLOAT, ["numbers"])],
                [value("y", onnx.TensorProto.FLOAT, ["numbers"])],
            ),
            opset_imports=[onnx.helper.make_opsetid("", 21)],
            ir_version=10,
        ),
        root / graph,
    )
    signature = Signature(
        inputs=(Tensor(name="x", dtype="float32", dims=numbers),),
        outputs=(Tensor(name="y", dtype="float32", dims=numbers),),
    )
    manifest = Manifest(
        name="toy",
        key="",
        pipeline="doubling",
        task="scale",
        quant="none",
        source=Source(name="toy", family="toy", architecture="Toy", fingerprint=""),
        submodels=(
            Submodel(name="doubler", signature=signature, graph=graph, precision=Precision.parse("float32"), nbytes=0),
        ),
        artifacts=(Artifact(target="onnxruntime", submodel="doubler"),),
        config={"times": 3},
        versions={},
        files={graph: sha256(root / graph)},
    )
    (root / MANIFEST).write_text(manifest.model_dump_json())
    return Bundle(root)


def test_a_task_from_this_folder_alone_is_served_and_called(bundle: Bundle) -> None:
    service = serving.dialects.grpc.task.grpc_tasks()["scale"].service
    takes, gives = (GetMessageClass(service.file.message_types_by_name[f"Scale{name}"]) for name in
                    ("Message", "Response"))  # fmt: skip

    async def call(channel: grpc.aio.Channel, *numbers: float) -> list[list[float]]:
        method = channel.unary_stream(f"/{service.full_name}/Scale", takes.SerializeToString, gives.FromString)
        return [list(response.numbers) async for response in method(takes(model="toy", numbers=numbers))]

    async def work() -> tuple[list[list[float]], dict[str, bool], grpc.RpcError]:
        host = ModelHost([bundle], lambda opened, target: load_model(opened, target))
        server = Server(host, "127.0.0.1:0")
        await server.start()
        await host.load("toy")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=[*OPTIONS.items()]) as channel:
            answered, serves = await call(channel, 1, 2.5), health.health_of(host)
            with pytest.raises(grpc.RpcError) as refused:
                await call(channel)
        await server.stop(0)
        return answered, serves, refused.value

    answered, serves, refused = asyncio.run(work())
    assert answered == [[8.0, 20.0]]
    assert serves["toy.ScaleService"] and not serves["enginecast.v1.ImageService"]
    assert "is empty, expected one number or more" in str(error_of(refused))


def test_a_task_from_this_folder_alone_is_measured(bundle: Bundle) -> None:
    model = load_model(bundle)
    found = {probe.metric: probe.run() for probe in profiles.probes.probes(model, {})}
    model.close()
    assert set(found) == {"doubler", "scaled"} and all(np.isfinite(list(found.values())))


PROGRAM = f"""
import importlib, sys
for room in {ROOMS!r}:
    package = importlib.import_module(room)
    package.__path__ = [*package.__path__, {str(TOY)!r} + "/" + room.replace(".", "/")]
from serving.cli.commands import main
main()
"""


def test_a_task_from_this_folder_alone_has_its_command(bundle: Bundle) -> None:
    def ran(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=120)

    answered = ran("scale", "1", "2.5", "--bundle", str(bundle.root))
    assert answered.stdout == "8.0 20.0\n", answered.stderr
    assert "Scale numbers." in ran("--help").stdout
    refused = ran("generate", "--prompt", "a", "--out", "a.png", "--bundle", str(bundle.root))
    assert "has the task scale, expected image: use `scale`" in refused.stderr


def test_a_task_from_this_folder_alone_is_calibrated(bundle: Bundle, tmp_path: Path) -> None:
    model = load_model(bundle)
    found = record(model, built_in("scale"), count=8)
    model.close()
    found.save(tmp_path / "set")
    loaded = CalibrationSet.load(tmp_path / "set")
    assert (loaded.kind, loaded.settings["requests"], loaded.warnings()) == ("doubling", 8, [])
    assert {call["x"].shape for call in loaded.samples["doubler"]} == {(16,)} and len(loaded.samples["doubler"]) >= 8


def test_commands_are_named_by_the_verbs_of_their_tasks() -> None:
    verbs = [task.verb for _, task in sorted(runtime.task.tasks().items())]
    assert {command.__name__ for command in serving.cli.task.task_commands()} == {*verbs, "caption", "grid"}


def test_the_toy_leaves_no_trace() -> None:
    assert set(runtime.task.tasks()) == {"image", "chat", "embed"} and not toys()


NAMES = re.compile(
    r"\"(diffusion|chat|embed)\"|(task|kind|pipeline)\w*\b.*\"image\"|(from|import) runtime\.pipelines\."
)
"""The names of tasks and pipelines, and what imports a pipeline. "image" is also a field of messages."""
KNOWING = (
    r"runtime/(tasks|pipelines)/\w+\.py",
    r"(profiles|serving/(cli|dialects/grpc)|calibration/requests)/tasks/\w+\.py",
    r"serving/enginecast_pb/.*",
)


def test_no_other_source_knows_a_task_or_a_pipeline_by_name() -> None:
    sources = [
        path for layer in ("calibration", "runtime", "serving", "profiles") for path in (ROOT / layer).rglob("*.py")
    ]
    knowing = [str(path.relative_to(ROOT)) for path in sources if NAMES.search(path.read_text())]
    assert [path for path in knowing if not any(re.fullmatch(known, path) for known in KNOWING)] == []
