"""The Open Inference Protocol with the unmodified tritonclient, over fake and real engines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient import grpc as triton
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

from runtime.bundle.manifest import Bundle
from runtime.bundle.signature import BATCH, Array, Dim, Signature, State, Tensor
from runtime.errors import EngineError
from runtime.placing.loading import load_model
from serving.dialects.grpc.connection import Connection
from serving.dialects.grpc.server import Server
from serving.enginecast_pb import inference_pb2
from serving.host.models import ModelHost
from serving.host.offers import Offer
from serving.host.served import Served
from serving.security import tokens
from serving.security.gate import Gate
from serving.security.protection import Security
from serving.security.scopes import Scope
from tests.fakes.certificates import Authority
from tests.fakes.serving import FakeServer, bundle, request, until

WIDTH = Dim(name="width", min=1, opt=4, max=8, multiple=2)
HEIGHT = Dim(name="height", min=1, opt=4, max=8)
SIGNATURE = Signature(
    inputs=(
        Tensor(name="x", dtype="float32", dims=(BATCH, HEIGHT, WIDTH)),
        Tensor(name="ids", dtype="int64", dims=(BATCH,), values="below", limit=10),
        Tensor(name="keep", dtype="bool", dims=(2,)),
        Tensor(name="half", dtype="float16", dims=(3,)),
    ),
    outputs=(
        Tensor(name="double", dtype="float32", dims=(BATCH, HEIGHT, WIDTH)),
        Tensor(name="ids", dtype="int64", dims=(BATCH,)),
        Tensor(name="half", dtype="float16", dims=(3,)),
        Tensor(name="kept", dtype="bool", dims=(2,)),
    ),
)
CALL: Mapping[str, Array] = {
    "x": np.arange(8, dtype=np.float32).reshape(1, 2, 4),
    "ids": np.array([3]),
    "keep": np.array([True, False]),
    "half": np.array([0.5, 1, 2], np.float16),
}
TYPES = {"float32": "FP32", "int64": "INT64", "bool": "BOOL", "float16": "FP16"}


def compute(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"double": inputs["x"] * 2, "ids": inputs["ids"], "half": inputs["half"], "kept": inputs["keep"]}  # type: ignore[operator]


def inputs_of(arrays: Mapping[str, Array], **changed: Any) -> list[triton.InferInput]:
    found = []
    for name, array in (arrays | changed).items():
        tensor = triton.InferInput(name, list(array.shape), TYPES[array.dtype.name])
        tensor.set_data_from_numpy(array)
        found.append(tensor)
    return found


@pytest.fixture
def served(warm: FakeServer) -> FakeServer:
    """The model "draw" with one submodel of the signature above."""
    warm.draw.engine.submodel = warm.draw.engine.submodel.model_copy(update={"signature": SIGNATURE})
    warm.draw.engine.function = compute
    return warm


@pytest.fixture
def client(served: FakeServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.address) as client:
        yield client


def raw(server: FakeServer, method: str, request: Any, response: Any) -> Any:
    """A call with any message: tritonclient refuses to send much of what others may."""
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(
            f"/inference.GRPCInferenceService/{method}", type(request).SerializeToString, response.FromString
        )
        return call(request, timeout=10)


def infer(server: FakeServer, **fields: Any) -> Any:
    request = inference_pb2.ModelInferRequest(**{"model_name": "draw/denoiser", **fields})
    return raw(server, "ModelInfer", request, inference_pb2.ModelInferResponse)


def tensor(
    name: str, datatype: str, shape: list[int], **contents: Any
) -> inference_pb2.ModelInferRequest.InferInputTensor:
    typed = inference_pb2.InferTensorContents(**contents) if contents else None
    return inference_pb2.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape, contents=typed)


class TestServer:
    def test_live_and_ready(self, client: triton.InferenceServerClient, served: FakeServer) -> None:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("draw") and client.is_model_ready("draw/denoiser", "1")
        assert not client.is_model_ready("draw/unet") and not client.is_model_ready("drow")
        assert not client.is_model_ready("draw", "2")
        served.client.unload("draw")
        assert not client.is_model_ready("draw/denoiser") and client.is_server_ready()
        served.client.unload("talk")
        assert client.is_server_live() and not client.is_server_ready()

    def test_metadata(self, client: triton.InferenceServerClient) -> None:
        server = client.get_server_metadata(as_json=True)
        assert (server["name"], server["extensions"]) == ("enginecast", ["model_repository"])
        found = client.get_model_metadata("draw/denoiser")
        assert (found.name, list(found.versions), found.platform) == ("draw/denoiser", ["1"], "fake")
        assert [(one.name, one.datatype, list(one.shape)) for one in found.inputs] == [
            ("x", "FP32", [-1, -1, -1]),
            ("ids", "INT64", [-1]),
            ("keep", "BOOL", [2]),
            ("half", "FP16", [3]),
        ]
        assert [one.name for one in found.outputs] == ["double", "ids", "half", "kept"]

    @pytest.mark.parametrize(
        ("name", "status", "text"),
        [
            ("draw", "INVALID_ARGUMENT", "draw/denoiser"),
            ("drow/denoiser", "NOT_FOUND", "did you mean 'draw'"),
            ("draw/denoise", "NOT_FOUND", "did you mean 'denoiser'"),
            ("x" * 300, "INVALID_ARGUMENT", "300 characters"),
        ],
    )
    def test_wrong_names(self, client: triton.InferenceServerClient, name: str, status: str, text: str) -> None:
        with pytest.raises(InferenceServerException, match=text) as caught:
            client.get_model_metadata(name)
        assert caught.value.status() == f"StatusCode.{status}"

    def test_a_version_that_does_not_exist(self, client: triton.InferenceServerClient) -> None:
        with pytest.raises(InferenceServerException, match="version '3' of draw does not exist"):
            client.get_model_metadata("draw/denoiser", "3")

    def test_versions(self, client: triton.InferenceServerClient, served: FakeServer, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        opened = bundle(tmp_path / "other", "draw")

        async def add() -> None:
            for version in ("1", "2"):
                offer = Offer(f"paint@{version}", opened.root, opened, version=version)
                served.host.catalog.add(Served(offer, served.host.limits))
                await served.host.load(offer.name)

        served.do(add())
        assert [(one.name, one.version) for one in client.get_model_repository_index().models][2:6] == [
            ("paint", "1"),
            ("paint/denoiser", "1"),
            ("paint", "2"),
            ("paint/denoiser", "2"),
        ]
        assert list(client.get_model_metadata("paint/denoiser", "1").versions) == ["1", "2"]
        for version, name in (("1", "paint/denoiser"), ("2", "paint/denoiser"), ("2", "paint@2/denoiser")):
            assert client.infer(name, inputs_of(CALL), version).get_response().model_version == version
        with pytest.raises(InferenceServerException, match=r"version '3' of paint does not exist: .*known: 1, 2"):
            client.infer("paint@1/denoiser", inputs_of(CALL), "3")
        with pytest.raises(InferenceServerException, match="model_version: is 2, and the name has 1"):
            client.infer("paint@1/denoiser", inputs_of(CALL), "2")
        client.unload_model("paint@1")
        assert not client.is_model_ready("paint", "1") and client.is_model_ready("paint", "2")

    def test_reflection_lists_the_service(self, served: FakeServer) -> None:
        asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService")
        with grpc.insecure_channel(served.address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            (answer,) = stub.ServerReflectionInfo(iter([asked]))
        assert answer.file_descriptor_response.file_descriptor_proto


class TestRepository:
    def test_index_load_unload(self, client: triton.InferenceServerClient, served: FakeServer) -> None:
        def index() -> list[tuple[str, str]]:
            return [(one.name, one.state) for one in client.get_model_repository_index().models]

        ready = [("draw", "READY"), ("draw/denoiser", "READY"), ("talk", "READY"), ("talk/denoiser", "READY")]
        assert index() == ready
        client.unload_model("draw")
        assert index() == [("draw", "UNAVAILABLE"), *ready[2:]]
        with pytest.raises(InferenceServerException, match="draw is unloaded"):
            client.infer("draw/denoiser", inputs_of(CALL))
        client.load_model("draw")
        assert index() == ready

    def test_only_ready_ones(self, client: triton.InferenceServerClient, served: FakeServer) -> None:
        client.unload_model("talk", unload_dependents=True)
        request = inference_pb2.RepositoryIndexRequest(ready=True)
        found = raw(served, "RepositoryIndex", request, inference_pb2.RepositoryIndexResponse)
        assert [one.name for one in found.models] == ["draw", "draw/denoiser"]

    def test_nothing_from_a_client_is_loaded(self, client: triton.InferenceServerClient) -> None:
        with pytest.raises(InferenceServerException, match="'config', which is not offered"):
            client.load_model("draw", config="{}")
        with pytest.raises(InferenceServerException, match="is a submodel, expected draw"):
            client.load_model("draw/denoiser")
        with pytest.raises(InferenceServerException, match="is not served here"):
            client.unload_model("../draw")


class TestInfer:
    def test_all_outputs_equal_the_engine(self, client: triton.InferenceServerClient, served: FakeServer) -> None:
        result = client.infer("draw/denoiser", inputs_of(CALL), request_id="mine")
        for name, expected in compute(CALL).items():
            found = result.as_numpy(name)
            assert found.dtype == expected.dtype and np.array_equal(found, expected)
        response = result.get_response()
        assert (response.id, response.model_name, response.model_version) == ("mine", "draw/denoiser", "1")
        assert response.parameters["target"].string_param == "fake"
        assert {name: array.dtype for name, array in served.draw.engine.calls[-1].items()} == {
            name: array.dtype for name, array in CALL.items()
        }

    def test_requested_outputs_in_their_order(self, client: triton.InferenceServerClient) -> None:
        outputs = [triton.InferRequestedOutput("half"), triton.InferRequestedOutput("double")]
        response = client.infer("draw/denoiser", inputs_of(CALL), outputs=outputs).get_response()
        assert [one.name for one in response.outputs] == ["half", "double"]

    def test_typed_contents(self, served: FakeServer) -> None:
        half = CALL["half"].tobytes()
        typed = [
            tensor("x", "FP32", [1, 2, 4], fp32_contents=range(8)),
            tensor("ids", "INT64", [1], int64_contents=[3]),
            tensor("keep", "BOOL", [2], bool_contents=[True, False]),
        ]
        with pytest.raises(grpc.RpcError, match="no field for FP16"):
            infer(served, inputs=[*typed, tensor("half", "FP16", [3])])
        with pytest.raises(grpc.RpcError, match="is set beside raw_input_contents"):
            infer(served, inputs=typed, raw_input_contents=[half] * 3)
        with pytest.raises(grpc.RpcError, match="half: is missing"):
            infer(served, inputs=typed)
        signature = SIGNATURE.model_copy(update={"inputs": SIGNATURE.inputs[:3], "outputs": SIGNATURE.outputs[:2]})
        served.draw.engine.submodel = served.draw.engine.submodel.model_copy(update={"signature": signature})
        served.draw.engine.function = lambda inputs: compute({**inputs, "half": CALL["half"]})
        double, ids = infer(served, inputs=typed).raw_output_contents
        assert np.frombuffer(double, np.float32).tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
        assert np.frombuffer(ids, np.int64).tolist() == [3]
        assert np.array_equal(served.draw.engine.calls[-1]["keep"], CALL["keep"])

    @pytest.mark.parametrize(
        ("wrong", "text"),
        [
            (tensor("x", "FP32", [1, 2, 4]), "has 0 elements, expected 8"),
            (tensor("x", "FP32", [1, 2, 4], fp32_contents=range(7)), "has 7 elements, expected 8"),
            (tensor("x", "FP32", [1, 2, 4], int64_contents=range(8)), "int64_contents, expected fp32_contents"),
            (tensor("x", "FP32", [-1, 2, 4], fp32_contents=range(8)), "is -1"),
            (tensor("x", "FP32", [2**62, 2**62, 4]), "expected 0 to"),
            (tensor("x", "FP32", [1 << 20] * 8), "elements, counting empty dims as 1"),
            (tensor("x", "FP32", [0, 1 << 20, 1 << 20]), "elements, counting empty dims as 1"),
            (tensor("x", "FP32", [1] * 9), "has 9 dims, expected at most 8"),
            (tensor("x", "FP64", [1]), "'FP64' is none"),
            (tensor("x", "BF16", [1]), "'BF16' is none"),
            (tensor("x", "BYTES", [1]), "'BYTES' is none"),
            (tensor("x", "INT64", [1, 2, 4], int64_contents=range(8)), "has dtype int64, expected float32"),
            (tensor("x", "FP32", [8], fp32_contents=range(8)), "has 1 dims, expected 3"),
            (tensor("x", "FP32", [1, 8, 1], fp32_contents=range(8)), "width is 1, expected 1 to 8, a multiple of 2"),
            (tensor("y", "FP32", [1], fp32_contents=[1]), "is not an input"),
        ],
    )
    def test_lying_tensors(self, served: FakeServer, wrong: Any, text: str) -> None:
        with pytest.raises(grpc.RpcError, match=text) as caught:
            infer(served, inputs=[wrong])
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and not served.draw.calls

    @pytest.mark.parametrize(
        ("changed", "text"),
        [
            ({"raw_input_contents": [b""]}, "has 1 tensors, expected one of each"),
            ({"raw_input_contents": [b"\0" * 31]}, "has 31 bytes, expected 32"),
            ({"inputs": [tensor("x", "FP32", [1])] * 65}, "has 65 inputs, outputs or parameters"),
            ({"inputs": [tensor("x", "FP32", [0])] * 2}, "'x' for the second time"),
            ({"outputs": [{"name": "double"}] * 2}, "'double' for the second time"),
            ({"id": "x" * 201}, "has 201 characters"),
            ({"parameters": {"priority": {"uint64_param": 1}}}, "'priority', which is not offered"),
            ({"parameters": {"timeout": {"int64_param": 0}}}, "is 0, expected microseconds"),
        ],
    )
    def test_wrong_requests(self, served: FakeServer, changed: dict[str, Any], text: str) -> None:
        if text.startswith("has 31"):
            changed = {"inputs": [tensor("x", "FP32", [1, 2, 4])], **changed}
        with pytest.raises(grpc.RpcError, match=text):
            infer(served, **changed)

    @pytest.mark.parametrize(
        ("name", "array", "text"),
        [
            ("ids", np.array([10]), "has values from 10 to 10, expected 0 to 9"),
            ("ids", np.array([-1]), "has values from -1"),
            ("ids", np.array([1, 2]), "batch is 2 here and 1 elsewhere"),
        ],
    )
    def test_wrong_values(self, client: triton.InferenceServerClient, name: str, array: Array, text: str) -> None:
        with pytest.raises(InferenceServerException, match=text):
            client.infer("draw/denoiser", inputs_of(CALL, **{name: array}))

    def test_more_than_a_request_of_the_task_needs(self, client: triton.InferenceServerClient) -> None:
        x = np.zeros((3, 8, 8), np.float32)
        with pytest.raises(InferenceServerException, match="batch x height x width is 192, expected at most 128"):
            client.infer("draw/denoiser", inputs_of(CALL, x=x, ids=np.array([1, 2, 3])))

    def test_bytes_that_are_no_truth_values(self, served: FakeServer) -> None:
        with pytest.raises(grpc.RpcError, match="no BOOL"):
            infer(served, inputs=[tensor("keep", "BOOL", [2])], raw_input_contents=[b"\2\0"])

    def test_unknown_outputs(self, client: triton.InferenceServerClient) -> None:
        with pytest.raises(InferenceServerException, match="did you mean 'double'"):
            client.infer("draw/denoiser", inputs_of(CALL), outputs=[triton.InferRequestedOutput("doubles")])

    def test_shared_memory_and_classification_are_refused(self, client: triton.InferenceServerClient) -> None:
        shared = triton.InferInput("x", [1, 2, 4], "FP32")
        shared.set_shared_memory("region", 32)
        with pytest.raises(InferenceServerException, match="shared_memory_"):
            client.infer("draw/denoiser", [shared])
        with pytest.raises(InferenceServerException, match="'classification'"):
            client.infer("draw/denoiser", inputs_of(CALL), outputs=[triton.InferRequestedOutput("double", 2)])

    def test_a_decoder_is_refused(self, client: triton.InferenceServerClient, served: FakeServer) -> None:
        past = Tensor(name="past", dtype="float32", dims=(BATCH, WIDTH))
        states = Signature.model_construct(inputs=(), outputs=(), states=(State(past=past, present=past, axis=1),))
        served.draw.engine.submodel = served.draw.engine.submodel.model_copy(update={"signature": states})
        with pytest.raises(InferenceServerException, match="is a decoder"):
            client.infer("draw/denoiser", [])
        assert "draw/denoiser" not in [one.name for one in client.get_model_repository_index().models]

    def test_a_timeout_is_told_as_it_was_given_also_where_loading_took_a_part_of_it(
        self, client: triton.InferenceServerClient, served: FakeServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        served.draw.engine.function = served.draw._step
        served.draw.hold()
        drawing = served.client.generate(request(steps=1))
        until(lambda: served.busy() == 1)
        loaded = served.host.lifecycle.use

        async def slowly(model: Any, task: str) -> None:
            await asyncio.sleep(0.1)
            await loaded(model, task)

        monkeypatch.setattr(served.host.lifecycle, "use", slowly)
        with pytest.raises(InferenceServerException, match=r"was not done after 0\.4 s"):
            client.infer("draw/denoiser", inputs_of(CALL), timeout=400_000)
        served.draw.release()
        list(drawing)

    def test_it_waits_in_the_queue_and_ends_with_its_timeout(
        self, client: triton.InferenceServerClient, served: FakeServer
    ) -> None:
        served.draw.engine.function = served.draw._step
        served.draw.hold()
        drawing = served.client.generate(request(steps=1))
        until(lambda: served.busy() == 1)
        with pytest.raises(InferenceServerException, match=r"was not done after 0\.05 s") as caught:
            client.infer("draw/denoiser", inputs_of(CALL), timeout=50_000)
        assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        served.draw.release()
        list(drawing)

    def test_an_engine_that_fails(self, client: triton.InferenceServerClient, served: FakeServer) -> None:
        def fail(inputs: Mapping[str, Array]) -> dict[str, Array]:
            raise EngineError("the device is lost")

        served.draw.engine.function = fail
        with pytest.raises(InferenceServerException, match="the device is lost") as caught:
            client.infer("draw/denoiser", inputs_of(CALL))
        assert caught.value.status() == "StatusCode.INTERNAL"


def test_tls_and_a_token(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    file = tmp_path / "tokens.toml"
    headers = {"authorization": f"Bearer {tokens.new(file, 'alice', frozenset({Scope.INFER}), None, None)}"}
    security = Security(authority.issue("server"), gate=Gate(file))
    trust = Connection(ca=authority.path, token=tokens.new(file, "root", frozenset(Scope), None, None))
    (tmp_path / "bundles").mkdir()
    with (
        FakeServer(tmp_path / "bundles", ready=True, security=security, connection=trust) as server,
        triton.InferenceServerClient(
            server.address.replace("127.0.0.1", "localhost"), ssl=True, root_certificates=str(authority.path)
        ) as client,
    ):
        assert client.is_server_ready() and client.is_model_ready("draw")
        assert client.infer("draw/denoiser", [], headers=headers).get_response().model_name == "draw/denoiser"
        assert len(client.get_model_repository_index(headers=headers).models) == 4
        for call, status in (
            (lambda: client.infer("draw/denoiser", []), "UNAUTHENTICATED"),
            (lambda: client.unload_model("draw", headers=headers), "PERMISSION_DENIED"),
        ):
            with pytest.raises(InferenceServerException) as caught:
                call()
            assert caught.value.status() == f"StatusCode.{status}"


@pytest.mark.parametrize("target", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.full)])
async def test_submodels_of_a_sample_equal_their_engines(diffusion_bundle: Path, target: str) -> None:
    bundle = Bundle(diffusion_bundle)
    host = ModelHost([bundle], load_model)
    server = Server(host, "127.0.0.1:0")
    await server.start()
    await host.load(bundle.name, target)
    rng = np.random.default_rng(0)
    try:
        async with aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            for name, engine in host.engines(bundle.name).items():
                signature = engine.submodel.signature
                lengths = signature.complete({dim.name: dim.opt for dim in signature.dims.values() if not dim.sum_of})
                call = signature.sample_call(lengths, rng)
                result = await client.infer(f"{bundle.name}/{name}", inputs_of(call))
                assert result.get_response().parameters["target"].string_param == target
                for output, expected in (await asyncio.to_thread(engine.run, call)).items():
                    np.testing.assert_allclose(result.as_numpy(output), expected, rtol=1e-4, atol=1e-5)
    finally:
        await server.stop(0)


async def test_a_decoder_of_a_sample_is_refused(vlm_bundle: Path) -> None:
    bundle = Bundle(vlm_bundle)
    host = ModelHost([bundle], load_model)
    server = Server(host, "127.0.0.1:0")
    await server.start()
    await host.load(bundle.name, "onnxruntime")
    try:
        async with aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            with pytest.raises(InferenceServerException, match="is a decoder"):
                await client.infer(f"{bundle.name}/decoder", [])
            result = await client.infer(f"{bundle.name}/token_embedding", inputs_of({"input_ids": np.array([[1, 2]])}))
            assert result.as_numpy("inputs_embeds").shape[:2] == (1, 2)
    finally:
        await server.stop(0)
