"""BLIP-2 answers like transformers' own Blip2ForConditionalGeneration, token for token."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import enginecast
from export.build.build import _parity, build
from export.build.options import Options
from export.build.state import Build
from runtime.engine import Slot, SlotCall
from runtime.errors import InvalidInput, SourceError, UnsupportedModel
from runtime.language.text import Message
from runtime.pipelines.chat import ChatPipeline
from runtime.placing.loading import load_model
from runtime.tasks.chat import ChatRequest
from tests.export.families.blip import QUERIES, ask, library, library_answer, library_answers, opened, save
from tests.export.families.conftest import PICTURE, answer

TARGETS = ("onnxruntime", "openvino")
EMULATED = ("cuda", "directml")
"""Targets whose artifacts a build compares with the graph here, since something computes them."""
QUESTION = "Question: how many shapes are there? Answer:"


@pytest.fixture(scope="module", params=["tiny_blip2", "tiny_blip2_t5"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with each kind of language model, and its bundle."""
    source: Path = request.getfixturevalue(request.param)
    output = tmp_path_factory.mktemp("blip2") / "bundle"
    build(Options(str(source), output, targets=(*TARGETS, *EMULATED), quality="none"))
    return source, output


@pytest.mark.parametrize("target", TARGETS)
def test_answers_are_the_library_s(model: tuple[Path, Path], target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, bundle = model
    with closing(load_model(bundle, target)) as loaded:
        assert isinstance(loaded.pipeline, ChatPipeline)
        for text in (QUESTION, "", "a photo of"):  # several, since engines may keep what depends on no input
            for beams in (1, 4):
                prompt, wanted = library_answer(source, text, max_new_tokens=64, num_beams=beams)
                request = ask(text, max_tokens=64, beams=beams)
                assert loaded.pipeline.prompt(request).ids == prompt
                assert answer(loaded, request, monkeypatch) == wanted and len(set(wanted)) > 3, (text, beams)


@pytest.mark.parametrize("target", TARGETS)
def test_several_answers_are_the_library_s(model: tuple[Path, Path], target: str) -> None:
    settings = {"max_new_tokens": 24, "num_beams": 4, "num_return_sequences": 3}
    wanted = library_answers(model[0], QUESTION, **settings)[1]
    decode = library(model[0])[1].tokenizer.decode
    with enginecast.load(model[1], target=target) as loaded:
        found = loaded.chat(QUESTION, [PICTURE], max_tokens=24, beams=4, answers=3)
        drawn = loaded.chat(QUESTION, [PICTURE], max_tokens=24, temperature=2.0, seed=1, answers=2)
        assert loaded.chat(QUESTION, [PICTURE], max_tokens=24, temperature=2.0, seed=2).choices == drawn.choices[1:]
    assert [one.text for one in found.choices] == [decode(tokens, skip_special_tokens=True) for tokens in wanted]
    assert found.text == found.choices[0].text and len({one.text for one in found.choices}) == 3


def test_a_caption_is_the_answer_to_a_picture_alone(model: tuple[Path, Path]) -> None:
    with enginecast.load(model[1], target="onnxruntime") as loaded:
        first, second = loaded.captions([PICTURE, 255 - PICTURE], max_tokens=12, beams=4)
    prompt, wanted = library_answer(model[0], "", max_new_tokens=12, num_beams=4)
    assert first.text == library(model[0])[1].tokenizer.decode(wanted, skip_special_tokens=True)
    assert first.prompt_tokens == second.prompt_tokens == len(prompt) and first.text


def test_every_submodel_computes_what_the_library_computes(model: tuple[Path, Path]) -> None:
    state = Build.open(Options(str(model[0]), model[0].with_name("other"), targets=("onnxruntime",)))
    encoder = ["text_encoder"] if state.family.pipeline_of(state.source) == "seq2seq" else []
    names = ["vision_encoder", "qformer", "token_embedding", *encoder, "decoder"]
    assert [part.name for part in state.parts] == names
    assert all(_parity(state, part).error < 1e-4 for part in state.parts)


def test_prompts_of_other_lengths_are_not_stacked(model: tuple[Path, Path]) -> None:
    """Calls that run together give what each gives alone, with keys and values of an encoder of any length."""
    with closing(load_model(model[1], "onnxruntime")) as loaded:
        engine, rng = loaded.engines["decoder"], np.random.default_rng(0)
        signature = engine.submodel.signature
        lengths = [signature.decoder.lengths(past, 1) | {"source": source} for past, source in ((0, 5), (0, 8))]
        calls = [signature.sample_call(each, rng) for each in lengths]
        steps = [signature.sample_call(signature.decoder.lengths(1, 1) | {"source": 5 + 3 * i}, rng) for i in (0, 1)]
        alone, together = [Slot(), Slot()], [Slot(), Slot()]
        for slots in (alone, together):
            for call, slot in zip(calls, slots, strict=True):
                engine.run(call, slot)
        wanted = [engine.run(step, slot) for step, slot in zip(steps, alone, strict=True)]
        found = engine.run_many([SlotCall(*call) for call in zip(steps, together, strict=True)])
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one["logits"], other["logits"], atol=1e-4)


def test_an_older_checkpoint_has_its_queries_in_front(tmp_path: Path) -> None:
    """Their placeholder is the token that the library's processor adds."""
    source = save(tmp_path / "older", image_token=None)
    processor = library(source)[1]
    ids = processor(images=Image.fromarray(PICTURE), text=QUESTION)["input_ids"][0]
    assert opened(source, tmp_path / "root").prompt(ask(QUESTION)).ids == ids and ids[:7] == [406] * QUERIES + [1]


def test_texts_follow_one_another_and_one_picture_is_shown(tiny_blip2: Path, tmp_path: Path) -> None:
    pipeline = opened(tiny_blip2, tmp_path)
    messages = Message("user", (PICTURE, "a")), Message("assistant", ("b",)), Message("user", ("c",))
    ids = pipeline.prompt(ChatRequest(messages)).ids
    assert ids == [4] * QUERIES + pipeline.text.tokenizer.encode("a b c").ids
    two = Message("user", (PICTURE, "a", PICTURE))
    with pytest.raises(InvalidInput, match="messages: show 2 pictures, a prompt of this model takes 1: ask about"):
        pipeline(ChatRequest((two,)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config": {"model_type": "gpt2"}}, "text_config.model_type) is a gpt2, expected one of"),
        ({"text_config": {"model_type": "bart"}}, "text_config.model_type) is a bart, expected one of t5"),
        ({"text_config": {"word_embed_proj_dim": 32}}, "word_embed_proj_dim is 32, expected 64"),
        ({"text_config": {"activation_function": "swish2"}}, "text_config.hidden_act is 'swish2'"),
        ({"qformer_config": {"hidden_act": "swish2"}}, "qformer_config.hidden_act is 'swish2'"),
        ({"vision_config": {"image_size": [24, 24]}}, "vision_config.image_size is [24, 24], expected a whole number"),
        (
            {"vision_config": {"num_attention_heads": 5}},
            "vision_config.num_attention_heads is 5, expected a divisor of 64",
        ),
        ({"qformer_config": {"_attn_implementation": "linear"}}, "qformer_config._attn_implementation is 'linear'"),
        ({"qformer_config": {"num_attention_heads": 5}}, "qformer_config.num_attention_heads is 5, expected a divisor"),
        ({"qformer_config": {"position_embedding_type": "relative_key"}}, "position_embedding_type is 'relative_key'"),
        ({"qformer_config": {"cross_attention_frequency": 0}}, "cross_attention_frequency is 0, expected 1 or more"),
        ({"": {"num_query_tokens": 0}}, "num_query_tokens is 0, expected 1 or more"),
        ({"": {"image_token_index": 7}}, "image_token_index is 7, the tokenizer has <image> as 4"),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    tiny_blip2: Path, tmp_path: Path, changes: dict[str, dict[str, Any]], words: str
) -> None:
    source, reports = Path(shutil.copytree(tiny_blip2, tmp_path / "source")), list[object]()
    config = json.loads((source / "config.json").read_bytes())
    for part, values in changes.items():
        (config[part] if part else config).update(values)
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises((SourceError, UnsupportedModel)) as caught:
        build(Options(str(source), tmp_path / "bundle", targets=("onnxruntime",)), reports.append)
    assert words in str(caught.value) and str(source / "config.json") in str(caught.value) and not reports
