"""TensorRT and TensorRT for RTX: what is compiled without a GPU; how engines run, on a fake of the SDK and on a GPU where there is one."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle import Bundle, Submodel
from runtime.engine import CompileOptions, Engine, Options, Slot, target, targets
from runtime.engines.tensorrt import Settings, TensorRTForRTX
from runtime.errors import EngineError, EngineUnavailable, ResourceExhausted
from runtime.signature import Array

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


@pytest.mark.parametrize(("kind", "name", "sizes"), STATELESS, ids=[name for _, name, _ in STATELESS])
def test_one_size_after_another(load_fake: Any, request: pytest.FixtureRequest, kind: str, name: str, sizes: list[dict[str, int]]) -> None:
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
        ({"input_ids": np.zeros((1, 2, 3), np.int64)}, r"input_ids of shape \[1, 2, 3\] is outside .* \(input_ids has a wrong shape\)"),
        ({"input_ids": np.zeros((1, 2), np.int32)}, "input_ids is int32, expected int64"),
        ({}, "input_ids is missing, expected int64"),
    ],
)
def test_inputs_that_do_not_fit(load_fake: Any, vlm_bundle: Path, inputs: dict[str, Array], message: str) -> None:
    engine = load_fake(Bundle(vlm_bundle), "token_embedding")
    with pytest.raises(EngineError, match=f"FakeRT could not run token_embedding: {message}"):
        engine.run(inputs)
    assert engine.run({"input_ids": np.array([[5, 6]])})["inputs_embeds"].any(), "the engine works on"


def test_more_positions_than_the_cache_has(pair: tuple[Engine, Engine]) -> None:
    engine = pair[0]
    longest = engine.submodel.signature.dims["total"].max
    inputs = engine.submodel.signature.sample({"batch": 1, "past": longest, "sequence": 1, "total": longest + 1})
    with pytest.raises(EngineError, match=f"{longest + 1} positions do not fit its cache of {longest}"):
        engine.run({tensor.name: inputs[tensor.name] for tensor in engine.submodel.signature.inputs}, Slot())


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
    assert engine.run(engine.submodel.signature.sample({"batch": 1, "height": 2, "width": 2}))["image"].any(), "the engine works on"


@pytest.mark.parametrize("function", ["cudaMemcpyAsync", "cudaStreamSynchronize", "cudaSetDevice"])
def test_what_cuda_refuses(load_fake: Any, vlm_bundle: Path, fake_cuda: Any, function: str) -> None:
    engine = load_fake(Bundle(vlm_bundle), "token_embedding")
    fake_cuda.broken = function
    with pytest.raises(EngineError, match=r"FakeRT could not run token_embedding: CUDA could not .* cudaErrorInvalidValue"):
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
            "for compute capability 8.6, and here .* of 8.9: build the bundle again on this machine",
        ),
        ({"sdk": "99.1", "compute_capability": "12.0", "hardware": "same"}, "for compute capability 12.0"),
        ({}, "compiled by FakeRT None"),
    ],
)
def test_an_engine_of_elsewhere(load_fake: Any, vlm_bundle: Path, key: dict[str, str], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        load_fake(Bundle(vlm_bundle), "token_embedding", key)


@pytest.mark.parametrize(
    "key",
    [
        {"sdk": "99.1", "compute_capability": "8.0,8.9"},
        {"sdk": "98.0", "compute_capability": "8.9", "compatible": "version"},
        {"sdk": "99.1", "compute_capability": "8.0", "hardware": "ampere+"},
    ],
)
def test_an_engine_that_fits(load_fake: Any, vlm_bundle: Path, key: dict[str, str]) -> None:
    engine = load_fake(Bundle(vlm_bundle), "token_embedding", key)
    assert engine.run({"input_ids": np.array([[5, 6]])})["inputs_embeds"].any()
    assert engine.device == "fake-tensorrt:cuda:0 (Fake 4090)"


def test_devices_by_name(load_fake: Any, vlm_bundle: Path) -> None:
    for name in ("", "cuda", "cuda:0"):
        load_fake(Bundle(vlm_bundle), "token_embedding", options=Options(device=name))
    with pytest.raises(EngineUnavailable, match=r"FakeRT has no device 'QPU' here: it found cuda:0 \(Fake 4090, 8.9\)"):
        load_fake(Bundle(vlm_bundle), "token_embedding", options=Options(device="QPU"))
