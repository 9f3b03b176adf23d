"""LLaVA of any decoder and tower answers like transformers' own LlavaForConditionalGeneration, token for token, or is refused by name."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from export.build import build
from export.options import Options
from runtime.engines import openvino
from runtime.loading import load_model
from runtime.pipelines.chat import ChatPipeline
from tests.export.families.conftest import Make, answer, ask, library_answer

TARGETS = ("onnxruntime", "openvino")
WINDOW = 32


def cast(source: Path, targets: tuple[str, ...] = TARGETS) -> Path:
    """An unquantized bundle, without the comparison of engines."""
    output = source.with_name("bundle")
    build(Options(str(source), output, targets=targets, quality="none"))
    return output


def compare(source: Path, bundle: Path, patch: pytest.MonkeyPatch, target: str, *lengths: int, count: int = 64, **settings: Any) -> None:
    """Answers to questions of these lengths are those of the library."""
    with closing(load_model(bundle, target)) as model:
        for length in lengths:
            request = ask(length, temperature=0.0, max_tokens=count)
            wanted, _ = library_answer(source, model.pipeline, request, do_sample=False, max_new_tokens=count, **settings)
            assert answer(model, request, patch) == wanted, f"{target}, {length} tokens"


# Windows of attention


@pytest.fixture(scope="module")
def mistral(make: Make) -> tuple[Path, Path]:
    """A checkpoint whose attention is limited in every layer, and its bundle."""
    source = make(text={"model_type": "mistral", "sliding_window": WINDOW})
    return source, cast(source)


def test_answers_beyond_the_window(mistral: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for target in TARGETS:
        compare(*mistral, monkeypatch, target, 12, 55, 109)
    monkeypatch.setattr(openvino, "fits", lambda signature: False)  # caches in states, as on other processors
    compare(*mistral, monkeypatch, "openvino", 109)


def test_prompts_in_pieces_beyond_the_window(mistral: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, bundle = mistral
    for target in TARGETS:
        with closing(load_model(bundle, target)) as model:
            assert isinstance(model.pipeline, ChatPipeline)
            model.pipeline.config = model.pipeline.config.model_copy(update={"prefill_chunk": 24})
            request = ask(109, temperature=0.0, max_tokens=32)
            wanted, length = library_answer(source, model.pipeline, request, do_sample=False, max_new_tokens=32)
            assert length > 3 * WINDOW and answer(model, request, monkeypatch) == wanted, target


def test_a_window_in_some_layers_on_every_target(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot run here is computed by what emulates it, with calls that leave the window: the build would fail otherwise."""
    source = make(text={"model_type": "qwen2", "sliding_window": 12, "use_sliding_window": True, "max_window_layers": 1})
    others = ("coreml", "cuda", "directml")
    bundle, _ = build(Options(str(source), source.with_name("bundle"), targets=(*TARGETS, *others)))
    assert [state.window for state in bundle.submodel("decoder").signature.states] == [0, 0, 12, 12]
    found = {artifact.target: artifact.agreement for artifact in bundle.manifest.artifacts if artifact.submodel == "decoder"}
    assert found.keys() == {*TARGETS, *others} and all(agreement is not None and agreement.snr_db > 60 for agreement in found.values())
    for target in TARGETS:
        compare(source, bundle.root, monkeypatch, target, 55)
