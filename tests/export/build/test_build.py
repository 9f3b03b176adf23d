"""The build as a whole: what it writes, what it reuses, what it refuses, and that a failure leaves things
as they were.
"""

from __future__ import annotations

import collections
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

import export.build.build
import export.build.bundle
import export.build.parts
import export.build.state
import export.graph.trace
from calibration.quantize.recipes import INT4_EVERYWHERE, RECIPES
from export.build.build import build
from export.build.options import Options
from export.build.state import Build
from export.cli.bundles import inspect
from export.report.progress import Report
from runtime.bundle.manifest import MANIFEST, Bundle, sha256
from runtime.errors import (
    BundleError,
    EnginecastError,
    InvalidInput,
    NotFound,
    ParityError,
    ResourceExhausted,
    SourceError,
    UnsupportedModel,
)
from runtime.language.text import Message
from runtime.pipeline import drive
from runtime.placing.loading import load_model
from runtime.tasks.chat import ChatRequest, Finished

CANONICAL = re.compile(r"\.(onnx|safetensors)$")


@pytest.fixture
def source(tiny_vlm: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return shutil.copytree(tiny_vlm, tmp_path / "source")


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing fails: whatever is built comes from the cache."""

    def trace(*_: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr(export.graph.trace, "trace", trace)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# What is written


def test_a_bundle_of_standard_files(tiny_bundle: Path, tiny_vlm: Path) -> None:
    bundle = Bundle(tiny_bundle)
    bundle.verify()
    manifest = bundle.manifest
    assert (manifest.name, manifest.pipeline, manifest.quant) == ("tiny-vlm", "chat", "none")
    assert (manifest.source.family, manifest.source.architecture) == ("llava", "LlavaForConditionalGeneration")
    assert [submodel.name for submodel in manifest.submodels] == ["vision_encoder", "token_embedding", "decoder"]
    assert {artifact.target for artifact in manifest.artifacts} == set(bundle.targets)
    assert {"torch", "transformers", "onnxruntime"} <= manifest.versions.keys()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tiny_bundle / "tokenizer" / name).read_bytes() == (tiny_vlm / name).read_bytes()
    for submodel in manifest.submodels:
        graph = tiny_bundle / submodel.graph
        onnx.checker.check_model(graph, full_check=True)
        onnx.load(graph)
        assert str(submodel.precision) == "float16"
        assert submodel.nbytes == sum(path.stat().st_size for path in graph.parent.iterdir()) - _header(
            graph.parent / "weights.safetensors"
        )
        assert submodel.parity is not None and submodel.parity.method == "full"
        assert 0 <= submodel.parity.error < 1e-4 and submodel.parity.snr_db > 60


def _header(weights: Path) -> int:
    return 8 + int.from_bytes(weights.read_bytes()[:8], "little")


def test_the_weights_are_the_checkpoint_s(tiny_bundle: Path, tiny_vlm: Path) -> None:
    published = load_file(tiny_vlm / "model.safetensors")
    written: dict[str, torch.Tensor] = {}
    for submodel in Bundle(tiny_bundle).manifest.submodels:
        written |= load_file((tiny_bundle / submodel.graph).parent / "weights.safetensors")
    assert {"lm_head.weight", "model.language_model.layers.1.mlp.up_proj.weight"} <= written.keys() <= published.keys()
    for name, tensor in written.items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor, published[name]), name


def test_no_path_of_this_machine_is_in_a_bundle(tiny_bundle: Path, tiny_vlm: Path) -> None:
    for name, content in files(tiny_bundle).items():
        assert str(tiny_vlm).encode() not in content and str(tiny_bundle.parent).encode() not in content, name


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_quantized_bundles_answer(tiny_vlm: Path, tmp_path: Path, quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "int4", INT4_EVERYWHERE)  # the model is tiny
    hashed = collections.Counter[str]()
    monkeypatch.setattr(export.build.bundle, "sha256", lambda file: hashed.update([file.name]) or sha256(file))
    with monkeypatch.context() as patch:
        patch.setattr(Bundle, "verify", lambda *_, **__: pytest.fail("a build loads drafts, which are not verified"))
        bundle, timings = build(Options(str(tiny_vlm), tmp_path / "b", quant=quant))
    assert hashed.total() == len(bundle.manifest.files), "each file is hashed once"
    bundle.verify()
    assert "calibrate" in timings
    assert bundle.manifest.quant == quant and quant in bundle.submodel("decoder").precision.weights
    assert bundle.submodel("vision_encoder").precision.activations == ("int8" if quant == "int8" else "float")
    assert not (tmp_path / "b" / "float").exists()
    model = load_model(tmp_path / "b")
    picture = np.zeros((40, 60, 3), np.uint8)
    request = ChatRequest((Message("user", (picture, "what color is the background?")),), max_tokens=3)
    assert isinstance([*drive(model.pipeline(request), model.engines)][-1], Finished)
    model.close()


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_what_the_weights_became_is_in_the_manifest(
    tiny_diffusion: Path, tmp_path: Path, quant: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every weight is counted once, in the form it is stored in; what was requested is most, even of a tiny model."""
    bundle, _ = build(Options(str(tiny_diffusion), tmp_path / "b", quant=quant, quality="none", speed="none"))
    whole = collections.Counter[str]()
    for submodel in bundle.manifest.submodels:
        stored, told = collections.Counter[str](), collections.Counter[str]()
        for value in ir.load(bundle.root / submodel.graph).graph.initializers.values():
            stored[value.dtype.name.lower()] += value.const_value.size
        for weights in submodel.weights:
            told[weights.form] += weights.elements
            assert bool(weights.reason) == (weights.form != quant), weights
        assert told["int4"] == stored["int4"] and told["int8"] <= stored["int8"] < told["int8"] + 100, (
            "zero points are int8, too"
        )
        assert sum(weights.nbytes for weights in submodel.weights) < submodel.nbytes
        whole += told
    assert whole["int8"] + whole["int4"] > whole.total() / 2
    unet = collections.Counter({weights.form: weights.elements for weights in bundle.submodel("unet").weights})
    assert unet[quant] > unet.total() / 2, "convolutions, too"
    inspect(bundle.root)
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith("weights: int") and f"Not {quant}: " in last and "no layer multiplies by them" in last


def test_a_recipe_that_changes_nothing_is_refused(
    tiny_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibration.quantize.plan.SMALL_SHARE", 1)
    monkeypatch.setattr("calibration.quantize.plan.SMALL", 1 << 30)
    for quant in ("int8", "int4"):
        with pytest.raises(
            InvalidInput, match=r"no weight of tiny-diffusion can be quantized \(\d+ layers: too few elements\)"
        ):
            build(Options(str(tiny_diffusion), tmp_path / "b", quant=quant))
    assert not (tmp_path / "b").exists()


def test_a_large_model_is_rounded_to_int4_and_told(
    tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "int4", INT4_EVERYWHERE)
    monkeypatch.setattr(export.build.state, "FULL_QUALITY_BYTES", 1000)
    reports: list[Report] = []
    _, timings = build(Options(str(tiny_vlm), tmp_path / "b", quant="int4"), reports.append)
    assert "calibrate" not in timings
    told = {report.step.submodel: report.detail for report in reports if report.step.stage == "write" and report.detail}
    assert "rounded without data" in told["decoder"] and "rounded" not in told["token_embedding"]


# Reuse


def test_the_same_build_again_is_up_to_date(tiny_vlm: Path, tmp_path: Path) -> None:
    options = Options(str(tiny_vlm), tmp_path / "b")
    build(options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "b").rglob("*")}
    for force in (False, True):
        bundle, timings = build(Options(str(tiny_vlm), tmp_path / "b", force=force))
        assert timings == {} and bundle.name == "tiny-vlm"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "b").rglob("*")} == before


@pytest.mark.usefixtures("tiny_bundle", "untraced")
def test_another_build_reuses_traced_graphs(tiny_vlm: Path, tmp_path: Path) -> None:
    build(Options(str(tiny_vlm), tmp_path / "b", quant="int4"))


@pytest.mark.usefixtures("untraced")
def test_builds_are_reproducible(tiny_vlm: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    build(Options(str(tiny_vlm), tmp_path / "b"))
    first, second = (
        {name: data for name, data in files(folder).items() if name.startswith("onnx/")}
        for folder in (tiny_bundle, tmp_path / "b")
    )
    assert first == second


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "chat_template.jinja", "tokenizer_config.json", "model.safetensors"]
)
def test_whatever_goes_into_a_bundle_makes_another_build(source: Path, tmp_path: Path, name: str) -> None:
    build(Options(str(source), tmp_path / "b"))
    if name.endswith(".json"):
        (source / name).write_text(json.dumps(json.loads((source / name).read_bytes()), indent=7))
    elif name.endswith(".jinja"):
        (source / name).write_text((source / name).read_text() + "{# another #}")
    else:
        save_file(
            {key: tensor * 2 for key, tensor in load_file(source / name).items()},
            source / name,
            metadata={"format": "pt"},
        )
    with pytest.raises(InvalidInput, match="holds another bundle"):
        build(Options(str(source), tmp_path / "b"))


# What lies at the output


def test_another_bundle_is_replaced_only_by_force(tiny_vlm: Path, tmp_path: Path) -> None:
    build(Options(str(tiny_vlm), tmp_path / "b"))
    before = files(tmp_path / "b")
    other = Options(str(tiny_vlm), tmp_path / "b", quant="int4")
    with pytest.raises(InvalidInput, match=r"holds another bundle: .*--force"):
        build(other)
    assert files(tmp_path / "b") == before
    assert build(Options(str(tiny_vlm), tmp_path / "b", quant="int4", force=True))[0].manifest.quant == "int4"


@pytest.mark.parametrize("damage", ["altered", "manifest", "schema"])
def test_a_damaged_bundle_is_named_and_replaced_by_force(
    tiny_bundle: Path, tiny_vlm: Path, tmp_path: Path, damage: str
) -> None:
    output = shutil.copytree(tiny_bundle, tmp_path / "b")
    if damage == "altered":
        (output / "tokenizer" / "tokenizer.json").write_text("{}")
    else:
        (output / MANIFEST).write_text("{" if damage == "manifest" else '{"schema_version": 0}')

    def options(force: bool) -> Options:
        return Options(str(tiny_vlm), output, Bundle(tiny_bundle).targets, force=force)

    with pytest.raises(EnginecastError, match=r"tokenizer\.json was altered|holds another bundle"):
        build(options(False))
    build(options(True))[0].verify()


def test_what_is_no_bundle_is_refused_before_any_work(tiny_vlm: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"meow")
    reports: list[Report] = []
    with pytest.raises(InvalidInput, match="exists and is no bundle"):
        build(Options(str(tiny_vlm), tmp_path / "photos", force=True), reports.append)
    assert not reports and (tmp_path / "photos" / "cat.png").exists()


# Parity


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A converter that confuses two weights of the same shape."""
    attach = export.build.parts.graph.attach

    def confused(model: ir.Model, *arguments: Any) -> None:
        attach(model, *arguments)
        values = model.graph.initializers
        names = [f"model.language_model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
        if names[0] in values:
            first, second = (values[name] for name in names)
            first.const_value, second.const_value = second.const_value, first.const_value

    monkeypatch.setattr(export.build.parts.graph, "attach", confused)
    cached = export.build.build.cached
    monkeypatch.setattr(
        export.build.build,
        "cached",
        lambda key, suffix, make: cached(key if suffix == ".onnx" else f"confused-{key}", suffix, make),
    )
    yield


@pytest.mark.usefixtures("swapped")
@pytest.mark.parametrize("method", ["full", "twin"])
def test_an_unfaithful_graph_makes_no_bundle(tiny_vlm: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(ParityError) as caught:
        build(Options(str(tiny_vlm), tmp_path / "out" / "b", parity=method))
    expected = r"submodel 'decoder': output 'logits' .* differs from torch by \d\.\d\de[-+]\d+ .*, "
    expected += r"expected at most 1e-03\. No bundle was written"
    assert re.match(expected, str(caught.value))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", [pytest.param("diffusion", marks=pytest.mark.full), "vlm"])
def test_parity_with_the_twin(kind: str, tiny_diffusion: Path, tiny_vlm: Path, tmp_path: Path) -> None:
    bundle, _ = build(Options(str(tiny_vlm if kind == "vlm" else tiny_diffusion), tmp_path / "b", parity="twin"))
    for submodel in bundle.manifest.submodels:
        assert submodel.parity is not None and submodel.parity.method == "twin" and submodel.parity.error < 1e-4


def test_a_large_source_is_compared_by_its_twin(
    tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = Build.open(Options(str(tiny_vlm), tmp_path / "b"))
    assert state.method == "full"
    monkeypatch.setattr(export.build.state, "FULL_PARITY_BYTES", 1000)
    assert state.method == "twin"
    assert Build.open(Options(str(tiny_vlm), tmp_path / "b", parity="full")).method == "full"


# Progress


def test_progress_tells_every_step(tiny_vlm: Path, tmp_path: Path) -> None:
    reports: list[Report] = []
    _, timings = build(Options(str(tiny_vlm), tmp_path / "b"), reports.append)
    begun, ended = ([report for report in reports if (report.seconds is None) == state] for state in (True, False))
    numbers = list(dict.fromkeys(report.number for report in begun))
    assert numbers == [report.number for report in ended] == list(range(1, reports[0].total + 1))
    assert all(report.eta >= 0 for report in reports) and reports[-1].eta < 1e-6
    stages = collections.Counter(report.step.stage for report in ended)
    assert stages == {
        "check": 1,
        "trace": 3,
        "parity": 3,
        "write": 3,
        "compile onnxruntime": 3,
        "check onnxruntime": 3,
        "hash": 1,
    }
    assert timings.keys() == stages.keys()
    assert any(re.fullmatch(r"0\.\d+ MB float16", report.detail) for report in ended)


# Bad input: nothing is left beside the output


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quant": "int88"}, InvalidInput, r"quant: 'int88' is not known: did you mean 'int8'\?"),
        ({"parity": "ful"}, InvalidInput, r"parity: 'ful' is not known: did you mean 'full'\?"),
        ({"targets": ()}, InvalidInput, "target: is missing"),
        ({"targets": ("openvin",)}, NotFound, r"target 'openvin' is not known: did you mean 'openvino'\?"),
    ],
)
def test_unknown_options(tmp_path: Path, options: dict[str, Any], error: type[EnginecastError], message: str) -> None:
    with pytest.raises(error, match=message):
        Options("x", tmp_path / "b", **options)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="does not exist: expected a folder"):
        build(Options(str(tmp_path / "nowhere"), tmp_path / "b"))


def _unknown(source: Path) -> None:
    (source / "config.json").write_text('{"architectures": ["LlavaForConditionalGenerations"]}')


def _truncated(source: Path) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _pickle(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def _nan(source: Path) -> None:
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"][3, 4] = torch.nan
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})


def _other_shapes(source: Path) -> None:
    config = json.loads((source / "config.json").read_bytes())
    config["text_config"]["vocab_size"] = 513
    (source / "config.json").write_text(json.dumps(config))


def _no_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").unlink()


def _bad_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").write_text('{"version": "1.0"}')


def _nonsense(source: Path) -> None:
    config = json.loads((source / "config.json").read_bytes())
    config["text_config"]["num_attention_heads"] = "many"
    (source / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            _unknown,
            UnsupportedModel,
            r"which no family handles: did you mean 'LlavaForConditionalGeneration'\? \(known: ",
        ),
        (_truncated, SourceError, "is truncated: expected"),
        (_pickle, SourceError, "is a pickle, .* is refused. Convert it"),
        (_nan, SourceError, r"tensor 'lm_head\.weight' holds nan at \[3, 4\]"),
        (_other_shapes, SourceError, r"of another shape 2 .*\(expected \[513, 32\], found \[512, 32\]\)"),
        (_no_tokenizer, SourceError, r"has no tokenizer, none of tokenizer\.json"),
        (_bad_tokenizer, SourceError, "its tokenizer files cannot be read"),
        (_nonsense, SourceError, 'num_attention_heads is "many", expected a whole number'),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_source(
    source: Path, tmp_path: Path, damage: Callable[[Path], None], error: type[EnginecastError], message: str
) -> None:
    damage(source)
    with pytest.raises(error, match=message):
        build(Options(str(source), tmp_path / "out" / "b"))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_full_disk(tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total used free")(10, 10, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(
        ResourceExhausted, match=r"needs at least 0\.00 GB and 0\.00 GB are free: free some space or choose"
    ):
        build(Options(str(tiny_vlm), tmp_path / "out" / "b"))
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_was_altered_is_not_taken_for_up_to_date(tiny_vlm: Path, tmp_path: Path) -> None:
    build(Options(str(tiny_vlm), tmp_path / "b"))
    (tmp_path / "b" / "added.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"added\.txt is not in the manifest"):
        build(Options(str(tiny_vlm), tmp_path / "b"))
