"""What is measured of a quantized bundle: a model against itself, against its quantized form, and against one that was
spoilt.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.ground.progress import Position, listening
from calibration.observe.metrics import CAP_DB, perplexity
from export.build.build import build
from export.build.options import Options
from export.report.compare import Samples, measure
from export.report.quality import QUALITY, floors, load_quality, save_quality
from export.report.running import MAX_TOKENS
from export.task import FOLDER, Effort
from export.tasks.chat import TASK as CHAT
from export.tasks.chat import mean, tokens_of, whole_text
from runtime.bundle.manifest import MANIFEST, Bundle
from runtime.bundle.signature import Array
from runtime.engine import Engine, Slot
from runtime.errors import BundleError, EngineError, NotFound
from runtime.pipelines.chat import ChatPipeline
from runtime.placing.loading import LoadedModel, load_model
from runtime.tasks.chat import ChatRequest
from runtime.vision.images import decode_image
from tests.fakes.captured import captured

EFFORT = Effort(pictures=2, steps=3, questions=4, cases=4)


class Spoilt:
    """An engine whose outputs are changed; remembers the inputs of its calls."""

    def __init__(self, engine: Engine, change: Any) -> None:
        self.engine, self.change, self.calls = engine, change, list[Mapping[str, Array]]()
        self.submodel = engine.submodel

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        self.calls.append(dict(inputs))
        return {name: self.change(array) for name, array in self.engine.run(inputs, slot).items()}

    def trim(self, slot: Slot, length: int) -> None:
        self.engine.trim(slot, length)


def spoilt(model: LoadedModel, submodel: str, change: Any) -> LoadedModel:
    engines: Any = {**model.engines, submodel: Spoilt(model.engines[submodel], change)}
    return replace(model, engines=engines)


def noise(array: Array) -> Array:
    """As much noise as there is signal, the same for the same shape."""
    values = np.asarray(array, np.float32)
    return np.asarray(values + np.random.default_rng(0).normal(0, values.std(), values.shape).astype(np.float32))


def nothing(array: Array) -> Array:
    return np.full_like(array, np.nan)


def loaded(root: Path) -> Iterator[LoadedModel]:
    model = load_model(root, "onnxruntime")
    yield model
    model.close()


def built(source: Path, quant: str, factory: pytest.TempPathFactory) -> Path:
    output = factory.mktemp("quality") / f"{source.name}-{quant}"
    build(Options(str(source), output, quant=quant))
    return output


@pytest.fixture(scope="module")
def drawing(tiny_diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    yield from loaded(built(tiny_diffusion, "none", tmp_path_factory))


@pytest.fixture(scope="module")
def drawing_int8(tiny_diffusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    yield from loaded(built(tiny_diffusion, "int8", tmp_path_factory))


@pytest.fixture(scope="module")
def talking(tiny_bundle: Path) -> Iterator[LoadedModel]:
    yield from loaded(tiny_bundle)


@pytest.fixture(scope="module")
def talking_int8(tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    yield from loaded(built(tiny_vlm, "int8", tmp_path_factory))


@pytest.fixture(scope="module")
def drawn(drawing: LoadedModel) -> Samples:
    return captured(drawing, 4)


@pytest.fixture(scope="module")
def said(talking: LoadedModel) -> Samples:
    return captured(talking, 4)


def outer(heard: Sequence[Position]) -> list[str]:
    """What the outer loops said, each once."""
    return [text for text in dict.fromkeys(one.text for one in heard) if text and "," not in text]


def test_pictures_of_a_model_against_itself(drawing: LoadedModel, drawn: Samples) -> None:
    heard: list[Position] = []
    with listening(heard.append):
        quality, pictures = measure(drawing, drawing, drawn, EFFORT)
    assert outer(heard) == [f"submodel {n} of 4" for n in (1, 2, 3, 4)] + [f"picture {n} of 2" for n in (1, 2)]
    assert [submodel.name for submodel in quality.submodels] == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert all(submodel.calls == 4 for submodel in quality.submodels)
    figures = [
        (output.snr_db, output.psnr_db, output.cosine) for submodel in quality.submodels for output in submodel.outputs
    ]
    assert figures == [(CAP_DB, CAP_DB, 1)] * 4
    assert [(one.latents_snr_db, one.psnr_db, one.ssim, one.gmsd) for one in quality.results["pictures"]] == [
        (CAP_DB, CAP_DB, 1, 0)
    ] * 2
    assert quality.summary() == {
        "submodel_snr_db": CAP_DB,
        "latents_snr_db": CAP_DB,
        "psnr_db": CAP_DB,
        "ssim": 1,
        "gmsd": 0,
    }
    assert quality.shortfalls("int8") == [] and quality.shortfalls("none") == []
    assert quality.task is None, "what random weights draw is no task"
    assert sorted(pictures) == sorted(
        path for one in quality.results["pictures"] for path in (one.reference, one.quantized)
    )


def test_pictures_of_a_quantized_model(drawing_int8: LoadedModel, drawing: LoadedModel, drawn: Samples) -> None:
    quality, pictures = measure(drawing_int8, drawing, drawn, EFFORT)
    assert (quality.quant, quality.reference_quant, quality.target) == ("int8", "none", "onnxruntime")
    unet = quality.submodels[1]
    assert "int8" in unet.precision and unet.reference_precision == "float16"
    assert 30 < unet.outputs[0].snr_db < unet.outputs[0].psnr_db < 100
    assert all(
        20 < one.latents_snr_db < 100 and 0.9 < one.ssim < 1 and one.gmsd and 0 < one.gmsd < 0.1
        for one in quality.results["pictures"]
    )
    assert quality.shortfalls("int8") == []
    first = quality.results["pictures"][0]
    assert not np.array_equal(pictures[first.reference], pictures[first.quantized])
    again, _ = measure(drawing_int8, drawing, drawn, EFFORT)
    assert [one.latents_snr_db for one in again.results["pictures"]] == [
        one.latents_snr_db for one in quality.results["pictures"]
    ], "equal seeds"


def test_answers_of_a_model_against_itself(talking: LoadedModel, said: Samples) -> None:
    heard: list[Position] = []
    with listening(heard.append):
        quality, pictures = measure(talking, talking, said, EFFORT)
    assert outer(heard) == [f"submodel {n} of 3" for n in (1, 2, 3)] + [f"question {n} of 4" for n in (1, 2, 3, 4)]
    assert quality.summary() == {
        "submodel_snr_db": CAP_DB, "next_token_agreement": 1, "token_agreement": 1, "kl_divergence": 0,
        "perplexity_change": 1,
    }  # fmt: skip
    assert [output.snr_db for submodel in quality.submodels for output in submodel.outputs] == [CAP_DB] * 3
    assert quality.submodels[2].calls == tokens_of(quality.results["answers"]), (
        "the decoder is compared on every token of every answer"
    )
    for one in quality.results["answers"]:
        assert (one.token_agreement, one.next_token_agreement, one.kl_divergence) == (1, 1, 0)
        assert one.reference == one.quantized and one.reference_perplexity == one.quantized_perplexity > 1
    requests = list(islice(CHAT.general(), 4))
    assert [one.question for one in quality.results["answers"]] == [
        request.messages[0].content[1] for request in requests
    ]
    assert np.array_equal(pictures[str(quality.results["answers"][0].picture)], requests[0].images[0])
    assert quality.shortfalls("int8") == []


def test_answers_of_a_quantized_model(talking_int8: LoadedModel, talking: LoadedModel, said: Samples) -> None:
    quality, _ = measure(talking_int8, talking, said, EFFORT)
    for asked, one in zip(islice(CHAT.general(), 4), quality.results["answers"], strict=True):
        assert 0 < one.kl_divergence < 0.01 and one.next_token_agreement >= one.token_agreement
        request = replace(asked, max_tokens=MAX_TOKENS)
        prompt = pipeline_of(talking).prompt(request)
        tokens = greedy(talking, prompt.ids, request, one.tokens)
        for model, found in ((talking, one.reference_perplexity), (talking_int8, one.quantized_perplexity)):
            logits = np.stack([next_logits(model, prompt.ids + tokens[:i], request) for i in range(len(tokens))])
            assert found == pytest.approx(perplexity(logits, tokens), rel=1e-4), "as from each prefix computed alone"
    assert any(one.token_agreement < 1 for one in quality.results["answers"]), "else nothing was forced"
    text = math.exp(
        sum(one.tokens * math.log(one.quantized_perplexity) for one in quality.results["answers"])
        / tokens_of(quality.results["answers"])
    )
    assert whole_text(quality.results["answers"], "quantized_perplexity") == pytest.approx(text)


def pipeline_of(model: LoadedModel) -> ChatPipeline:
    assert isinstance(model.pipeline, ChatPipeline)
    return model.pipeline


def next_logits(model: LoadedModel, ids: list[int], request: ChatRequest) -> Any:
    """Logits [vocab] behind these tokens, computed in one call from an empty cache."""
    pipeline = pipeline_of(model)
    assert pipeline.vision is not None
    embeds = model.engines["token_embedding"].run({"input_ids": np.array([ids], np.int64)})["inputs_embeds"]
    features = model.engines["vision_encoder"].run(
        {"pixel_values": pipeline.vision.layout.tiles(request.images[0], "messages")}
    )["image_features"]
    embeds[0, np.array(ids) == pipeline.config.image_token_id] = features[0]
    positions = np.arange(len(ids), dtype=np.int64)[None]
    inputs = {"inputs_embeds": embeds, "attention_mask": np.ones_like(positions), "position_ids": positions}
    return model.engines["decoder"].run(inputs, Slot())["logits"][0, -1]


def greedy(model: LoadedModel, ids: list[int], request: ChatRequest, count: int) -> list[int]:
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(int(next_logits(model, ids + tokens, request).argmax()))
    return tokens


def test_a_spoilt_unet_falls_short(drawing: LoadedModel, drawn: Samples) -> None:
    quality, _ = measure(spoilt(drawing, "unet", noise), drawing, drawn, EFFORT)
    unet, latents = quality.shortfalls("int4")
    assert unet.startswith("SNR of unet.noise_pred is ") and unet.endswith(" dB, expected at least 12 dB at int4")
    assert latents.startswith("median SNR of the final latents is ")
    assert quality.submodels[2].outputs[0].snr_db == CAP_DB, "each submodel is measured alone"


def test_a_spoilt_decoder_falls_short(talking: LoadedModel, said: Samples) -> None:
    quality, _ = measure(spoilt(talking, "decoder", noise), talking, said, EFFORT)
    decoder, agreement = quality.shortfalls("int4")
    assert decoder.startswith("SNR of decoder.logits is ")
    assert agreement.startswith("agreement on the next token is 0")
    assert mean(quality.results["answers"], "kl_divergence") > 0.001, (
        "random weights give nearly even odds, so noise moves them little"
    )


@pytest.mark.parametrize("submodel", ["unet", "vae_decoder"])
def test_numbers_that_are_none(drawing: LoadedModel, drawn: Samples, submodel: str) -> None:
    with pytest.raises(EngineError, match=submodel):
        measure(spoilt(drawing, submodel, nothing), drawing, drawn, EFFORT)


def test_logits_that_are_none(talking: LoadedModel, said: Samples) -> None:
    with pytest.raises(EngineError, match="decoder"):
        measure(spoilt(talking, "decoder", nothing), talking, said, EFFORT)


def test_what_was_not_measured_falls_short(drawing: LoadedModel, drawn: Samples) -> None:
    quality, _ = measure(drawing, drawing, {**drawn, "vae_decoder": []}, EFFORT)
    assert quality.submodels[2].calls == 0
    assert quality.shortfalls("int8") == ["vae_decoder: was not measured, no call of it was captured"]


def test_models_of_different_sources(drawing: LoadedModel, talking: LoadedModel) -> None:
    with pytest.raises(BundleError, match="not of the same checkpoint"):
        measure(drawing, talking, {}, EFFORT)


def test_the_samples_are_scored(vlm_bundle: Path) -> None:
    heard: list[Position] = []
    for model in loaded(vlm_bundle):
        with listening(heard.append):
            quality, _ = measure(model, model, {}, Effort(questions=1, cases=4))
    assert outer(heard)[-4:] == [f"case {number} of 4" for number in (1, 2, 3, 4)]
    assert quality.summary()["quantized_right"] == quality.summary()["reference_right"] >= 0.75
    assert quality.task is not None
    assert (quality.task.task, quality.task.cases) == ("held-out questions answered right", 4)
    assert 3 <= quality.task.reference_right == quality.task.quantized_right


def test_floors() -> None:
    every = floors("int8") + floors("int4")
    assert len(every) == 8 and floors("none") == floors("int8-naive") == []
    assert floors("auto") == floors("int4")
    assert all(floor.reason.startswith(("Noise", "Lower than at int8", "That is noise")) for floor in every), (
        "figures of builds go stale"
    )
    for int8, int4 in zip(floors("int8"), floors("int4"), strict=True):
        assert int8.measure == int4.measure and int8.least > int4.least


def test_stored_and_read(drawing: LoadedModel, drawn: Samples, tmp_path: Path) -> None:
    root = shutil.copytree(drawing.bundle.root, tmp_path / "bundle")
    quality, pictures = measure(drawing, drawing, drawn, EFFORT)
    save_quality(root, quality, pictures)
    assert load_quality(Bundle(root)) == quality
    assert {f"{FOLDER}/{path.name}" for path in (root / FOLDER).iterdir()} == {QUALITY, *pictures}
    assert all(np.array_equal(decode_image((root / path).read_bytes()), picture) for path, picture in pictures.items())
    other = {**json.loads((root / QUALITY).read_bytes()), "what a later version adds": 1}
    other |= other.pop("results")  # as earlier versions wrote it
    for one in other["pictures"]:
        del one["gmsd"]
        one["reference_seconds"] = 1.5
    (root / QUALITY).write_text(json.dumps(other))
    earlier = load_quality(Bundle(root))
    assert (
        [one.gmsd for one in earlier.results["pictures"]] == [None, None]
        and "gmsd" not in earlier.summary()
        and earlier.speed is None
    )
    damaged = json.loads((root / QUALITY).read_bytes())
    damaged["pictures"][0]["reference"] = "../outside.png"
    (root / QUALITY).write_text(json.dumps(damaged))
    with pytest.raises(BundleError, match="no path inside the bundle"):
        load_quality(Bundle(root))


@pytest.mark.parametrize(
    ("quant", "message"),
    [("none", "not quantized"), ("int8", "enginecast build SOURCE --quality full --quant int8 --output")],
)
def test_no_quality(tiny_bundle: Path, tmp_path: Path, quant: str, message: str) -> None:
    manifest = json.loads((tiny_bundle / MANIFEST).read_bytes())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "quant": quant}))
    with pytest.raises(NotFound, match=message):
        load_quality(Bundle(tmp_path))
