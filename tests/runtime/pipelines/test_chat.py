"""Answers equal transformers' generate; what can be wrong with a request is found before any engine runs."""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from runtime.bundle.manifest import MANIFEST, Bundle, Manifest, Source
from runtime.bundle.signature import Array
from runtime.engine import FakeEngine, Slot
from runtime.errors import BundleError, ContextLengthExceeded, InvalidInput
from runtime.language.config import ChatConfig
from runtime.language.decoder import Conversation
from runtime.language.sampling import Beams
from runtime.language.text import ChatText, Message
from runtime.pipeline import Call, Event, Reused, Room, drive
from runtime.pipelines.chat import ChatPipeline
from runtime.tasks.chat import ChatDefaults, ChatRequest, Finished, TextDelta
from runtime.vision.images import Picture

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
UNK, BOS, EOS, PAD, IMAGE = range(5)
EDGE, PATCH = 24, 8
TOKENS = (EDGE // PATCH) ** 2
CONTEXT = 256
SAMPLE = Path(__file__).parents[3] / "samples" / "shapes-vlm"
TEMPLATE = """\
{%- for message in messages -%}
    {{- message.role.upper() }}:
    {%- for part in message.content %}{{ '<image>' if part.type == 'image' else ' ' + part.text | trim }}{% endfor -%}
    {{- eos_token if message.role == 'assistant' else ' ' -}}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt -}}
"""


def build_processor() -> LlavaProcessor:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*SPECIALS, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE})
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        images,
        fast,
        patch_size=PATCH,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
    )


def build_model() -> Any:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = LlamaConfig(
        **small, vocab_size=264, num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.5,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    vision = CLIPVisionConfig(**small, image_size=EDGE, patch_size=PATCH, initializer_factor=5.0)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )
    model: Any = LlavaForConditionalGeneration(config)
    return model.eval()


class TorchDecoder(FakeEngine):
    """A decoder with its caches by slot, as an engine has them."""

    def __init__(self, model: Any) -> None:
        super().__init__(lambda inputs: {})
        self.model = model
        self.caches: WeakKeyDictionary[Slot, DynamicCache] = WeakKeyDictionary()

    def run(self, inputs: Mapping[str, Array], slot: Slot | None = None) -> dict[str, Array]:
        self.calls.append(dict(inputs))
        assert slot is not None
        cache = self.caches.setdefault(slot, DynamicCache())
        length = inputs["inputs_embeds"].shape[1]
        assert inputs["attention_mask"].shape[1] == cache.get_seq_length() + length
        with torch.inference_mode():
            hidden = self.model.model.language_model(
                **torched(inputs), past_key_values=cache, use_cache=True
            ).last_hidden_state
            return {"logits": self.model.lm_head(hidden[:, -1:]).float().numpy()}

    def copy(self, slot: Slot, to: Slot) -> None:
        assert to not in self.caches
        self.caches[to] = copy.deepcopy(self.caches[slot])

    def trim(self, slot: Slot, length: int) -> None:
        cache = self.caches[slot]
        assert length <= cache.get_seq_length()
        if length < cache.get_seq_length():
            cache.crop(length - cache.get_seq_length())


def torched(inputs: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def build_engines(model: Any) -> dict[str, FakeEngine]:
    @torch.inference_mode()
    def see(inputs: Mapping[str, Array]) -> dict[str, Array]:
        features = model.model.get_image_features(torch.from_numpy(inputs["pixel_values"])).pooler_output
        return {"image_features": torch.stack(list(features)).numpy()}

    @torch.inference_mode()
    def embed(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"inputs_embeds": model.get_input_embeddings()(torch.from_numpy(inputs["input_ids"])).numpy()}

    return {"vision_encoder": FakeEngine(see), "token_embedding": FakeEngine(embed), "decoder": TorchDecoder(model)}


CONFIG = ChatConfig(
    context_length=CONTEXT,
    vocab_size=264,
    hidden_size=32,
    bos_token_id=BOS,
    eos_token_ids=(EOS,),
    image_token_id=IMAGE,
    tokens_per_image=TOKENS,
    defaults=ChatDefaults(max_tokens=12),
)


def write_bundle(root: Path, processor: LlavaProcessor, config: Mapping[str, Any]) -> Bundle:
    root.mkdir(parents=True, exist_ok=True)
    for folder in ("tokenizer", "preprocessor"):
        processor.save_pretrained(root / folder)
    source = Source(name="tiny", family="llava", architecture="LlavaForConditionalGeneration", fingerprint="")
    manifest = Manifest(
        name="tiny",
        key="none",
        pipeline="chat",
        task="chat",
        quant="none",
        source=source,
        submodels=(),
        artifacts=(),
        config=config,
        versions={},
        files={},
    )
    (root / MANIFEST).write_text(manifest.model_dump_json())
    return Bundle(root)


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model()


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return build_processor()


@pytest.fixture
def engines(model: Any) -> dict[str, FakeEngine]:
    return build_engines(model)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, processor: LlavaProcessor) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("tiny"), processor, CONFIG.model_dump())


@pytest.fixture(scope="module")
def chat(bundle: Bundle) -> ChatPipeline:
    return ChatPipeline(bundle.root, bundle.manifest.config)


def picture(seed: int, height: int = 30, width: int = 41) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def user(*parts: str | Picture) -> Message:
    return Message("user", parts)


CONVERSATIONS = {
    "text": (user("hello"),),
    "picture": (user(picture(0), "what is this?"),),
    "pictures": (user("left", picture(1), "right", picture(2, 60, 20)),),
    "turns": (
        Message("system", ("be brief",)),
        user(picture(3), "what?"),
        Message("assistant", ("a cat",)),
        user(picture(4), "é 😀"),
    ),
}


def expected(model: Any, processor: LlavaProcessor, request: ChatRequest, **options: Any) -> tuple[str, list[int], int]:
    """What transformers answers: text, tokens and the number of prompt tokens."""
    tokens, length = transformers_tokens(model, processor, request, **options)
    answer = tokens[0].tolist()
    return processor.tokenizer.decode(answer, skip_special_tokens=True), answer, length


def transformers_tokens(
    model: Any, processor: LlavaProcessor, request: ChatRequest, **options: Any
) -> tuple[torch.Tensor, int]:
    """The tokens [answers, length] of transformers' generate, and the number of prompt tokens."""
    messages: list[Any] = [
        {
            "role": m.role,
            "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in m.content],
        }
        for m in request.messages
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [Image.fromarray(image) for image in request.images] or None
    inputs = processor(images=images, text=prompt, add_special_tokens=False, return_tensors="pt")
    bos = processor.tokenizer.bos_token_id
    inputs["input_ids"] = torch.cat([torch.tensor([[bos]]), inputs["input_ids"]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in inputs}
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=request.max_tokens, **options)
    length = inputs["input_ids"].shape[1]
    return tokens[:, length:], length


def answer(events: Iterator[Event]) -> tuple[str, Finished]:
    *deltas, finished = (event for event in events if not isinstance(event, Reused))
    assert all(isinstance(delta, TextDelta) for delta in deltas) and isinstance(finished, Finished)
    first = deltas[:1]  # its token may be a part of a character
    assert all(delta.text for delta in deltas[1:]) and all(delta.text or delta.tokens == 1 for delta in first)
    return "".join(delta.text for delta in deltas if isinstance(delta, TextDelta)), finished


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("chunk", [0, 7])
def test_greedy_answers_equal_transformers(
    chat: ChatPipeline,
    engines: dict[str, FakeEngine],
    model: Any,
    processor: LlavaProcessor,
    name: str,
    penalty: float,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat, "config", chat.config.model_copy(update={"prefill_chunk": chunk}))
    request = ChatRequest(CONVERSATIONS[name], max_tokens=24, repetition_penalty=penalty)
    text, tokens, length = expected(model, processor, request, repetition_penalty=penalty)
    said, finished = answer(drive(chat(request), engines))
    assert said == text
    assert (finished.prompt_tokens, finished.completion_tokens) == (length, len(tokens))
    assert finished.reason == ("stop" if tokens[-1] == EOS else "length")
    assert len(engines["vision_encoder"].calls) == bool(request.images)
    steps = -(-length // chunk) if chunk else 1
    assert len(engines["decoder"].calls) == steps + len(tokens) - 1


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("settings", [{}, {"length_penalty": 3.0, "repetition_penalty": 1.2}])
def test_answers_of_several_beams_equal_transformers(
    chat: ChatPipeline,
    engines: dict[str, FakeEngine],
    model: Any,
    processor: LlavaProcessor,
    name: str,
    settings: dict[str, float],
) -> None:
    request = ChatRequest(CONVERSATIONS[name], max_tokens=12, beams=3, **settings)  # type: ignore[arg-type]
    text, tokens, length = expected(model, processor, request, num_beams=3, **settings)
    greedy = expected(model, processor, request, **{"repetition_penalty": 1.0} | settings | {"length_penalty": 1.0})[1]
    events = list(drive(chat(request), engines))
    assert answer(iter(events)) == (text, Finished("stop" if tokens[-1] == EOS else "length", length, len(tokens)))
    assert len(events) == 2 and tokens != greedy


@pytest.mark.parametrize("name", ["text", "turns"])
def test_several_answers_are_the_best_beams_of_transformers(
    chat: ChatPipeline, engines: dict[str, FakeEngine], model: Any, processor: LlavaProcessor, name: str
) -> None:
    request = ChatRequest(CONVERSATIONS[name], max_tokens=12, beams=4, answers=3)
    wanted = transformers_tokens(model, processor, request, num_beams=4, num_return_sequences=3)[0].tolist()
    events = list(drive(chat(request), engines))
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert [(one.answer, one.text) for one in deltas] == [
        (number, processor.tokenizer.decode(tokens, skip_special_tokens=True)) for number, tokens in enumerate(wanted)
    ]
    ends = [event for event in events if isinstance(event, Finished)]
    counts = [tokens.index(EOS) + 1 if EOS in tokens else len(tokens) for tokens in wanted]
    assert [(one.answer, one.completion_tokens) for one in ends] == list(enumerate(counts)) and len(ends) == 3
    assert [one.reason for one in ends] == ["stop" if EOS in tokens else "length" for tokens in wanted]


def test_several_answers_are_drawn_one_by_one(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    """The n-th is that of a request for one with the seed + n; the prompt is read once, and the conversation keeps it
    alone.
    """
    one = ChatRequest(CONVERSATIONS["picture"], max_tokens=9, temperature=1.5, seed=3)
    conversation = Conversation()
    events = list(drive(chat(replace(one, answers=3), conversation), engines))
    assert sum(call["inputs_embeds"].shape[1] > 1 for call in engines["decoder"].calls) == 1
    ends = [event for event in events if isinstance(event, Finished)]
    assert len(conversation.held) == ends[0].prompt_tokens and [end.answer for end in ends] == [0, 1, 2]
    for number, end in enumerate(ends):
        text, finished = answer(drive(chat(replace(one, seed=3 + number)), engines))
        said = [event.text for event in events if isinstance(event, TextDelta) and event.answer == number]
        assert ("".join(said), end) == (text, replace(finished, answer=number))
    assert answer(drive(chat(one, conversation), engines)) == answer(drive(chat(one), engines))


def test_several_answers_without_a_temperature_are_equal(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    one = ChatRequest(CONVERSATIONS["text"], max_tokens=6, logprobs=1)
    expected = list(drive(chat(one), engines))
    calls = sum(len(engine.calls) for engine in engines.values())
    events = list(drive(chat(replace(one, answers=3)), engines))
    assert sum(len(engine.calls) for engine in engines.values()) == 2 * calls  # computed once
    size = len(expected)
    assert len(events) == 3 * size and isinstance(expected[-1], Finished)
    for number in range(3):
        found = events[number * size : (number + 1) * size]
        assert found == [replace(event, answer=number) for event in expected]  # type: ignore[type-var]
    tokens = [event.tokens for event in events if isinstance(event, TextDelta)]
    assert sum(tokens) == sum(event.tokens for event in expected if isinstance(event, TextDelta)), "counted once"


def test_the_model_s_number_of_answers_yields_to_what_a_request_says(chat: ChatPipeline) -> None:
    defaults = ChatDefaults(temperature=0.7, answers=4)
    request = ChatRequest(CONVERSATIONS["text"])
    assert request.count(defaults) == 4 and replace(request, answers=2).count(defaults) == 2
    assert replace(request, temperature=0.0).count(defaults) == 1
    assert replace(request, temperature=0.0, beams=3).count(defaults) == 3
    assert replace(request, temperature=0.0, answers=5).count(defaults) == 5
    with pytest.raises(InvalidInput, match="answers: is 5, and temperature 0 gives as many answers as beams, here 3"):
        replace(request, temperature=0.0, beams=3, answers=5).count(defaults)


def test_a_conversation_goes_on_behind_an_answer_of_several_beams(
    chat: ChatPipeline, engines: dict[str, FakeEngine]
) -> None:
    conversation, first = Conversation(), ChatRequest(CONVERSATIONS["picture"], max_tokens=8, beams=3)
    text, finished = answer(drive(chat(first, conversation), engines))
    assert len(conversation.held) == finished.prompt_tokens
    second = ChatRequest((*first.messages, Message("assistant", (text,)), user("and?")), max_tokens=8)
    for engine in engines.values():
        engine.calls.clear()
    assert answer(drive(chat(second, conversation), engines)) == answer(drive(chat(second), engines))
    fed = [call["inputs_embeds"].shape[1] for call in engines["decoder"].calls]
    assert fed[0] < max(fed[1:])


def test_a_stop_string_ends_a_beam(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    request = ChatRequest(CONVERSATIONS["text"], max_tokens=12, beams=3)
    text, _ = answer(drive(chat(request), engines))
    stopped, finished = answer(drive(chat(replace(request, stop=(text[3:5],))), engines))
    assert text[3:5] not in stopped and finished.reason == "stop"


def test_beams_come_from_the_model_unless_a_temperature_is_given(chat: ChatPipeline) -> None:
    defaults = ChatDefaults(beams=4, length_penalty=2.0, early_stopping="never")
    request = ChatRequest(CONVERSATIONS["text"])
    assert request.search(defaults) == Beams(4, 2.0, "never")
    assert replace(request, temperature=0.7).search(defaults).count == 1
    assert replace(request, beams=2, length_penalty=0.5).search(defaults) == Beams(2, 0.5, "never")
    with pytest.raises(InvalidInput, match=r"beams: .*send temperature 0"):
        replace(request, temperature=0.7, beams=2).search(defaults)


def test_the_end_token_stops_and_is_not_spelled(
    chat: ChatPipeline,
    engines: dict[str, FakeEngine],
    model: Any,
    processor: LlavaProcessor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = ChatRequest(CONVERSATIONS["picture"], max_tokens=24)
    _, tokens, length = expected(model, processor, request)
    end = tokens[5]
    at = tokens.index(end)
    monkeypatch.setattr(chat, "config", chat.config.model_copy(update={"eos_token_ids": (end, EOS)}))
    said, finished = answer(drive(chat(request), engines))
    assert said == processor.tokenizer.decode(tokens[:at])
    assert finished == Finished("stop", length, at + 1)


def test_a_conversation_computes_only_what_is_new(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    conversation = Conversation()
    first = ChatRequest((user(picture(0), "what is this?"),), max_tokens=8)
    text, finished = answer(drive(chat(first, conversation), engines))
    assert len(conversation.held) == finished.prompt_tokens + finished.completion_tokens - 1
    second = ChatRequest((*first.messages, Message("assistant", (text,)), user("and", picture(5))), max_tokens=8)
    for engine in engines.values():
        engine.calls.clear()
    continued = answer(drive(chat(second, conversation), engines))
    fed = engines["decoder"].calls[0]["inputs_embeds"].shape[1]
    assert fed < continued[1].prompt_tokens - finished.prompt_tokens + 1
    assert engines["vision_encoder"].calls[0]["pixel_values"].shape[0] == 1  # the first picture is not seen again
    assert continued == answer(drive(chat(second), engines))


def test_another_picture_or_another_start_is_not_reused(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    conversation = Conversation()
    answer(drive(chat(ChatRequest((user("see", picture(0), "what?"),)), conversation), engines))
    for messages in (
        (user("see", picture(1), "what?"),),
        (user("see", picture(1), picture(0)),),
        (Message("system", ("x",)), user("y")),
    ):
        request = ChatRequest(messages)
        assert answer(drive(chat(request, conversation), engines)) == answer(drive(chat(request), engines))
    assert answer(drive(chat(request, conversation), engines)) == answer(
        drive(chat(request), engines)
    )  # the very same once more


@pytest.mark.parametrize("calls", range(1, 7))
def test_a_cancelled_turn_leaves_the_conversation_usable(
    chat: ChatPipeline, engines: dict[str, FakeEngine], calls: int
) -> None:
    conversation, request = Conversation(), ChatRequest(CONVERSATIONS["turns"])
    pipeline, outputs, done = chat(request, conversation), None, 0
    while done < calls:
        item = pipeline.send(outputs)
        outputs = None
        if isinstance(item, Call):
            outputs, done = engines[item.submodel].run(item.inputs, item.slot), done + 1
    pipeline.close()  # the last call ran, but the pipeline never heard of it
    assert answer(drive(chat(request, conversation), engines)) == answer(drive(chat(request), engines))


def test_the_first_token_is_told_also_where_it_has_no_text_yet(
    chat: ChatPipeline, engines: dict[str, FakeEngine]
) -> None:
    """Tokens of this model are bytes, and random weights choose any of them."""
    firsts = []
    for letter in "abcdefgh":
        events = drive(chat(ChatRequest((Message("user", (letter,)),), max_tokens=3)), engines)
        firsts.append(next(event for event in events if isinstance(event, TextDelta)))
        assert [len(call["inputs_embeds"]) for call in engines["decoder"].calls] == [1] * len(firsts)
        events.close()  # type: ignore[attr-defined]
    assert {first.tokens for first in firsts} == {1} and {bool(first.text) for first in firsts} == {True, False}


def test_stop_strings_end_the_answer(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    request = ChatRequest(CONVERSATIONS["text"], max_tokens=24)
    text, full = answer(drive(chat(request), engines))
    stop = text[6:9]
    said, finished = answer(drive(chat(replace(request, stop=(stop, "never said"))), engines))
    assert said == text[: text.index(stop)]
    assert finished.reason == "stop"
    assert finished.completion_tokens <= full.completion_tokens


def test_sampling_repeats_with_the_seed(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    request = ChatRequest(CONVERSATIONS["picture"], temperature=1.5, top_k=100, top_p=0.95, seed=3)
    first = answer(drive(chat(request), engines))
    assert first == answer(drive(chat(request), engines))
    assert first != answer(drive(chat(replace(request, seed=4)), engines))
    unseeded = [answer(drive(chat(replace(request, seed=None)), engines)) for _ in range(3)]
    assert unseeded[0] != unseeded[1] or unseeded[1] != unseeded[2]


def test_calls_have_the_declared_types(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    answer(drive(chat(ChatRequest(CONVERSATIONS["pictures"], max_tokens=2)), engines))
    prefill, step = engines["decoder"].calls
    length = prefill["inputs_embeds"].shape[1]
    assert step["inputs_embeds"].shape == (1, 1, 32)
    assert step["attention_mask"].tolist() == [[1] * (length + 1)]
    assert step["position_ids"].tolist() == [[length]]
    assert {
        a.dtype
        for a in (step["attention_mask"], step["position_ids"], engines["token_embedding"].calls[0]["input_ids"])
    } == {np.dtype("int64")}
    pixels = engines["vision_encoder"].calls[0]["pixel_values"]
    assert (pixels.shape, pixels.dtype) == ((2, 3, EDGE, EDGE), np.dtype("float32"))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"messages": ()}, "messages"),
        ({"messages": (Message("assistant", ("hi",)),)}, "messages[0].role"),
        ({"messages": (user("hi"), Message("robot", ("hi",)))}, "messages[1].role"),  # type: ignore[arg-type]
        ({"messages": (user("hi", np.zeros((2, 2), np.uint8)),)}, "messages[0].parts[1]"),
        ({"messages": (user("an <image> here"),)}, "messages[0].parts[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("x",) * 17}, "stop"),
        ({"beams": 0}, "beams"),
        ({"beams": 1000}, "beams"),
        ({"beams": 2, "temperature": 0.5}, "beams"),
        ({"answers": 0}, "answers"),
        ({"answers": 65, "temperature": 1.0}, "answers"),
        ({"answers": 5, "beams": 4}, "answers"),
        ({"fills_context": True, "max_tokens": 5}, "fills_context"),
        ({"raw": True, "messages": CONVERSATIONS["turns"]}, "raw"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"context_overflow": "crop"}, "context_overflow"),
    ],
)
def test_bad_requests_are_named_before_any_call(chat: ChatPipeline, change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        chat(ChatRequest(**({"messages": CONVERSATIONS["text"]} | change)))
    assert caught.value.field == field


def test_the_context_is_checked_before_any_call(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"messages: .*\(270 of them for 30 pictures\).* 256"):
        chat(ChatRequest((user(*map(picture, range(30))),)))
    short = ChatRequest(CONVERSATIONS["picture"])
    length = len(chat.prompt(short).ids)
    with pytest.raises(ContextLengthExceeded, match=f"max_tokens: .* has {length} tokens"):
        chat(replace(short, max_tokens=CONTEXT - length + 1))
    _, finished = answer(drive(chat(replace(short, max_tokens=CONTEXT - length)), engines))
    assert finished.completion_tokens <= CONTEXT - length
    long = ChatRequest((user("x" * (CONTEXT - 22)),))
    room = CONTEXT - len(chat.prompt(long).ids)
    assert 0 < room < CONFIG.defaults.max_tokens
    assert answer(drive(chat(long), engines))[1].completion_tokens <= room  # the default yields to the context


def test_an_answer_may_fill_the_context(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    request = ChatRequest(CONVERSATIONS["text"])
    room = CONTEXT - len(chat.prompt(request).ids)
    assert room > CONFIG.defaults.max_tokens
    expected = answer(drive(chat(replace(request, max_tokens=room)), engines))
    assert answer(drive(chat(replace(request, fills_context=True)), engines)) == expected
    assert expected[1].completion_tokens > CONFIG.defaults.max_tokens


def test_a_raw_prompt_is_answered_as_the_conversation_that_it_writes(
    chat: ChatPipeline, engines: dict[str, FakeEngine]
) -> None:
    assert isinstance(chat.text, ChatText)
    request = ChatRequest(CONVERSATIONS["text"], max_tokens=6)
    raw = replace(request, messages=(user(chat.text.render(request.messages)),), raw=True)
    assert answer(drive(chat(raw), engines)) == answer(drive(chat(request), engines))


def test_a_picture_is_encoded_once(bundle: Bundle, engines: dict[str, FakeEngine]) -> None:
    """In a prompt always; in later prompts as long as its features are held."""
    chat = ChatPipeline(bundle.root, bundle.manifest.config)
    first, second = picture(1), picture(2)

    def tiles(*pictures: Picture) -> int:
        engines["vision_encoder"].calls.clear()
        request = ChatRequest((user(*pictures, "see"),), max_tokens=8)
        texts.append(answer(drive(chat(request), engines)))
        return sum(len(call["pixel_values"]) for call in engines["vision_encoder"].calls)

    texts: list[tuple[str, Finished]] = []
    assert [tiles(first), tiles(first), tiles(first, second, first)] == [1, 1, 2]
    chat.remember(Room(features=TOKENS * 32 * 4))  # one picture
    assert [tiles(first), tiles(first), tiles(first, second, first), tiles(second), tiles(first)] == [1, 0, 1, 0, 1]
    chat.remember(Room(features=1 << 20))
    assert [tiles(second, first), tiles(first, second, first), tiles(first.copy())] == [2, 0, 0]
    assert texts[0] == texts[1] == texts[3] == texts[4] == texts[7] == texts[10]
    assert texts[2] == texts[5] == texts[9]


def test_a_sliding_context_loses_the_oldest_turns(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    """The answer is that to the conversation without them, also behind a conversation that was held whole."""
    seen, spare = (
        (user(picture(1), "see"), Message("assistant", ("yes",))),
        (user("x" * 60), Message("assistant", ("y" * 60,))),
    )
    last = user("and now?")
    long = ChatRequest((*seen, *spare, *spare, last), max_tokens=12)
    with pytest.raises(ContextLengthExceeded):
        chat(long)
    for room, messages in ((12, (*seen, *spare, last)), (150, (*seen, last))):
        expected = answer(drive(chat(replace(long, messages=messages, max_tokens=room)), engines))
        sliding = replace(long, max_tokens=room, context_overflow="slide")
        text, finished = answer(drive(chat(sliding, Conversation()), engines))
        assert (text, finished.prompt_tokens) == (expected[0], expected[1].prompt_tokens)
        assert finished.left_out == len(long.messages) - len(messages) and expected[1].left_out == 0
    with pytest.raises(ContextLengthExceeded, match="the answer may have 250"):
        chat(replace(long, max_tokens=250, context_overflow="slide"))
    whole = ChatRequest((*seen, *spare, last), max_tokens=12)
    assert answer(drive(chat(replace(whole, context_overflow="slide")), engines))[1].left_out == 0


def test_a_model_without_vision_refuses_pictures(
    tmp_path: Path, processor: LlavaProcessor, engines: dict[str, FakeEngine]
) -> None:
    config = CONFIG.model_copy(update={"image_token_id": None, "tokens_per_image": 0})
    bundle = write_bundle(tmp_path, processor, config.model_dump())
    chat = ChatPipeline(bundle.root, bundle.manifest.config)
    with pytest.raises(InvalidInput, match="no vision"):
        chat(ChatRequest(CONVERSATIONS["picture"]))
    assert answer(drive(chat(ChatRequest(CONVERSATIONS["text"])), engines))


@pytest.mark.parametrize("change", [{"tokens_per_image": 0}, {"context_length": 0}, {"surprise": 1}])
def test_bundles_with_other_settings_are_refused(
    tmp_path: Path, processor: LlavaProcessor, change: dict[str, Any]
) -> None:
    bundle = write_bundle(tmp_path, processor, CONFIG.model_dump() | change)
    with pytest.raises(BundleError, match="chat settings cannot be read"):
        ChatPipeline(bundle.root, bundle.manifest.config)


def test_an_encoder_of_other_patches_is_refused(chat: ChatPipeline, engines: dict[str, FakeEngine]) -> None:
    engines["vision_encoder"] = FakeEngine(lambda inputs: {"image_features": np.zeros((1, TOKENS + 1, 32), np.float32)})
    with pytest.raises(BundleError, match="10 patches"):
        list(drive(chat(ChatRequest(CONVERSATIONS["picture"])), engines))


@pytest.mark.skipif(not (SAMPLE / "model.safetensors").exists(), reason="the sample model is not there yet")
def test_the_sample_answers_as_with_transformers(tmp_path: Path) -> None:
    from samples.world.questions import test_questions as draw_questions

    model: Any = LlavaForConditionalGeneration.from_pretrained(SAMPLE, dtype=torch.float32)
    processor = LlavaProcessor.from_pretrained(SAMPLE)
    settings = json.loads((SAMPLE / "config.json").read_bytes())
    text = model.config.text_config
    config = ChatConfig(
        context_length=text.max_position_embeddings,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_ids=(processor.tokenizer.eos_token_id,),
        image_token_id=settings.get("image_token_index", settings.get("image_token_id")),
        tokens_per_image=model.config.image_seq_length,
    )
    bundle = write_bundle(tmp_path, processor, config.model_dump())
    chat = ChatPipeline(bundle.root, bundle.manifest.config)
    engines = build_engines(model)
    for question in draw_questions(6):
        request = ChatRequest((user(question.picture, question.question),), max_tokens=40)
        assert answer(drive(chat(request), engines))[0] == expected(model, processor, request)[0]
