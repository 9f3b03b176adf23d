"""TensorRT and TensorRT for RTX: what is compiled here, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.bundle import Bundle, Submodel
from runtime.engine import CompileOptions, Engine, target
from runtime.engines.tensorrt import Settings, TensorRTForRTX

RECIPES = ("none", "int8", "int8-weight", "int4")
SMALL = {"shapes": "batch=1:1:2,sequence=1:8:16", "compute_capability": "8.9", "optimization_level": "0"}


@pytest.fixture(scope="session")
def rtx() -> type[Engine]:
    """The target, where it can compile; skips with its reason elsewhere."""
    engine = target("tensorrt-rtx")
    found = engine.available()
    if not found.compiles:
        pytest.skip(f"tensorrt-rtx: {found.reason}")
    return engine


def quantized(bundle: Bundle, submodel: Submodel, recipe: str, folder: Path) -> Path:
    """The submodel's graph as the recipe makes it, with ranges wide enough for anything."""
    import onnx_ir as ir

    from calibration.quantize import RECIPES, activation_tensors, plan, quantize
    from calibration.ranges import Range
    from export.graph import write

    graph = bundle.root / submodel.graph
    if recipe == "none":
        return graph
    model = ir.load(graph)
    chosen = RECIPES[recipe]
    ranges = {name: Range(peak=8.0, snr_db=60.0) for name in activation_tensors(model, chosen)}
    write(quantize(model, plan(model, chosen, ranges), ranges), folder / "onnx")
    return folder / "onnx" / "model.onnx"


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["diffusion_bundle", "vlm_bundle"])
def test_every_recipe_is_read(rtx: type[TensorRTForRTX], request: pytest.FixtureRequest, tmp_path: Path, kind: str, recipe: str) -> None:
    """TensorRT's parser takes each submodel's graph of either sample, down to attention, caches and block-wise int4."""
    from runtime.engines.tensorrt import _Compiler, _lower

    bundle = Bundle(request.getfixturevalue(kind))
    for submodel in bundle.manifest.submodels:
        graph = quantized(bundle, submodel, recipe, tmp_path / submodel.name)
        settings = Settings()
        with _Compiler(rtx.sdk, submodel, settings, lambda share, phase: None) as compiler:
            compiler.parse(_lower(submodel, graph, settings), graph)
            compiler.configure((89,))
            names = {compiler.network.get_input(index).name for index in range(compiler.network.num_inputs)}
        assert {tensor.name for tensor in submodel.signature.graph_inputs} <= names


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_every_recipe_of_a_decoder_is_compiled(
    rtx: type[TensorRTForRTX], tiny_bundle: Path, tmp_path: Path, recipe: str, compute: str
) -> None:
    bundle = Bundle(tiny_bundle)
    submodel = bundle.submodel("decoder").model_copy(update={"compute": compute})
    graph = quantized(bundle, submodel, recipe, tmp_path)
    artifact = rtx.compile_with(CompileOptions(SMALL), submodel, graph, tmp_path / "engines")
    assert artifact.files == ("decoder.engine",) and artifact.seconds > 0
    assert artifact.key == {"sdk": rtx.available().version, "compute_capability": "8.9", "weights": "engine"}
    plan = (tmp_path / "engines" / "decoder.engine").read_bytes()
    assert len(plan) > 10_000
    assert [path.name for path in (tmp_path / "engines").iterdir()] == ["decoder.engine"], "nothing temporary is left"
