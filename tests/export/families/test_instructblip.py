"""InstructBLIP answers like transformers' own InstructBlipForConditionalGeneration, token for token."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from export.build.build import _parity, build
from export.build.options import Options
from export.build.state import Build
from runtime.errors import ContextLengthExceeded, InvalidInput, SourceError
from runtime.language.text import Message
from runtime.pipelines.chat import ChatPipeline
from runtime.placing.loading import load_model
from runtime.tasks.chat import ChatRequest
from tests.export.families.blip import QUERIES, ask, library, library_answer, opened
from tests.export.families.conftest import PICTURE, answer, refused

TARGETS = ("onnxruntime", "openvino")
QUESTION = "how many shapes are there?"


@pytest.fixture(
    scope="module", params=["tiny_instructblip", pytest.param("tiny_instructblip_t5", marks=pytest.mark.full)]
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with each kind of language model, and its bundle."""
    source: Path = request.getfixturevalue(request.param)
    output = tmp_path_factory.mktemp("instructblip") / "bundle"
    build(Options(str(source), output, targets=TARGETS, quality="none"))
    return source, output


@pytest.mark.parametrize("target", TARGETS)
def test_answers_are_the_library_s(model: tuple[Path, Path], target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, bundle = model
    with closing(load_model(bundle, target)) as loaded:
        assert isinstance(loaded.pipeline, ChatPipeline)
        answers = set()
        for text in (QUESTION, "", "what colour?"):
            for beams in (1, 4):
                prompt, wanted = library_answer(source, text, max_new_tokens=64, num_beams=beams)
                request = ask(text, max_tokens=64, beams=beams)
                assert loaded.pipeline.prompt(request).ids == prompt
                assert answer(loaded, request, monkeypatch) == wanted, (text, beams)
                answers.add(tuple(wanted))
        assert len(answers) > 3 and len({token for tokens in answers for token in tokens}) > 6


def test_every_submodel_computes_what_the_library_computes(model: tuple[Path, Path]) -> None:
    state = Build.open(Options(str(model[0]), model[0].with_name("other"), targets=("onnxruntime",)))
    assert [part.name for part in state.parts][:2] == ["vision_encoder", "qformer"]
    assert all(_parity(state, part).error < 1e-4 for part in state.parts)


def test_the_instruction_is_in_tokens_of_its_own(tiny_instructblip: Path, tmp_path: Path) -> None:
    """All texts of the conversation, as the library's processor has them; pictures of other instructions differ."""
    pipeline = opened(tiny_instructblip, tmp_path)
    processor = library(tiny_instructblip)[1]
    for text in (QUESTION, "", "quel \u00e9t\u00e9 \U0001f600 \u6f22?"):  # with letters that the vocabulary lacks
        wanted = processor(images=Image.fromarray(PICTURE), text=text)
        prompt = pipeline.prompt(ask(text))
        assert (prompt.ids, list(prompt.instruction)) == (wanted["input_ids"][0], wanted["qformer_input_ids"][0])
    turns = Message("user", (PICTURE, "a")), Message("assistant", ("b",)), Message("user", ("c",))
    found = pipeline.prompt(ChatRequest(turns))
    assert list(found.instruction) == processor.qformer_tokenizer("a b c")["input_ids"]
    other = pipeline.prompt(ask("b"))
    assert found.keys[:QUERIES] != other.keys[:QUERIES] and found.ids[:QUERIES] == other.ids[:QUERIES]
    assert not pipeline.prompt(ChatRequest((Message("user", ("a",)),))).instruction
    alone = pipeline.prompt(ChatRequest((Message("user", (PICTURE,)),)))
    assert alone.keys == pipeline.prompt(ask("A short image description.")).keys


def test_an_instruction_that_the_encoder_cannot_read_is_refused(tiny_instructblip: Path, tmp_path: Path) -> None:
    pipeline = opened(tiny_instructblip, tmp_path)
    with pytest.raises(
        ContextLengthExceeded, match="messages: their texts have 102 tokens for the encoder of pictures"
    ):
        pipeline(ask("a " * 100))
    with pytest.raises(InvalidInput, match=r"messages: contains \[SEP\], a special token"):
        pipeline(ask("what is a [SEP]?"))


def test_turns_that_the_encoder_cannot_read_are_left_out_where_they_may(
    tiny_instructblip: Path, tmp_path: Path
) -> None:
    pipeline = opened(tiny_instructblip, tmp_path)
    turns = Message("user", ("a " * 60,)), Message("assistant", ("b",)), Message("user", (PICTURE, "c " * 60))
    with pytest.raises(ContextLengthExceeded, match="for the encoder of pictures"):
        pipeline(ChatRequest(turns, max_tokens=4))
    fitted = pipeline.fitted(ChatRequest(turns, max_tokens=4, context_overflow="slide"))
    assert fitted.left_out == 2 and fitted.ids == pipeline.prompt(ChatRequest(turns[2:])).ids


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config": {"model_type": "opt"}}, "text_config.model_type) is a opt, expected one of llama"),
        ({"qformer_config": {"hidden_act": "swish2"}}, "qformer_config.hidden_act is 'swish2'"),
        ({"qformer_config": {"position_embedding_type": "relative_key"}}, "position_embedding_type is 'relative_key'"),
        ({"qformer_config": {"vocab_size": 30}}, "embeddings for ids below 30"),
        ({"qformer_config": {"hidden_size": 32}}, "the weights in"),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    tiny_instructblip: Path, tmp_path: Path, changes: dict[str, dict[str, Any]], words: str
) -> None:
    source, message = refused(tiny_instructblip, tmp_path, changes)
    assert words in message and str(source) in message


def test_a_checkpoint_without_the_tokenizer_of_instructions_is_refused(tiny_instructblip: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_instructblip, tmp_path / "source"))
    shutil.rmtree(source / "qformer_tokenizer")
    with pytest.raises(SourceError, match="qformer_tokenizer has no tokenizer, none of"):
        build(Options(str(source), tmp_path / "bundle", targets=("onnxruntime",)))
