"""Answers about pictures with fewer positions, by a whole pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.bundle.signature import Array
from runtime.engine import FakeEngine, Slot
from runtime.errors import ContextLengthExceeded, InvalidInput
from runtime.language.decoder import Conversation
from runtime.language.pruning import diverse
from runtime.language.text import Message
from runtime.pipeline import Room, drive
from runtime.pipelines.chat import ChatPipeline
from runtime.tasks.chat import ChatRequest, Finished
from tests.runtime.pipelines import test_chat as tiny

REQUEST = ChatRequest(tiny.CONVERSATIONS["picture"], max_tokens=8, picture_tokens=4)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.build_model()


@pytest.fixture
def engines(model: Any) -> dict[str, FakeEngine]:
    return tiny.build_engines(model)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_bundle(tmp_path_factory.mktemp("tiny"), tiny.build_processor(), tiny.CONFIG.model_dump()).root


@pytest.fixture
def chat(root: Path) -> ChatPipeline:
    return ChatPipeline(root, tiny.CONFIG.model_dump())


def ask(chat: ChatPipeline, engines: dict[str, FakeEngine], request: ChatRequest, *held: Conversation) -> Any:
    return tiny.answer(drive(chat(request, *held), engines))


@torch.inference_mode()
def library_tokens(model: Any, chat: ChatPipeline, request: ChatRequest) -> Iterator[int]:
    """Of the library's model, which reads all of prompt and answer for each token: the prompt's embeddings without
    those that are pruned, and without the numbers of their places.
    """
    whole = chat.prompt(replace(request, picture_tokens=0))
    embeds = model.get_input_embeddings()(torch.tensor(whole.ids))
    spots = np.flatnonzero(np.array(whole.ids) == tiny.IMAGE).reshape(len(whole.images), -1)
    places = set(range(len(whole.ids)))
    for own, picture in zip(spots, whole.images, strict=True):
        assert chat.vision
        pixels = torch.from_numpy(chat.vision.layout.tiles(picture, ""))
        features = model.model.get_image_features(pixels).pooler_output[0]
        embeds[own] = features
        places -= set(np.delete(own, diverse(features.numpy(), request.picture_tokens)))
    kept = sorted(places)
    embeds = embeds[kept]
    for _ in range(request.max_tokens or 0):
        outputs = model.model.language_model(
            inputs_embeds=embeds[None], position_ids=torch.tensor([kept]), attention_mask=torch.ones(1, len(kept))
        )
        token = int(model.lm_head(outputs.last_hidden_state[0, -1]).argmax())
        yield token
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([token]))])
        kept.append(kept[-1] + 1)


@pytest.mark.parametrize(("name", "most", "chunk"), [("pictures", 1, 7), ("turns", 7, 0)])
def test_answers_are_those_of_the_library_about_the_same_positions(
    chat: ChatPipeline, engines: dict[str, FakeEngine], model: Any, name: str, most: int, chunk: int
) -> None:
    request = replace(REQUEST, messages=tiny.CONVERSATIONS[name], picture_tokens=most)
    chat.config = chat.config.model_copy(update={"prefill_chunk": chunk, "eos_token_ids": ()})
    text, finished = ask(chat, engines, request)
    assert text == chat.text.tokenizer.decode(list(library_tokens(model, chat, request)))
    count = len(request.images)
    assert finished.prompt_tokens == len(chat.prompt(replace(request, picture_tokens=0)).ids) - count * (
        tiny.TOKENS - most
    )


def test_a_picture_that_has_no_more_positions_is_whole(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    whole, same = (replace(REQUEST, picture_tokens=most) for most in (0, tiny.TOKENS))
    assert chat.prompt(whole).keys == chat.prompt(same).keys
    assert ask(chat, engines, whole) == ask(chat, engines, same)


def test_a_picture_is_encoded_once_for_all_numbers_of_positions(
    chat: ChatPipeline, engines: dict[str, FakeEngine]
) -> None:
    chat.remember(Room(features=1 << 20))
    said = [ask(chat, engines, replace(REQUEST, picture_tokens=most)) for most in (0, 4, 8, 4)]
    assert len(engines["vision_encoder"].calls) == 1 and said[1] == said[3]
    assert len({text for text, _ in said}) == 3


def test_what_the_decoder_holds_of_a_pruned_picture_is_none_of_a_whole_one(
    chat: ChatPipeline, engines: dict[str, FakeEngine], root: Path
) -> None:
    chat.remember(Room(prefixes=1 << 20, position=1))
    turns = (*tiny.CONVERSATIONS["turns"][:3], tiny.user("and what else is there to be seen?"))
    asked = [replace(REQUEST, messages=turns, picture_tokens=most) for most in (5, 0, 6, 5)]
    fresh = [tiny.answer(drive(ChatPipeline(root, chat.config.model_dump())(one), engines)) for one in asked]
    found = [ask(chat, engines, one) for one in asked]
    assert found == fresh
    before = chat.prompt(asked[0]).ids.index(tiny.IMAGE)
    assert [end.reused_tokens for _, end in found] == [0, before, before, len(chat.prompt(asked[3]).ids) - 1]


@pytest.mark.parametrize("options", [{"beams": 2}, {"temperature": 1.5, "answers": 2, "seed": 3}])
def test_a_conversation_goes_on_behind_a_pruned_picture(
    chat: ChatPipeline, engines: dict[str, FakeEngine], options: dict[str, Any]
) -> None:
    """Read from where it ended, it gets the answer that it gets read from its beginning, however answers are found."""
    conversation, first = Conversation(), replace(REQUEST, max_tokens=4, **options)
    list(drive(chat(first, conversation), engines))
    further = (Message("assistant", ("it is a cat",)), tiny.user("and", tiny.picture(5), "?"))
    second = replace(first, messages=(*first.messages, *further))
    engines["vision_encoder"].calls.clear()
    found = list(drive(chat(second, conversation), engines))
    assert [len(call["pixel_values"]) for call in engines["vision_encoder"].calls] == [1]
    assert found == list(drive(chat(second), engines))
    end = found[-1]
    assert isinstance(end, Finished) and end.reused_tokens > 16


class Verifying(tiny.TorchDecoder):
    """Runs the positions of a call one by one, and so has the logits of all of them."""

    def run_last(self, inputs: Mapping[str, Array], slot: Slot, count: int) -> dict[str, Array]:
        (_, new), total = inputs["position_ids"].shape, inputs["attention_mask"].shape[1]
        logits = [
            self.run(
                {
                    "inputs_embeds": inputs["inputs_embeds"][:, at : at + 1],
                    "attention_mask": inputs["attention_mask"][:, : total - new + at + 1],
                    "position_ids": inputs["position_ids"][:, at : at + 1],
                },
                slot,
            )["logits"]
            for at in range(new)
        ]
        return {"logits": np.concatenate(logits, axis=1)[:, -count:]}


def test_guesses_do_not_change_an_answer(chat: ChatPipeline, engines: dict[str, FakeEngine], model: Any) -> None:
    said, end = ask(chat, engines, REQUEST)
    guessing = replace(REQUEST, prediction=said, lookup_tokens=3)
    again, guessed = ask(chat, engines | {"decoder": Verifying(model)}, guessing)
    assert again == said and guessed == replace(end, guessed_tokens=0) and guessed.accepted_tokens > 0


def test_the_context_counts_pictures_whole(chat: ChatPipeline) -> None:
    """Since the numbers of places do."""
    many = ChatRequest((tiny.user(*map(tiny.picture, range(30))),), picture_tokens=1)
    with pytest.raises(ContextLengthExceeded, match=r"\(270 of them for 30 pictures, which count whole\).* 256"):
        chat(many)
    length = len(chat.prompt(replace(REQUEST, picture_tokens=0)).ids)
    room = replace(REQUEST, max_tokens=tiny.CONTEXT - length)
    chat(room).close()
    with pytest.raises(ContextLengthExceeded, match=f"max_tokens: .* has {length} tokens"):
        chat(replace(room, max_tokens=tiny.CONTEXT - length + 1))
    spare = (tiny.user("x" * 60), Message("assistant", ("y" * 60,)))
    long = replace(REQUEST, messages=(*REQUEST.messages, Message("assistant", ("a",)), *spare, *spare, tiny.user("?")))
    slid = replace(long, context_overflow="slide")
    slid = [replace(long, context_overflow="slide", picture_tokens=most) for most in (4, 0)]
    assert [chat.fitted(one).left_out for one in slid] == [2, 2]


@pytest.mark.parametrize("most", [-1, 65_537])
def test_a_number_out_of_range_is_refused(most: int) -> None:
    with pytest.raises(InvalidInput, match=f"picture_tokens: is {most}, expected 0 to 65536"):
        replace(REQUEST, picture_tokens=most)


def test_models_whose_pictures_have_no_places_refuse_it(root: Path) -> None:
    queries = tiny.CONFIG.model_copy(update={"encoders": ("vision_encoder", "qformer")})
    blind = tiny.CONFIG.model_copy(update={"image_token_id": None, "tokens_per_image": 0})
    for config, words in ((queries, "this one's qformer sums every picture up in 9 positions"), (blind, "no vision")):
        chat, request = ChatPipeline(root, config.model_dump()), replace(REQUEST, messages=tiny.CONVERSATIONS["text"])
        with pytest.raises(InvalidInput, match=f"picture_tokens: .*{words}.*: leave it out"):
            chat(request)
        chat(replace(request, picture_tokens=0)).close()
