"""ONNX Runtime's CUDA provider: every submodel of both samples lowered, checked and computed here; on a GPU where there
is one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from runtime.bundle.manifest import Bundle, Submodel
from runtime.engine import CompileOptions, Options, Slot, target
from runtime.errors import EngineUnavailable, InvalidInput
from runtime.targets.cuda import engine as provider
from runtime.targets.cuda.engine import CUDAEngine
from runtime.targets.nvidia import cuda
from runtime.targets.sessions.kernels import CUDA, outside
from tests.runtime.targets.conftest import COUNTS, FLOOR, Make, Reference, canonical, emulated, snr_db, tokens

__all__ = ["emulated"]


@pytest.fixture
def decoder(tiny_bundle: Path) -> tuple[Submodel, Path]:
    bundle = Bundle(tiny_bundle)
    return bundle.submodel("decoder"), bundle.root / bundle.submodel("decoder").graph


@pytest.mark.parametrize(("compute", "cache"), [("float32", "fixed"), ("float16", "grouped"), ("bfloat16", "grouped")])
def test_caches_by_what_the_kernel_takes(
    decoder: tuple[Submodel, Path], tmp_path: Path, compute: Any, cache: str
) -> None:
    submodel, graph = decoder
    CUDAEngine.compile_with(CompileOptions({"context": "32"}), submodel.computing(compute), graph, tmp_path)
    assert json.loads((tmp_path / "decoder.json").read_text())["cache"] == cache
    model = ir.load(tmp_path / "decoder.onnx")
    operators = [node.op_type for node in model.graph]
    assert ("GroupQueryAttention" in operators) == (cache == "grouped") and "Attention" not in operators
    assert not list(outside(model, CUDA))


def test_what_the_provider_lacks_in_bfloat16_stays_float32(decoder: tuple[Submodel, Path], tmp_path: Path) -> None:
    """Reciprocal and ReduceMean have no kernel for it; products and attention have."""
    submodel = decoder[0].computing("bfloat16")
    CUDAEngine.compile_with(CompileOptions(), submodel, decoder[1], tmp_path)
    types: dict[str, set[str]] = {}
    for node in ir.load(tmp_path / "decoder.onnx").graph:
        types.setdefault(node.op_type, set()).add(str(getattr(node.outputs[0].dtype, "name", "")))
    assert types["MatMul"] == {"BFLOAT16"} and types["Reciprocal"] == {"FLOAT"} and types["ReduceMean"] == {"FLOAT"}
    with pytest.raises(EngineUnavailable, match="has no kernels for bfloat16 on the CPU"):
        CUDAEngine.emulate(submodel, tmp_path, Options())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_several_rows(decoder: tuple[Submodel, Path], emulated: Make, compute: Any, batch: int) -> None:
    submodel = decoder[0].computing(compute)
    engine, slot = emulated("cuda", submodel, decoder[1], {"context": "300"}), Slot()
    reference = Reference(*decoder, batch)
    for call in tokens(submodel, batch, (5, 1, 3, 250, 1)):
        assert snr_db(engine.run(call, slot)["logits"], reference.run(call)) > (90 if compute == "float32" else 35)


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"contexts": "4"}, "contexts"), ({"context": "x"}, "context"), ({"context": "9999999"}, "context")],
)
def test_wrong_settings_are_named(
    decoder: tuple[Submodel, Path], tmp_path: Path, settings: dict[str, str], field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        CUDAEngine.compile_with(CompileOptions(settings), *decoder, tmp_path)
    assert caught.value.field == field


# Availability: what is missing is said, from the package to the driver


def probe(
    monkeypatch: pytest.MonkeyPatch,
    providers: list[str],
    fails: str = "",
    devices: Any = ((), "there is no NVIDIA GPU"),
) -> Any:
    """What is available with an ONNX Runtime of these providers, whose library fails to load in this way."""

    def load(path: str) -> None:
        assert "onnxruntime_providers_cuda" in path
        if fails:
            raise OSError(fails)

    def preload() -> None:
        print("Failed to load libcublas.so.13")

    package: Any = ModuleType("onnxruntime")
    package.__version__, package.__file__, package.package_name = "9.9", "/sdk/onnxruntime/__init__.py", "onnxruntime"
    package.cuda_version, package.preload_dlls, package.get_available_providers = "13.0", preload, lambda: providers
    monkeypatch.setitem(sys.modules, "onnxruntime", package)
    monkeypatch.setattr(provider, "ctypes", SimpleNamespace(CDLL=load))
    monkeypatch.setattr(cuda, "devices", lambda extra: devices)
    provider._provider_reason.cache_clear()
    return CUDAEngine.available()


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = probe(monkeypatch, ["CPUExecutionProvider"])
    assert (
        not found.usable
        and found.compiles
        and "(onnxruntime) has no CUDAExecutionProvider: pip install 'enginecast[cuda]'" in found.reason
    )
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    found = probe(monkeypatch, both, "libcublasLt.so.13: cannot open shared object file")
    assert (
        "its CUDA libraries do not load (libcublasLt.so.13" in found.reason
        and "needs CUDA 13.0 and cuDNN 9" in found.reason
    )
    assert (
        probe(monkeypatch, both, "libcuda.so.1: cannot open").reason
        == "there is no NVIDIA driver (libcuda.so.1: cannot open)"
    )
    assert probe(monkeypatch, both).reason == "there is no NVIDIA GPU"
    device = SimpleNamespace(index=0, name="Fake 4090")
    found = probe(monkeypatch, both, devices=((device,), ""))
    assert found.usable and found.devices == ("cuda:0 (Fake 4090)",) and not found.reason
    assert capsys.readouterr().out == "", "what ONNX Runtime prints is no part of an answer"
    provider._provider_reason.cache_clear()


def test_loading_where_it_cannot_run(decoder: tuple[Submodel, Path], tmp_path: Path) -> None:
    if target("cuda").available().usable:
        pytest.skip("a GPU is here")
    with pytest.raises(EngineUnavailable, match="cuda cannot run here: "):
        CUDAEngine.load(decoder[0], tmp_path, Options())


def test_options_of_the_provider(
    decoder: tuple[Submodel, Path], vlm_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of the device, TensorFloat-32 and CUDA graphs reach it; decoders are not recorded."""
    opened: list[Any] = []

    class Stop(Exception):
        pass

    def stop(*args: Any, **named: Any) -> None:
        opened.append((args[3], named["fallback"]))
        raise Stop

    devices = tuple(SimpleNamespace(index=index, name="Fake") for index in range(2))
    monkeypatch.setattr(provider, "stored", stop)
    monkeypatch.setattr(cuda, "devices", lambda extra: (devices, ""))
    monkeypatch.setattr(
        CUDAEngine, "available", classmethod(lambda cls: provider.Availability(True, ("cuda:0", "cuda:1")))
    )
    embedding = Bundle(vlm_bundle).submodel("token_embedding")
    for submodel, replayed in ((embedding, "1"), (decoder[0], "0")):
        with pytest.raises(Stop):
            CUDAEngine.load(
                submodel, vlm_bundle, Options("cuda:1", settings={"graphs": "true", "tf32": "true", "fallback": "none"})
            )
        device, fallback = opened.pop()
        assert (
            device.options == {"device_id": "1", "use_tf32": "1", "enable_cuda_graph": replayed} and fallback == "none"
        )
    with pytest.raises(EngineUnavailable, match=r"has no device 'cuda:7' here: it found cuda:0, cuda:1"):
        CUDAEngine.load(embedding, vlm_bundle, Options("cuda:7"))


@pytest.mark.parametrize("graphs", ["false", "true"])
def test_on_a_gpu(vlm_bundle: Path, tmp_path: Path, graphs: str) -> None:
    found = target("cuda").available()
    if not found.usable:
        pytest.skip(f"cuda: {found.reason}")
    bundle = Bundle(vlm_bundle)
    for original in bundle.manifest.submodels:
        submodel = original.computing("float16")
        graph = bundle.root / submodel.graph
        (tmp_path / "onnx").mkdir(exist_ok=True)
        (tmp_path / "onnx" / submodel.name).symlink_to(graph.parent)
        CUDAEngine.compile_with(CompileOptions(), submodel, graph, tmp_path / "engines" / "cuda")
        engine = CUDAEngine.load(submodel, tmp_path, Options(settings={"graphs": graphs}))
        assert engine.device.startswith("cuda:0")
        if submodel.signature.states:
            reference, slot = Reference(submodel, graph), Slot()
            for call in tokens(submodel, 1, COUNTS):
                assert snr_db(engine.run(call, slot)["logits"], reference.run(call)) > FLOOR["float16"]
        else:
            for seed in range(3):
                inputs = submodel.signature.sample(submodel.signature.sample_lengths(), seed)
                (wanted,) = canonical(submodel, graph).run(None, inputs)
                assert snr_db(np.asarray(next(iter(engine.run(inputs).values()))), wanted) > FLOOR["float16"]
        engine.close()
