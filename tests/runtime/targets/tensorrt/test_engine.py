"""TensorRT and TensorRT for RTX: what is compiled without a GPU; how engines run, on a fake of the SDK and on a GPU
where there is one.
"""

from __future__ import annotations

import gc
import platform
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle.manifest import Bundle, Submodel
from runtime.bundle.signature import Array
from runtime.engine import Compiled, CompileOptions, Engine, Options, Slot, target, targets
from runtime.errors import Cancelled, EngineError, EngineUnavailable, InvalidInput, ResourceExhausted
from runtime.targets.tensorrt.engine import TensorRTForRTX
from runtime.targets.tensorrt.settings import TensorRTSettings
from tests.runtime.targets.conftest import quantized

RECIPES = ("none", "int8", "int8-weight", "int4", "fp8")
SMALL = {"shapes": "batch=1:1:2,sequence=1:8:16", "compute_capability": "8.9", "optimization_level": "0"}


@pytest.fixture(scope="session")
def rtx() -> type[Engine]:
    """The target, where it can compile; skips with its reason elsewhere."""
    engine = target("tensorrt-rtx")
    found = engine.available()
    if not found.compiles:
        pytest.skip(f"tensorrt-rtx: {found.reason}")
    return engine


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["diffusion_bundle", "vlm_bundle"])
def test_every_recipe_is_read(
    rtx: type[TensorRTForRTX], request: pytest.FixtureRequest, kind: str, recipe: str
) -> None:
    """TensorRT's parser takes each submodel's graph of either sample, down to attention, caches and block-wise int4."""
    from runtime.targets.tensorrt.compile import Compiler
    from runtime.targets.tensorrt.lower import lower

    bundle = Bundle(request.getfixturevalue(kind))
    for submodel in bundle.manifest.submodels:
        graph = quantized(bundle, submodel, recipe) / submodel.graph
        settings = TensorRTSettings()
        with Compiler(rtx.sdk, submodel, settings, lambda share, phase: None) as compiler:
            compiler.parse(lower(submodel, graph, settings), graph)
            compiler.configure((89,))
            names = {compiler.network.get_input(index).name for index in range(compiler.network.num_inputs)}
        assert {tensor.name for tensor in submodel.signature.graph_inputs} <= names


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_every_recipe_of_a_decoder_is_compiled(
    rtx: type[TensorRTForRTX], tiny_bundle: Path, tmp_path: Path, recipe: str, compute: str
) -> None:
    bundle = Bundle(tiny_bundle)
    submodel = bundle.submodel("decoder").computing(compute)
    graph = quantized(bundle, submodel, recipe) / submodel.graph
    artifact = rtx.compile_with(CompileOptions(SMALL), submodel, graph, tmp_path / "engines")
    assert artifact.files == ("decoder.engine",) and artifact.seconds > 0
    assert artifact.key == {"sdk": rtx.available().version, "compute_capability": "8.9", "weights": "engine"}
    assert artifact.settings == {"shapes": SMALL["shapes"], "optimization_level": "0"}, (
        "what another machine would compile with, too"
    )
    assert not rtx.reads_graph(artifact) and rtx.reads_graph(
        artifact.model_copy(update={"key": {"weights": "stripped"}})
    )
    plan = (tmp_path / "engines" / "decoder.engine").read_bytes()
    assert len(plan) > 10_000
    assert [path.name for path in (tmp_path / "engines").iterdir()] == ["decoder.engine"], "nothing temporary is left"


def compile_embedding(
    rtx: type[Engine], bundle: Path, output: Path, submodel: Submodel | None = None, **settings: str
) -> Any:
    """Compile the smallest submodel there is, by default for one GPU."""
    opened = Bundle(bundle)
    submodel = submodel or opened.submodel("token_embedding")
    chosen = {"compute_capability": "8.9", **settings}
    return rtx.compile_with(CompileOptions(chosen), submodel, opened.root / submodel.graph, output)


def test_compiled_ahead_for_every_gpu_that_it_knows(rtx: type[Engine], tiny_bundle: Path, tmp_path: Path) -> None:
    opened = Bundle(tiny_bundle)
    submodel = opened.submodel("token_embedding")
    if rtx.available().usable:
        pytest.skip("compiles for the GPU that is here")
    artifact = rtx.compile(submodel, opened.root / submodel.graph, tmp_path)
    assert artifact.key["compute_capability"] == "8.0,8.6,8.9,12.0,12.1"
    several = compile_embedding(rtx, tiny_bundle, tmp_path, compute_capability="8.9, 12.0,8.9")
    assert several.key["compute_capability"] == "8.9,12.0"


def test_fp8_is_compiled_for_gpus_that_have_it(rtx: type[Engine], vlm_bundle: Path, tmp_path: Path) -> None:
    opened = Bundle(vlm_bundle)
    submodel = opened.submodel("decoder")
    graph = quantized(opened, submodel, "fp8") / submodel.graph
    with pytest.raises(InvalidInput, match=r"compute_capability: fp8 needs 8\.9 or later"):
        rtx.compile_with(CompileOptions({"compute_capability": "8.6,8.9"}), submodel, graph, tmp_path / "engines")
    if rtx.available().usable:
        pytest.skip("compiles for the GPU that is here")
    assert rtx.compile(submodel, graph, tmp_path / "engines").key["compute_capability"] == "8.9,12.0,12.1"


def test_the_same_input_gives_the_same_engine(rtx: type[Engine], tiny_bundle: Path, tmp_path: Path) -> None:
    plans = []
    for name in ("a", "b"):
        compile_embedding(rtx, tiny_bundle, tmp_path / name)
        plans.append((tmp_path / name / "token_embedding.engine").read_bytes())
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compute_capability": "9"}, "compute_capability: is '9', expected versions such as 8.9 or 8.9,12.0"),
        ({"compute_capability": "9.0"}, "compute_capability: 9.0 is none that TensorRT for RTX knows: 7.5, 8.0"),
        ({"shapes": "batch=1:2"}, "shapes: has 'batch=1:2', expected NAME=MIN:OPT:MAX"),
        ({"shapes": "batch=4:2:8"}, "expected MIN <= OPT <= MAX"),
        ({"shapes": "batch=1:2:65"}, "shapes: has batch=1:2:65, outside of the model's 1 to 64"),
        ({"shapes": "bach=1:2:4"}, "shapes: has 'bach', which is no dim of this submodel: did you mean 'batch'"),
        ({"workspace": "4GB"}, "workspace: is '4GB', expected a size such as 512MiB or 4GiB"),
        ({"weights": "none"}, "weights: Input should be 'engine', 'refit', 'stripped' or 'streamed'"),
        ({"optimization_level": "9"}, "optimization_level: "),
        ({"workspce": "4GiB"}, "workspce: Extra inputs are not permitted .known: .*workspace"),
        ({"timing_cache": "times"}, "timing_cache: is of no use to TensorRT for RTX"),
        (
            {"hardware": "ampere+"},
            "hardware: is of no use to TensorRT for RTX: it measures no kernels, and compute_capability names its GPUs",
        ),
        ({"plugins": "nowhere.so"}, "plugins: nowhere.so is no library of plugins that TensorRT for RTX can load"),
    ],
)
def test_settings_that_cannot_be(
    rtx: type[Engine], tiny_bundle: Path, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        compile_embedding(rtx, tiny_bundle, tmp_path, **settings)
    assert not list(tmp_path.rglob("*.engine"))


def test_more_context_than_the_model_has(rtx: type[Engine], tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="context: is 100000, and the model has 1024 positions"):
        compile_embedding(rtx, tiny_bundle, tmp_path, Bundle(tiny_bundle).submodel("decoder"), context="100000")


@pytest.mark.parametrize(
    "settings", [{"workspace": "64MiB"}, {"weights": "streamed"}, {"compatible": "version"}, {"tf32": "true"}]
)
def test_settings_that_are_heeded(
    rtx: type[Engine], tiny_bundle: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    artifact = compile_embedding(rtx, tiny_bundle, tmp_path, **settings)
    kept = {name: value for name, value in settings.items() if name in ("weights", "compatible")}
    assert kept.items() <= artifact.key.items()


def test_flags_and_limits_reach_the_builder(rtx: type[TensorRTForRTX], tiny_bundle: Path) -> None:
    from runtime.targets.tensorrt.compile import Compiler

    submodel = Bundle(tiny_bundle).submodel("token_embedding")
    settings = TensorRTSettings.parse(
        {"weights": "streamed", "compatible": "version", "workspace": "64MiB", "shapes": "batch=1:2:3"}
    )
    with Compiler(rtx.sdk, submodel, settings, lambda share, phase: None) as compiler:
        trt, config = compiler.trt, compiler.config
        compiler.configure((89, 120))
        assert not config.get_flag(trt.BuilderFlag.TF32), "float32 is float32 by default"
        assert all(
            config.get_flag(getattr(trt.BuilderFlag, name)) for name in ("WEIGHT_STREAMING", "VERSION_COMPATIBLE")
        )
        assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 << 20
        assert [config.get_compute_capability(index) for index in range(2)] == [
            trt.ComputeCapability.SM89,
            trt.ComputeCapability.SM120,
        ]
        assert compiler.network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def test_a_stripped_engine_needs_a_gpu_to_be_made(rtx: type[Engine], tiny_bundle: Path, tmp_path: Path) -> None:
    if rtx.available().usable:
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match=r"could not compile token_embedding \(build its engine\): .*CUDA"):
        compile_embedding(rtx, tiny_bundle, tmp_path, weights="stripped")
    assert not list(tmp_path.rglob("*token_embedding*")), "nothing half written is left"


def test_progress_goes_forward_and_may_stop_the_build(rtx: type[Engine], tiny_bundle: Path, tmp_path: Path) -> None:
    opened = Bundle(tiny_bundle)
    submodel, shares = opened.submodel("token_embedding"), []

    def listen(share: float, phase: str) -> None:
        shares.append(share)
        if "stop" in phases:
            raise Cancelled("enough")
        phases.append(phase)

    phases: list[str] = []
    settings = {"compute_capability": "8.9"}
    rtx.compile_with(CompileOptions(settings, listen), submodel, opened.root / submodel.graph, tmp_path)
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) > 10 and phases[-1] == "Engine written"
    phases.append("stop")
    with pytest.raises(Cancelled, match="enough"):
        rtx.compile_with(CompileOptions(settings, listen), submodel, opened.root / submodel.graph, tmp_path / "stopped")
    assert not list((tmp_path / "stopped").iterdir())


def test_operators_of_plugins_are_refused_unless_allowed(rtx: type[Engine], tiny_bundle: Path, tmp_path: Path) -> None:
    import onnx_ir as ir

    opened = Bundle(tiny_bundle)
    submodel = opened.submodel("token_embedding")
    model = ir.load(opened.root / submodel.graph)
    node = ir.node("Vendor", [model.graph.outputs[0]], domain="com.example")
    model.graph.append(node)
    model.graph.opset_imports["com.example"] = 1
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = (
        "made",
        model.graph.outputs[0].type,
        model.graph.outputs[0].shape,
    )
    model.graph.outputs[0] = node.outputs[0]
    for tensor in model.graph.initializers.values():
        tensor.const_value = ir.Tensor(tensor.const_value.numpy().copy(), dtype=tensor.dtype, name=tensor.name)  # type: ignore[union-attr]
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(
        EngineError, match=r"operators outside of the standard \(com\.example\.Vendor\), which plugins run"
    ):
        rtx.compile(submodel, tmp_path / "model.onnx", tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "no weights", "absent"])
def test_a_graph_that_cannot_be_compiled(rtx: type[Engine], tiny_bundle: Path, tmp_path: Path, damage: str) -> None:
    opened = Bundle(tiny_bundle)
    submodel = opened.submodel("vision_encoder")
    shutil.copytree((opened.root / submodel.graph).parent, tmp_path / "onnx")
    graph = tmp_path / "onnx" / "model.onnx"
    if damage == "no weights":
        (tmp_path / "onnx" / "weights.safetensors").unlink()
    elif damage == "absent":
        graph.unlink()
    else:
        graph.write_bytes(graph.read_bytes()[:2000] if damage == "truncated" else b"")
    with pytest.raises(EngineError, match="could not compile"):
        rtx.compile_with(CompileOptions({"compute_capability": "8.9"}), submodel, graph, tmp_path / "out")
    assert not list(tmp_path.rglob("*.engine"))


def test_what_to_install_is_named(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path) -> None:
    """TensorRT itself, where it is missing: the package, and the target that needs no GPU."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    found = target("tensorrt").available()
    assert not found.usable and not found.compiles
    for part in (
        "tensorrt is not installed",
        "'enginecast[tensorrt]'",
        "--target tensorrt-rtx",
        "'enginecast[tensorrt-rtx]'",
    ):
        assert part in found.reason
    with pytest.raises(EngineUnavailable, match="cannot compile for tensorrt: tensorrt is not installed"):
        compile_embedding(target("tensorrt"), tiny_bundle, tmp_path)


def test_loading_without_a_gpu(rtx: type[Engine], tiny_bundle: Path) -> None:
    if rtx.available().usable:
        pytest.skip("there is a GPU")
    with pytest.raises(
        EngineUnavailable, match="tensorrt-rtx cannot run here: there is no NVIDIA GPU that CUDA can use"
    ):
        rtx.load(Bundle(tiny_bundle).submodel("decoder"), tiny_bundle, Options())


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty", "absent"])
def test_a_damaged_engine(rtx: type[Engine], tiny_bundle: Path, tmp_path: Path, fake_cuda: Any, damage: str) -> None:
    """What the SDK itself says of it, before it looks for a GPU."""
    artifact = compile_embedding(rtx, tiny_bundle, tmp_path / "engines" / rtx.target)
    opened = Bundle(tiny_bundle)
    manifest = opened.manifest.model_copy(update={"artifacts": (artifact,)})
    (tmp_path / "manifest.json").write_text(manifest.model_dump_json())
    plan = tmp_path / "engines" / rtx.target / "token_embedding.engine"
    if damage == "absent":
        plan.unlink()
    else:
        plan.write_bytes({"truncated": plan.read_bytes()[:5000], "foreign": b"ONNX" * 1000, "empty": b""}[damage])
    reason = (
        "No such file"
        if damage == "absent"
        else "damaged, or of another version or GPU .*(Serialization assertion|empty memory buffer)"
    )
    with pytest.raises(EngineError, match=f"could not load .*token_embedding.engine: .*{reason}"):
        rtx.load(opened.submodel("token_embedding"), tmp_path, Options())
    assert not fake_cuda.live


def test_a_bundle_without_engines_of_the_target(rtx: type[Engine], tiny_bundle: Path, fake_cuda: Any) -> None:
    with pytest.raises(
        EngineError, match="holds no tensorrt-rtx engine of decoder: build it with --target tensorrt-rtx"
    ):
        rtx.load(Bundle(tiny_bundle).submodel("decoder"), tiny_bundle, Options())


# Running, on a fake of the SDK whose engines are the lowered graphs

FLOOR = 1e-4
STATELESS = [
    ("diffusion_bundle", "text_encoder", [{"batch": 1, "sequence": 32}, {"batch": 3, "sequence": 5}]),
    (
        "diffusion_bundle",
        "unet",
        [{"batch": 2, "height": 4, "width": 6, "sequence": 9}, {"batch": 1, "height": 8, "width": 4, "sequence": 7}],
    ),
    ("diffusion_bundle", "vae_decoder", [{"batch": 1, "height": 4, "width": 4}, {"batch": 2, "height": 2, "width": 4}]),
    ("vlm_bundle", "vision_encoder", [{"images": 2}, {"images": 1}]),
    ("vlm_bundle", "token_embedding", [{"batch": 2, "sequence": 9}, {"batch": 2, "sequence": 3}]),
]


def distance(got: Array, wanted: Array) -> float:
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())  # type: ignore[operator]


def reference(bundle: Bundle, name: str) -> Engine:
    """ONNX Runtime on the canonical graph."""
    return targets()["onnxruntime"].load(bundle.submodel(name), bundle.root, Options(threads=1))


def test_the_real_sdk_has_what_the_fake_one_has(rtx: type[TensorRTForRTX], load_fake: Any, vlm_bundle: Path) -> None:
    """The fake may not promise methods that the SDK lacks."""
    import tensorrt_rtx

    plan = load_fake(Bundle(vlm_bundle), "token_embedding")._loaded
    own = {
        "known",
        "session",
        "inputs",
        "outputs",
        "logger",
        "cuda",
        "view",
        "output_shapes",
        "refuses",
        "engine",
        "profile",
        "shapes",
    }
    for fake, real in ((plan.engine, tensorrt_rtx.ICudaEngine), (plan.contexts[0], tensorrt_rtx.IExecutionContext)):
        names = {name for name in dir(fake) if not name.startswith("_")} - own - {"places", "memory"}
        assert len(names) > 5 and not [name for name in names if not hasattr(real, name)]


@pytest.mark.parametrize(("kind", "name", "sizes"), STATELESS, ids=[name for _, name, _ in STATELESS])
def test_one_size_after_another(
    load_fake: Any, request: pytest.FixtureRequest, kind: str, name: str, sizes: list[dict[str, int]]
) -> None:
    bundle = Bundle(request.getfixturevalue(kind))
    engine, wanted = load_fake(bundle, name), reference(bundle, name)
    for seed, lengths in enumerate([sizes[0], sizes[1], sizes[0], sizes[0]]):
        inputs = engine.submodel.signature.sample(lengths, seed)
        for output, expected in wanted.run(inputs).items():
            assert distance(engine.run(inputs)[output], expected) < FLOOR


class Text:
    """A decoder fed token by token on two engines, which must agree."""

    def __init__(self, engine: Engine, wanted: Engine, seed: int = 0, batch: int = 1) -> None:
        self.engines = {engine: Slot(), wanted: Slot()}
        self.rng = np.random.default_rng(seed)
        self.batch, self.length = batch, 0

    def feed(self, count: int) -> None:
        size = next(iter(self.engines)).submodel.signature.inputs[0].dims[-1]
        start, self.length = self.length, self.length + count
        inputs: dict[str, Array] = {
            "inputs_embeds": self.rng.standard_normal((self.batch, count, int(str(size)))).astype(np.float32),
            "attention_mask": np.ones((self.batch, self.length), np.int64),
            "position_ids": np.tile(np.arange(start, self.length), (self.batch, 1)),
        }
        got, wanted = (engine.run(inputs, slot)["logits"] for engine, slot in self.engines.items())
        assert distance(got, wanted) < FLOOR

    def trim(self, length: int) -> None:
        for engine, slot in self.engines.items():
            engine.trim(slot, length)
        self.length = length


@pytest.fixture
def pair(load_fake: Any, tiny_bundle: Path) -> tuple[Engine, Engine]:
    """The small decoder on the fake SDK, and on ONNX Runtime."""
    bundle = Bundle(tiny_bundle)
    return load_fake(bundle, "decoder"), reference(bundle, "decoder")


@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_decode_and_trim(pair: tuple[Engine, Engine], batch: int) -> None:
    text = Text(*pair, batch=batch)
    for count in (7, 1, 1, 4, 1):
        text.feed(count)
    text.trim(5)
    for count in (3, 1, 1):
        text.feed(count)
    text.trim(0)
    for count in (2, 1):
        text.feed(count)


def test_slots_do_not_mix_and_are_freed(pair: tuple[Engine, Engine], fake_cuda: Any) -> None:
    texts = [Text(*pair, seed=seed, batch=1 + seed % 2) for seed in range(3)]
    for counts in ((5, 8, 2), (1, 1, 1), (1, 3, 1)):
        for text, count in zip(texts, counts, strict=True):
            text.feed(count)
    held = len(fake_cuda.live)
    gone = weakref.ref(next(iter(texts[0].engines.values())))
    del texts[0], text
    gc.collect()
    states = len(pair[0].submodel.signature.states)
    assert gone() is None and held - len(fake_cuda.live) == states, "its caches are freed, and nothing else"
    texts[0].feed(1)


def test_caches_are_written_in_place(pair: tuple[Engine, Engine], fake_cuda: Any) -> None:
    text, engine = Text(*pair), pair[0]
    text.feed(5)
    (cache,) = engine._slots.values()  # type: ignore[attr-defined]
    before = {name: buffer.address for name, buffer in cache.buffers.items()}
    text.feed(1)
    allocated = fake_cuda.allocations
    for _ in range(4):
        text.feed(1)
    assert {name: buffer.address for name, buffer in cache.buffers.items()} == before
    assert fake_cuda.allocations == allocated, "buffers stay from step to step"


def test_repeated_steps_are_recorded(pair: tuple[Engine, Engine], fake_cuda: Any) -> None:
    text, other = Text(*pair), Text(*pair, seed=1)
    text.feed(5)
    for _ in range(4):
        text.feed(1)
    assert fake_cuda.launches == 3 and fake_cuda.graphs == 1, "the first step is set up, the second recorded"
    other.feed(3)
    other.feed(1)
    assert fake_cuda.launches == 3 and fake_cuda.graphs == 0, "another slot's addresses are others"
    other.feed(1)
    assert fake_cuda.launches == 4


def test_recording_can_be_switched_off(load_fake: Any, vlm_bundle: Path, fake_cuda: Any) -> None:
    engine = load_fake(Bundle(vlm_bundle), "token_embedding", options=Options(settings={"graphs": "false"}))
    for _ in range(3):
        engine.run({"input_ids": np.array([[5, 6]])})
    assert fake_cuda.launches == 0


def test_work_that_cannot_be_recorded_is_done_all_the_same(
    pair: tuple[Engine, Engine], fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        fake_cuda, "cudaStreamEndCapture", lambda stream: setattr(fake_cuda, "captured", None) or (900, None)
    )
    text = Text(*pair)
    for count in (5, 1, 1, 1):
        text.feed(count)
    assert fake_cuda.launches == 0


def test_outputs_belong_to_the_caller(load_fake: Any, vlm_bundle: Path) -> None:
    engine = load_fake(Bundle(vlm_bundle), "token_embedding")
    first = engine.run({"input_ids": np.array([[5, 6]])})["inputs_embeds"]
    kept = first.copy()
    second = engine.run({"input_ids": np.array([[7, 8]])})["inputs_embeds"]
    np.testing.assert_array_equal(first, kept)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": np.zeros((1, 2, 3), np.int64)}, "input_ids: has 3 dims, expected 2"),
        ({"input_ids": np.zeros((1, 2), np.int32)}, "input_ids: has dtype int32, expected int64"),
        ({}, "input_ids: is missing"),
    ],
)
def test_inputs_that_do_not_fit(load_fake: Any, vlm_bundle: Path, inputs: dict[str, Array], message: str) -> None:
    engine = load_fake(Bundle(vlm_bundle), "token_embedding")
    with pytest.raises(EngineError, match=f"FakeRT could not run token_embedding: {message}"):
        engine.run(inputs)
    assert engine.run({"input_ids": np.array([[5, 6]])})["inputs_embeds"].any(), "the engine works on"


def test_lengths_outside_of_the_profile(load_fake: Any, vlm_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_fake(Bundle(vlm_bundle), "token_embedding")
    context = engine._loaded.contexts[0]
    allowed = context.set_input_shape
    monkeypatch.setattr(context, "set_input_shape", lambda name, shape: allowed(name, shape) and shape[0] <= 2)
    with pytest.raises(
        EngineError, match=r"input_ids of shape \[3, 2\] is outside of what the engine was compiled for"
    ):
        engine.run({"input_ids": np.zeros((3, 2), np.int64)})
    assert engine.run({"input_ids": np.array([[5, 6]])})["inputs_embeds"].any(), "the engine works on"


def test_more_positions_than_the_cache_has(pair: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    text, plan = Text(*pair), pair[0]._loaded  # type: ignore[attr-defined]
    text.feed(4)
    monkeypatch.setattr(plan, "capacity", 4)
    with pytest.raises(
        EngineError, match="5 positions do not fit its cache of 4: build it with a larger context, or say less"
    ):
        text.feed(1)


def test_another_batch_within_a_slot(pair: tuple[Engine, Engine]) -> None:
    text, wider = Text(*pair), Text(*pair, batch=2)
    text.feed(6)
    wider.engines, wider.length = text.engines, 6
    with pytest.raises(EngineError, match="could not run decoder: the slot holds 1 rows, this call has 2"):
        wider.feed(1)


def test_a_device_without_memory_for_it(load_fake: Any, diffusion_bundle: Path, fake_cuda: Any) -> None:
    engine = load_fake(Bundle(diffusion_bundle), "vae_decoder")
    fake_cuda.memory = 10_000
    with pytest.raises(ResourceExhausted, match="too little free memory"):
        engine.run(engine.submodel.signature.sample({"batch": 1, "height": 8, "width": 8}))
    fake_cuda.memory = 1 << 30
    assert engine.run(engine.submodel.signature.sample({"batch": 1, "height": 2, "width": 2}))["image"].any(), (
        "the engine works on"
    )


@pytest.mark.parametrize("function", ["cudaMemcpyAsync", "cudaStreamSynchronize", "cudaSetDevice"])
def test_what_cuda_refuses(load_fake: Any, vlm_bundle: Path, fake_cuda: Any, function: str) -> None:
    engine = load_fake(Bundle(vlm_bundle), "token_embedding")
    fake_cuda.broken = function
    with pytest.raises(
        EngineError, match=r"FakeRT could not run token_embedding: CUDA could not .* cudaErrorInvalidValue"
    ):
        engine.run({"input_ids": np.array([[5, 6]])})
    fake_cuda.broken = ""
    fake_cuda.cudaStreamSynchronize(7)


def test_what_the_engine_refuses(load_fake: Any, vlm_bundle: Path, fake_tensorrt: Any) -> None:
    engine = load_fake(Bundle(vlm_bundle), "token_embedding")
    fake_tensorrt.engines[-1].refuses = True
    with pytest.raises(EngineError, match="could not run token_embedding: the engine refused the work"):
        engine.run({"input_ids": np.array([[5, 6]])})


def test_closing_frees_everything(load_fake: Any, tiny_bundle: Path, fake_cuda: Any) -> None:
    bundle = Bundle(tiny_bundle)
    engine, wanted = load_fake(bundle, "decoder"), reference(bundle, "decoder")
    text = Text(engine, wanted)
    for count in (3, 1, 1, 1):
        text.feed(count)
    assert fake_cuda.live
    engine.close()
    engine.close()
    assert not fake_cuda.live and fake_cuda.graphs == 0


def test_a_cache_that_an_engine_would_copy_is_refused(
    load_fake: Any, tiny_bundle: Path, fake_tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_fake(Bundle(tiny_bundle), "decoder")
    monkeypatch.setattr(type(fake_tensorrt.engines[0]), "get_aliased_input_tensor", lambda self, name: None)
    with pytest.raises(EngineError, match=r"does not update past_key_values\.0\.key in place"):
        load_fake(Bundle(tiny_bundle), "decoder")


# Loading


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            {"sdk": "99.0", "compute_capability": "8.9"},
            "by FakeRT 99.0 for compute capability 8.9, and here are FakeRT 99.1 and Fake 4090 of 8.9",
        ),
        (
            {"sdk": "99.1", "compute_capability": "8.6"},
            "for compute capability 8.6, and here .* of 8.9: build the bundle again, or add one for this machine with "
            "`enginecast add-target`",
        ),
        ({"sdk": "99.1", "compute_capability": "12.0", "hardware": "same"}, "for compute capability 12.0"),
        ({}, "compiled by FakeRT None"),
        (
            {"sdk": "99.1", "compute_capability": "8.9", "os": "plan9"},
            f"was compiled on plan9, and here is {platform.system().lower()}: build the bundle again",
        ),
        (
            {"sdk": "99.1", "compute_capability": "8.9", "driver": "14"},
            "compiled with a driver of CUDA 14, and here is one of CUDA 13",
        ),
        ({"sdk": "99.1", "compute_capability": "8.9", "driver": "thirteen"}, "compiled with a driver of CUDA thirteen"),
        (
            {"sdk": "99.1", "compute_capability": "eight,9", "os": "plan9"},
            "for compute capability eight,9, .*; on plan9, and here",
        ),
    ],
)
def test_an_engine_of_elsewhere(
    load_fake: Any, vlm_bundle: Path, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch, key: dict[str, str], message: str
) -> None:
    monkeypatch.setattr(fake_cuda, "cudaDriverGetVersion", lambda: (0, 13010), raising=False)
    with pytest.raises(EngineError, match=message):
        load_fake(Bundle(vlm_bundle), "token_embedding", key)


@pytest.mark.parametrize(
    "key",
    [
        {"sdk": "99.1", "compute_capability": "8.0,8.9"},
        {"sdk": "99.1", "compute_capability": "8.9", "driver": "12", "os": platform.system().lower()},
        {"sdk": "98.0", "compute_capability": "8.9", "compatible": "version"},
        {"sdk": "99.1", "compute_capability": "8.0", "hardware": "ampere+"},
    ],
)
def test_an_engine_that_fits(
    load_fake: Any, vlm_bundle: Path, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch, key: dict[str, str]
) -> None:
    monkeypatch.setattr(fake_cuda, "cudaDriverGetVersion", lambda: (0, 13010), raising=False)
    engine = load_fake(Bundle(vlm_bundle), "token_embedding", key)
    assert engine.run({"input_ids": np.array([[5, 6]])})["inputs_embeds"].any()
    assert engine.device == "fake-tensorrt:cuda:0 (Fake 4090)"


def test_of_several_engines_the_fitting_one_is_loaded(load_fake: Any, vlm_bundle: Path, tmp_path: Path) -> None:
    """Which fits is known before anything is loaded, and the folder it lies in may be another than the bundle's."""
    name, root = "token_embedding", tmp_path / "several"
    loaded = load_fake(Bundle(vlm_bundle), name)
    engine, folder = type(loaded), next(tmp_path.glob("*/engines/fake-tensorrt"))
    (good,) = Bundle(folder.parents[1]).artifacts(engine.target, name)
    stale = good.model_copy(update={"key": {"sdk": "98.0", "compute_capability": "8.9"}})
    assert engine.misfit(stale).startswith("was compiled by FakeRT 98.0") and engine.misfit(good) == ""
    for artifacts in ([stale, good], [good, stale]):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(folder.parents[1], root, symlinks=True)
        (root / "manifest.json").write_text(
            Bundle(vlm_bundle).manifest.model_copy(update={"artifacts": tuple(artifacts)}).model_dump_json()
        )
        engine.load(loaded.submodel, root, Options()).close()
    shutil.rmtree(root / "engines")
    engine.load(loaded.submodel, root, Options(compiled=Compiled(good, folder))).close()
    with pytest.raises(EngineError, match=r"No such file"):
        engine.load(loaded.submodel, root, Options())


def test_devices_by_name(load_fake: Any, vlm_bundle: Path) -> None:
    for name in ("", "cuda", "cuda:0"):
        load_fake(Bundle(vlm_bundle), "token_embedding", options=Options(device=name))
    with pytest.raises(EngineUnavailable, match=r"FakeRT has no device 'QPU' here: it found cuda:0 \(Fake 4090, 8.9\)"):
        load_fake(Bundle(vlm_bundle), "token_embedding", options=Options(device="QPU"))


# On a GPU


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def on_gpu(request: pytest.FixtureRequest) -> type[Engine]:
    """Each target whose SDK finds a GPU here; skips with its reason elsewhere."""
    engine = target(request.param)
    found = engine.available()
    if not found.usable:
        pytest.skip(f"{request.param}: {found.reason}")
    return engine


def loaded(engine: type[Engine], bundle: Bundle, name: str, root: Path, **settings: str) -> Engine:
    """A submodel compiled and loaded on the GPU that is here."""
    submodel = bundle.submodel(name)
    root.mkdir()
    shutil.copytree(bundle.root / "onnx", root / "onnx")
    artifact = engine.compile_with(
        CompileOptions(settings), submodel, root / submodel.graph, root / "engines" / engine.target
    )
    (root / "manifest.json").write_text(bundle.manifest.model_copy(update={"artifacts": (artifact,)}).model_dump_json())
    return engine.load(submodel, root, Options())


@pytest.mark.parametrize("weights", ["engine", "stripped", "streamed"])
def test_a_decoder_on_a_gpu(on_gpu: type[Engine], tiny_bundle: Path, tmp_path: Path, weights: str) -> None:
    bundle = Bundle(tiny_bundle)
    engine = loaded(on_gpu, bundle, "decoder", tmp_path / "bundle", weights=weights)
    texts = [Text(engine, reference(bundle, "decoder"), seed=seed, batch=1 + seed) for seed in range(2)]
    for count in (7, 1, 1, 1, 4, 1):
        for text in texts:
            text.feed(count)
    texts[0].trim(3)
    for count in (2, 1, 1):
        texts[0].feed(count)
    engine.close()


@pytest.mark.parametrize(("kind", "name", "sizes"), STATELESS, ids=[name for _, name, _ in STATELESS])
def test_a_submodel_on_a_gpu(
    on_gpu: type[Engine],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    kind: str,
    name: str,
    sizes: list[dict[str, int]],
) -> None:
    bundle = Bundle(request.getfixturevalue(kind))
    engine, wanted = loaded(on_gpu, bundle, name, tmp_path / "bundle"), reference(bundle, name)
    for seed, lengths in enumerate([sizes[0], sizes[0], sizes[1], sizes[0]]):
        inputs = engine.submodel.signature.sample(lengths, seed)
        for output, expected in wanted.run(inputs).items():
            assert distance(engine.run(inputs)[output], expected) < FLOOR
    engine.close()
