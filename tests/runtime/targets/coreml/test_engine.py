"""Core ML: packages of every submodel and recipe, interpreted beside ONNX Runtime; the engine on a fake MLModel, and on
a Mac.
"""

from __future__ import annotations

import errno
import gc
import platform
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.bundle.manifest import Bundle, Submodel
from runtime.bundle.signature import Array
from runtime.engine import Compiled, CompileOptions, Engine, Options, Slot, target, targets
from runtime.errors import Cancelled, EngineError, EngineUnavailable, InvalidInput, ResourceExhausted
from runtime.targets.coreml import engine as coreml
from runtime.targets.coreml.engine import CoreML
from runtime.targets.coreml.interpret import Interpreter
from runtime.targets.coreml.package import Package
from runtime.targets.coreml.sdk import coremltools
from tests.runtime.targets.conftest import quantized

FLOORS = {"none": 100.0, "int8-weight": 100.0, "int4": 20.0, "int8": 20.0}
"""dB between the package and ONNX Runtime. Codes of quantized activations that lie between two are rounded to either,
and layers behind them carry that on: noise of one part in a million added to the input of the same ONNX Runtime makes
as much of a difference.
"""
CACHED = 45.0
"""dB with keys and values kept in 16 bits, behind which codes of activations may again be others."""


@pytest.fixture(autouse=True)
def needs_coremltools() -> None:
    found = CoreML.available()
    if not found.compiles:
        pytest.skip(f"coreml: {found.reason}")


def emulated(submodel: Submodel, root: Path, output: Path, **settings: str) -> Engine:
    artifact = CoreML.compile_with(CompileOptions(settings), submodel, root / submodel.graph, output)
    return CoreML.emulate(submodel, root, Options(compiled=Compiled(artifact, output)))


def reference(submodel: Submodel, root: Path) -> Engine:
    """ONNX Runtime on the canonical graph, nothing rounded beyond what the graph says."""
    engine: type[Engine] = target("onnxruntime")
    plain = submodel.model_copy(update={"dynamic": False})
    output = root / "engines" / "onnxruntime"
    if submodel.signature.states:
        engine.compile(plain, root / submodel.graph, output)
    return engine.load(plain, root, Options(threads=1))


def snr(wanted: Array, got: Array) -> float:
    assert wanted.shape == got.shape and wanted.dtype == got.dtype
    exact, other = wanted.astype(np.float64), got.astype(np.float64)
    return float(10 * np.log10((exact**2).sum() / max(1e-300, ((exact - other) ** 2).sum())))


def stateless(bundle: Bundle) -> Iterator[Submodel]:
    return (submodel for submodel in bundle.manifest.submodels if not submodel.signature.states)


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        *(("vlm_bundle", recipe) for recipe in FLOORS),
        ("diffusion_bundle", "int8"),
        *(
            pytest.param("diffusion_bundle", recipe, marks=pytest.mark.full)
            for recipe in ("none", "int8-weight", "int4")
        ),
    ],
)
def test_every_recipe_of_both_samples_agrees(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, recipe: str
) -> None:
    bundle = Bundle(request.getfixturevalue(kind))
    for submodel in stateless(bundle):
        root = quantized(bundle, submodel, recipe)
        engine, other = emulated(submodel, root, tmp_path / "engines"), reference(submodel, root)
        inputs = submodel.signature.sample(submodel.signature.sample_lengths(), seed=1)
        got, wanted = engine.run(inputs), other.run(inputs)
        assert got.keys() == wanted.keys() and engine.device == "coreml:interpreted"
        for name in wanted:
            assert snr(wanted[name], got[name]) > FLOORS[recipe], f"{submodel.name} {name}"


@pytest.mark.parametrize("recipe", FLOORS)
def test_every_recipe_of_the_decoder_agrees_position_by_position(vlm_bundle: Path, tmp_path: Path, recipe: str) -> None:
    submodel = Bundle(vlm_bundle).submodel("decoder")
    root = quantized(Bundle(vlm_bundle), submodel, recipe)
    engine, other = emulated(submodel, root, tmp_path / "engines", context="64"), reference(submodel, root)
    floor = min(CACHED, FLOORS[recipe])
    for batch in (1, 2):
        talk, same = Talk(submodel, batch), Talk(submodel, batch)
        for count in (5, 1, 1, 3, 1):
            assert snr(same.feed(other, count), talk.feed(engine, count)) > floor


@pytest.mark.full
def test_the_published_parts_of_stable_diffusion_xl_agree(xl_bundle: Path, tmp_path: Path) -> None:
    """Its second text encoder has operators that no sample has."""
    for submodel in Bundle(xl_bundle).manifest.submodels:
        engine, other = emulated(submodel, xl_bundle, tmp_path), reference(submodel, xl_bundle)
        inputs = submodel.signature.sample(submodel.signature.sample_lengths(), seed=1)
        wanted, got = other.run(inputs), engine.run(inputs)
        assert all(snr(wanted[name], got[name]) > 100 for name in wanted), submodel.name


class Talk:
    """A decoder's inputs, position after position, in a slot."""

    def __init__(self, submodel: Submodel, batch: int = 1, seed: int = 0) -> None:
        size = submodel.signature.inputs[0].dims[-1]
        assert isinstance(size, int)
        self.embeds = 0.05 * np.random.default_rng(seed).standard_normal((batch, 128, size)).astype(np.float32)
        self.slot, self.length = Slot(), 0

    def inputs(self, count: int) -> dict[str, Array]:
        start, end, batch = self.length, self.length + count, len(self.embeds)
        return {
            "inputs_embeds": self.embeds[:, start:end],
            "attention_mask": np.ones((batch, end), np.int64),
            "position_ids": np.broadcast_to(np.arange(start, end), (batch, count)),
        }

    def feed(self, engine: Engine, count: int) -> Array:
        inputs = self.inputs(count)
        self.length += count
        return engine.run(inputs, self.slot)["logits"]


# The states of a decoder


@pytest.fixture(scope="module")
def decoder(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The decoder of a tiny model, with a cache of 32 positions."""
    return emulated(
        Bundle(tiny_bundle).submodel("decoder"), tiny_bundle, tmp_path_factory.mktemp("engines"), context="32"
    )


def test_slots_keep_to_themselves_and_begin_anew(decoder: Engine, tiny_bundle: Path) -> None:
    other = reference(decoder.submodel, tiny_bundle)
    talks = [(Talk(decoder.submodel, seed=seed), Talk(decoder.submodel, seed=seed)) for seed in range(3)]
    for counts in ((4, 7, 1), (1, 1, 1), (2, 1, 3)):
        for (talk, same), count in zip(talks, counts, strict=True):
            assert snr(same.feed(other, count), talk.feed(decoder, count)) > CACHED
    talk, same = talks[0]
    for engine, one in ((decoder, talk), (other, same)):
        engine.trim(one.slot, 2)
        one.length = 2
        one.embeds = one.embeds[:, ::-1].copy()
        one.embeds[:, :2] = one.embeds[:, -1:-3:-1]
    assert snr(same.feed(other, 3), talk.feed(decoder, 3)) > CACHED
    wider, twin = Talk(decoder.submodel, 2), Talk(decoder.submodel, 2)
    wider.slot = talk.slot
    with pytest.raises(EngineError, match="could not run decoder: the slot holds 1 rows, this call has 2"):
        decoder.run(wider.inputs(3), wider.slot)
    decoder.trim(talk.slot, 0)
    assert snr(twin.feed(other, 3), wider.feed(decoder, 3)) > CACHED


def test_states_are_freed_with_their_slot(decoder: Any) -> None:
    talk = Talk(decoder.submodel)
    talk.feed(decoder, 2)
    before, gone = len(decoder._slots), weakref.ref(talk.slot)
    del talk
    gc.collect()
    assert gone() is None and len(decoder._slots) == before - 1


def test_a_full_cache_says_so(decoder: Engine) -> None:
    talk = Talk(decoder.submodel)
    talk.feed(decoder, 32)
    with pytest.raises(EngineError, match="33 positions do not fit its cache of 32: build it with a larger context"):
        talk.feed(decoder, 1)


def test_padding_on_the_left_is_left_out(decoder: Engine) -> None:
    padded, plain = Talk(decoder.submodel), Talk(decoder.submodel)
    plain.embeds = padded.embeds[:, 2:]
    inputs = padded.inputs(6)
    inputs["attention_mask"][:, :2] = 0
    inputs["position_ids"] = np.array([[0, 0, 0, 1, 2, 3]])
    assert snr(plain.feed(decoder, 4), decoder.run(inputs, padded.slot)["logits"]) > CACHED


@pytest.mark.parametrize("shapes", ["enumerated", "fixed"])
def test_a_prompt_is_cut_into_lengths_that_were_compiled(
    decoder: Engine, tiny_bundle: Path, tmp_path: Path, shapes: str
) -> None:
    lengths = "sequence=1:4:8" if shapes == "enumerated" else "sequence=1"
    engine: Any = emulated(decoder.submodel, tiny_bundle, tmp_path, context="32", shapes=shapes, lengths=lengths)
    counts: list[int] = []
    predict = engine._model.predict
    engine._model = SimpleNamespace(
        make_state=engine._model.make_state,
        predict=lambda data, state: counts.append(data["position_ids"].shape[1]) or predict(data, state),
    )
    talk, same = Talk(decoder.submodel), Talk(decoder.submodel)
    for count in (14, 1):
        assert snr(same.feed(decoder, count), talk.feed(engine, count)) > CACHED
    assert counts == ([8, 4, 1, 1, 1] if shapes == "enumerated" else [1] * 15)


# Settings


@pytest.mark.parametrize("shapes", ["fixed", "enumerated"])
def test_other_shapes_than_compiled_are_refused(diffusion_bundle: Path, tmp_path: Path, shapes: str) -> None:
    """Fixed shapes leave no arithmetic on lengths in the program, which is folded without a look at weights."""
    bundle = Bundle(diffusion_bundle)
    submodel = bundle.submodel("text_encoder")
    engine: Any = emulated(submodel, bundle.root, tmp_path, shapes=shapes, lengths="batch=1:2:3,sequence=4:8:16")
    other = reference(submodel, bundle.root)
    allowed = [{"batch": 2, "sequence": 8}] + [{"batch": 1, "sequence": 4}, {"batch": 3, "sequence": 16}] * (
        shapes == "enumerated"
    )
    for lengths in allowed:
        inputs = submodel.signature.sample(lengths)
        assert snr(other.run(inputs)["last_hidden_state"], engine.run(inputs)["last_hidden_state"]) > 100
    with pytest.raises(EngineError, match=r"input_ids is \(1, 5\), and it was compiled for \(2, 8\)"):
        engine.run(submodel.signature.sample({"batch": 1, "sequence": 5}))
    kinds = {step.kind for step in engine._model.steps}
    assert ("shape" in kinds) == (shapes == "enumerated")


@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder"])
def test_half_precision_halves_the_rest_and_is_computed(diffusion_bundle: Path, tmp_path: Path, name: str) -> None:
    bundle = Bundle(diffusion_bundle)
    submodel = bundle.submodel(name)
    engine: Any = emulated(submodel, bundle.root, tmp_path, precision="float16")
    by_bundle: Any = emulated(submodel.computing("float16"), bundle.root, tmp_path / "2")
    inputs = submodel.signature.sample(submodel.signature.sample_lengths())
    (wanted,), (got,), (same,) = (
        one.run(inputs).values() for one in (reference(submodel, bundle.root), engine, by_bundle)
    )
    assert 40 < snr(wanted, got) < 90 and engine.computes == by_bundle.computes == "float16"
    np.testing.assert_array_equal(got, same)
    wide = {output.dtype for step in engine._model.steps if step.kind in ("linear", "conv") for output in step.outputs}
    assert wide == {"float16"}


def test_settings_that_do_not_fit_are_named(tiny_bundle: Path, tmp_path: Path) -> None:
    submodel = Bundle(tiny_bundle).submodel("decoder")
    for settings, what in (
        ({"context": "99999"}, "context: is 99999"),
        ({"lengths": "total=8"}, "names total"),
        ({"units": "ALL"}, "units"),
    ):
        with pytest.raises(InvalidInput, match=what):
            CoreML.compile_with(CompileOptions(settings), submodel, tiny_bundle / submodel.graph, tmp_path)
    assert not any(tmp_path.iterdir())


# What is written


def test_an_artifact_says_what_it_is(tiny_bundle: Path, tmp_path: Path) -> None:
    submodel = Bundle(tiny_bundle).submodel("decoder")
    reported: list[tuple[float, str]] = []
    options = CompileOptions({"context": "32"}, lambda share, phase: reported.append((share, phase)))
    artifact = CoreML.compile_with(options, submodel, tiny_bundle / submodel.graph, tmp_path)
    folder = "decoder.mlpackage"
    data = f"{folder}/Data/com.apple.CoreML"
    assert artifact.files == (f"{data}/model.mlmodel", f"{data}/weights/weight.bin", f"{folder}/Manifest.json")
    assert artifact.key == {"minimum_deployment_target": "macOS15", "coremltools": CoreML.available().version}
    assert artifact.settings == {"context": "32"} and artifact.seconds > 0 and not CoreML.reads_graph(artifact)
    assert [path.name for path in tmp_path.iterdir()] == [folder]
    shares = [share for share, _ in reported]
    assert (
        shares == sorted(shares)
        and shares[-1] == 1
        and {"Program translated", "Weights written"} <= {phase for _, phase in reported}
    )
    spec = Package(tmp_path / folder).spec
    states = {feature.name: list(feature.type.stateType.arrayType.shape) for feature in spec.description.state}
    assert spec.specificationVersion == 9 and len(states) == len(submodel.signature.states)
    assert all(shape[0] == 1 and shape[2] == 32 for shape in states.values())
    read = [operation.type for operation in Package(tmp_path / folder).operations]
    assert read.count("write_state") == len(states) and read.count("slice_update") == len(states)


def test_a_package_holds_what_its_weights_take(vlm_bundle: Path, tmp_path: Path) -> None:
    """Not more than the canonical weights and 10 % of them: half where stored in half. int4 nested in int8 is stored as
    int8.
    """
    bundle = Bundle(vlm_bundle)
    submodel = bundle.submodel("vision_encoder")
    sizes = {}
    for recipe in ("none", "int8-weight", "int4"):
        root = quantized(bundle, submodel, recipe)
        artifact = CoreML.compile(submodel, root / submodel.graph, tmp_path / f"{recipe}-engines")
        weights = next(name for name in artifact.files if name.endswith("weight.bin"))
        canonical = ((root / submodel.graph).parent / "weights.safetensors").stat().st_size
        sizes[recipe] = (tmp_path / f"{recipe}-engines" / weights).stat().st_size
        assert sizes[recipe] < (1.1 if recipe != "int4" else 2) * canonical
    assert sizes["int4"] < 1.05 * sizes["int8-weight"] < 0.7 * sizes["none"]


def test_who_stops_it_is_reported_and_nothing_is_left(tiny_bundle: Path, tmp_path: Path) -> None:
    submodel = Bundle(tiny_bundle).submodel("vision_encoder")

    def stop(share: float, phase: str) -> None:
        if phase == "Weights written":
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        CoreML.compile_with(CompileOptions(progress=stop), submodel, tiny_bundle / submodel.graph, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("code", "expected"), [(errno.ENOSPC, ResourceExhausted), (errno.EIO, EngineError)])
def test_trouble_with_the_disk(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: type[Exception]
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(coreml, "save", fail)
    submodel = Bundle(tiny_bundle).submodel("token_embedding")
    with pytest.raises(expected):
        CoreML.compile(submodel, tiny_bundle / submodel.graph, tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "no weights"])
def test_a_damaged_graph(tiny_bundle: Path, tmp_path: Path, damage: str) -> None:
    submodel = Bundle(tiny_bundle).submodel("vision_encoder")
    source = (tiny_bundle / submodel.graph).read_bytes()
    graph = tmp_path / "model.onnx"
    graph.write_bytes(source[:2000] if damage == "truncated" else source)
    with pytest.raises(EngineError, match="could not compile"):
        CoreML.compile(submodel, graph, tmp_path / "engines")
    assert not list(tmp_path.glob("engines/*"))


# On machines


def test_whether_it_runs_here() -> None:
    found = CoreML.available()
    if sys.platform == "darwin" and int(platform.mac_ver()[0].split(".")[0]) >= 15:
        assert found.usable and found.devices[0] == "ALL" and not found.reason
    else:
        assert not found.usable and found.compiles and found.reason and found.version


def test_without_coremltools(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = CoreML.available()
    assert not found.compiles and "pip install 'enginecast[coreml]'" in found.reason
    submodel = Bundle(tiny_bundle).submodel("decoder")
    with pytest.raises(EngineUnavailable, match="enginecast"):
        CoreML.compile(submodel, tiny_bundle / submodel.graph, tmp_path)
    with pytest.raises(EngineUnavailable, match="enginecast"):
        CoreML.emulate(submodel, tiny_bundle, Options())


def test_an_old_mac_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("14.7", ("", "", ""), "arm64"))
    assert CoreML.available().reason == "macOS 14.7 is too old for what is compiled, which needs 15 or later"
    monkeypatch.setattr(platform, "mac_ver", lambda: ("26.1", ("", "", ""), "arm64"))
    assert CoreML.available().usable


class FakeMLModel:
    """coremltools' MLModel as it would be on a Mac, computing with the interpreter."""

    made: list[FakeMLModel]

    def __init__(self, path: str, compute_units: Any, optimization_hints: Any) -> None:
        if "broken" in path:
            raise RuntimeError("Error compiling model")
        self.units, self.hints = compute_units, optimization_hints
        self.interpreter = Interpreter(Package(Path(path)))
        self.make_state = self.interpreter.make_state
        self.made.append(self)

    def predict(self, data: dict[str, Array], state: Any = None) -> dict[str, Array]:
        if any(not array.flags.c_contiguous for array in data.values()):
            raise RuntimeError("not contiguous")
        return self.interpreter.predict(data, state)


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> type[FakeMLModel]:
    """A Mac with macOS 15, whose Core ML is the interpreter."""
    FakeMLModel.made = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.2", ("", "", ""), "arm64"))
    real = coremltools()
    fake = SimpleNamespace(
        models=SimpleNamespace(MLModel=FakeMLModel),
        ComputeUnit=real.ComputeUnit,
        ReshapeFrequency=real.ReshapeFrequency,
    )
    fake.SpecializationStrategy = real.SpecializationStrategy
    monkeypatch.setattr(coreml, "coremltools", lambda: fake)
    return FakeMLModel


def test_a_mac_loads_a_bundle_and_says_where_it_runs(mac: type[FakeMLModel], tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle(tiny_bundle)
    root = tmp_path / "bundle"
    root.mkdir()
    names = ("decoder", "token_embedding")
    artifacts = [
        CoreML.compile(bundle.submodel(name), tiny_bundle / bundle.submodel(name).graph, root / "engines" / "coreml")
        for name in names
    ]
    (root / "manifest.json").write_text(
        bundle.manifest.model_copy(update={"artifacts": tuple(artifacts)}).model_dump_json()
    )
    options = Options(device="CPU_AND_NE", settings={"reshapes": "frequent", "specialization": "fast"})
    decoder, embedding = (targets()["coreml"].load(bundle.submodel(name), root, options) for name in names)
    ct = coremltools()
    assert (
        decoder.device == "coreml:CPU_AND_NE" and [model.units for model in mac.made] == [ct.ComputeUnit.CPU_AND_NE] * 2
    )
    assert mac.made[0].hints == {
        "reshapeFrequency": ct.ReshapeFrequency.Frequent,
        "specializationStrategy": ct.SpecializationStrategy.FastPrediction,
    }
    talk, same = Talk(decoder.submodel), Talk(decoder.submodel)
    other = reference(decoder.submodel, tiny_bundle)
    for count in (5, 1):
        assert snr(same.feed(other, count), talk.feed(decoder, count)) > CACHED
    ids = np.arange(12).reshape(3, 4).T
    assert embedding.run({"input_ids": ids})["inputs_embeds"].shape[:2] == (4, 3)
    assert not CoreML.misfit(artifacts[0])
    default = CoreML.load(bundle.submodel("decoder"), root, Options())
    assert default.device == "coreml:ALL" and mac.made[-1].hints is None
    for engine in (decoder, embedding, default):
        engine.close()
        engine.close()


def test_what_a_mac_cannot_load(mac: type[FakeMLModel], tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle(tiny_bundle)
    submodel = bundle.submodel("token_embedding")
    with pytest.raises(EngineUnavailable, match="no device 'QPU' here: expected ALL"):
        CoreML.load(submodel, tiny_bundle, Options(device="QPU"))
    with pytest.raises(EngineError, match="holds no coreml package of token_embedding: build it with --target coreml"):
        CoreML.load(submodel, tiny_bundle, Options())
    with pytest.raises(InvalidInput, match="reshapes"):
        CoreML.load(submodel, tiny_bundle, Options(settings={"reshapes": "never"}))
    artifact = CoreML.compile(submodel, tiny_bundle / submodel.graph, tmp_path / "broken")
    with pytest.raises(EngineError, match=r"Core ML could not load .* Error compiling model"):
        CoreML.load(submodel, tiny_bundle, Options(compiled=Compiled(artifact, tmp_path / "broken")))


def test_off_a_mac_it_is_not_loaded(tiny_bundle: Path) -> None:
    found = CoreML.available()
    if found.usable:
        pytest.skip("this is a Mac")
    submodel = Bundle(tiny_bundle).submodel("decoder")
    with pytest.raises(EngineUnavailable, match="coreml cannot run here: Core ML runs on macOS alone"):
        CoreML.load(submodel, tiny_bundle, Options())
    with pytest.raises(EngineUnavailable, match="no device 'ALL'"):
        CoreML.emulate(submodel, tiny_bundle, Options(device="ALL"))


@pytest.mark.parametrize("unit", coreml.UNITS)
def test_core_ml_computes_what_was_interpreted(unit: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """On a Mac: every compute unit gives what the interpreter gives."""
    found = CoreML.available()
    if not found.usable:
        pytest.skip(found.reason)
    for submodel in Bundle(tiny_bundle).manifest.submodels:
        artifact = CoreML.compile(submodel, tiny_bundle / submodel.graph, tmp_path)
        compiled = Compiled(artifact, tmp_path)
        package = Package(tmp_path / f"{submodel.name}.mlpackage")
        engines = [
            CoreML.load(submodel, tiny_bundle, Options(device=unit, compiled=compiled)),
            CoreML(submodel, package, Interpreter(package), "interpreted", artifact),
        ]
        if submodel.signature.states:
            talks = [Talk(submodel), Talk(submodel)]
            for count in (5, 1):
                got, wanted = (talk.feed(engine, count) for talk, engine in zip(talks, engines, strict=True))
                assert snr(wanted, got) > 35
        else:
            inputs = submodel.signature.sample(submodel.signature.sample_lengths())
            for got, wanted in zip(*(engine.run(inputs).values() for engine in engines), strict=True):
                assert snr(wanted, got) > 35
