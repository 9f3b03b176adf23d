"""The public names of `enginecast`, what importing it imports, and a build from Python."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import enginecast
import enginecast.testing
from runtime import errors

ROOT = Path(__file__).parents[2]
NAMES = """
    Answer BuildOptions Bundle ChatOptions Choice Client Control Done Drawing EmbedRequest Embeddings EngineUse Event
    Finished Grammar GridDrawing Hires ImageOptions ImageReady Matching Message Model PictureLike Progress Queued
    Scores Session Started Stream Style TextDelta TokenLogprob Vectors build load
""".split()
ERRORS = [name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, Exception)]
DRAWING = {"generate", "generate_stream", "draw", "grid"}
CHATTING = {"chat", "chat_stream", "answer", "captions"}
EMBEDDING = {"embed", "match", "vectors", "score"}
METHODS = {
    "Session": {*DRAWING, *CHATTING, *EMBEDDING, "run", "close", "identity", "scripts"},
    "Model": {"task", "target", "device", "notes"},
    "Client": {"models", "load", "unload", "reload", "collect_drawing", "collect_answer", "stop", "installed_scripts"},
    "Stream": {"result", "cancel", "close", "aclose"},
}


def test_public_names() -> None:
    assert sorted(enginecast.__all__) == sorted([*NAMES, *ERRORS])
    assert sorted(enginecast.testing.__all__) == ["FakeAnswers", "FakeEngine", "FakeModel", "FakeServer", "fake_model"]
    for name, methods in METHODS.items():
        found = {method for method in dir(getattr(enginecast, name)) if not method.startswith("_")}
        inherited = METHODS["Session"] if name in ("Model", "Client") else set()
        assert found == methods | inherited, name


@pytest.mark.parametrize("name", NAMES)
def test_everything_public_is_documented(name: str) -> None:
    one = getattr(enginecast, name)
    assert name == "PictureLike" or inspect.getdoc(one)
    if inspect.isclass(one):
        methods = [method for key, method in vars(one).items() if inspect.isfunction(method) and key[0] != "_"]
        assert all(method.__doc__ for method in methods)


def test_importing_it_imports_nothing_of_the_build_side() -> None:
    program = """import sys, enginecast, enginecast.testing
print(sorted({name.partition(".")[0] for name in sys.modules}
    & {"torch", "diffusers", "transformers", "optimum", "nncf", "onnx", "onnx_ir", "export", "calibration"}))"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_it_is_typed() -> None:
    for package in ("enginecast", "runtime", "serving", "export"):
        assert (ROOT / package / "py.typed").is_file()


def test_build_says_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "export.build.build", None)
    with pytest.raises(enginecast.MissingDependency, match=r"enginecast\[export\]"):
        enginecast.build("sample:shapes-vlm", tmp_path / "x")


def test_build_options_are_those_of_a_build() -> None:
    from export.build.options import Options

    named = {"source", "output", "targets", "quant", "goal", "additions"}
    assert set(enginecast.BuildOptions.__annotations__) == {field.name for field in fields(Options)} - named


def test_build_load_and_draw(tiny_diffusion: Path, tmp_path: Path) -> None:
    reports: list[object] = []
    built = enginecast.build(
        tiny_diffusion, tmp_path / "b", targets=["onnxruntime"], name="tiny", progress=reports.append
    )
    assert built.name == "tiny" and reports
    with enginecast.load(tmp_path / "b", place={"text_encoder": "cpu"}, memory_limit="1GiB") as model:
        first, second = (model.generate("x", steps=1, width=16, height=16, seed=3).image for _ in range(2))
        assert first.shape == (16, 16, 3) and (first == second).all()
        with pytest.raises(enginecast.InvalidInput, match=r"use `generate`"):
            model.chat("what?")
    with pytest.raises(enginecast.EngineUnavailable):
        enginecast.load(tmp_path / "b", target="openvino")
    with pytest.raises(enginecast.InvalidInput, match="memory_limit"):
        enginecast.load(tmp_path / "b", memory_limit=0)
    with pytest.raises(enginecast.InvalidInput, match="picture_cache: is 'much', expected a size such as 4GiB"):
        enginecast.load(tmp_path / "b", picture_cache="much")
