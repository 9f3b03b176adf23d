"""Prompts equal transformers'; no text writes a special token; streams spell what the whole decodes to."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from runtime.errors import BundleError, InvalidInput
from runtime.language.calls import ToolCall
from runtime.language.text import ChatText, Detokenizer, Message, PlainText, StopStrings

SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
IMAGE = SPECIALS.index("<image>")
PICTURE = np.zeros((2, 2, 3), np.uint8)
LLAVA = """\
{% for message in messages %}
    {% if message.role != 'system' %}{{ message.role.upper() + ': ' }}{% endif %}
    {% for part in message.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}
    {% for part in message.content | selectattr('type', 'equalto', 'text') %}
        {% if message.role != 'assistant' %}{{ part.text + ' ' }}{% continue %}{% endif %}
        {% generation %}{{ part.text + ' ' }}{% endgeneration %}
    {% endfor %}
    {% if message.role == 'assistant' %}{{ eos_token }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}
"""
MISTRAL = """\
{%- set ns = namespace(count=0) -%}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{{- raise_exception('no system messages here') }}{%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' }}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}{{- '<image>' }}{%- continue %}{%- endif %}
            {{- part['text'] | trim }}{% set ns.count = ns.count + 1 %}
        {%- endfor %}
        {{- ' [/INST]' ~ ns.count }}
    {%- else %}
        {{- message['content'] | map(attribute='text') | join('') | tojson }}{{ eos_token }}
    {%- endif %}
{%- endfor %}
{{- strftime_now('%Y') }}
{%- if tools is not none %}{{- tools | tojson(indent=2) }}{% endif %}
"""


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE that knows bytes and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "t")]
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def fallback_tokenizer() -> Tokenizer:
    """SentencePiece's way, as in Llama: spaces as "▁", one put in front, unknown characters as bytes."""
    pieces = [*SPECIALS, *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def processor_of(template: str) -> LlavaProcessor:
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=byte_tokenizer(), unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        CLIPImageProcessorPil(), tokenizer, patch_size=112, chat_template=template
    )


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> ChatText:
    folder = tmp_path_factory.mktemp("llava")
    processor_of(LLAVA).save_pretrained(folder)
    return ChatText(folder, IMAGE)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> ChatText:
    folder = tmp_path_factory.mktemp("mistral")
    processor_of(MISTRAL).save_pretrained(folder)
    return ChatText(folder, IMAGE)


def hf(messages: list[Message]) -> list[dict[str, Any]]:
    parts = [
        [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in m.content] for m in messages
    ]
    return [{"role": m.role, "content": content} for m, content in zip(messages, parts, strict=True)]


plain = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: not any(s in text for s in SPECIALS))
turns = st.lists(
    st.builds(
        Message,
        st.sampled_from(["user", "assistant"]),
        st.lists(plain | st.just(PICTURE), min_size=1, max_size=3).map(tuple),
    ),
    max_size=4,
)


@given(turns, plain)
def test_prompts_equal_transformers(llava: ChatText, messages: list[Message], system: str) -> None:
    messages = [Message("system", (system,)), *messages, Message("user", (PICTURE, "hell"))]
    processor = processor_of(LLAVA)
    expected = processor.apply_chat_template(hf(messages), add_generation_prompt=True)
    assert llava.render(messages) == expected
    assert llava.encode(messages) == processor.tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_helpers_of_templates_equal_transformers(mistral: ChatText) -> None:
    messages = [
        Message("user", (PICTURE, " <b>'é' ")),
        Message("assistant", ("<b>'é'", "\n")),
        Message("user", ("and?",)),
    ]
    expected = processor_of(MISTRAL).apply_chat_template(hf(messages), add_generation_prompt=True)
    assert mistral.render(messages) == expected
    assert expected.startswith("<s>[INST] <image><b>")


def test_a_template_that_refuses_is_invalid_input(mistral: ChatText) -> None:
    with pytest.raises(InvalidInput, match=r"messages: .*no system messages here"):
        mistral.render([Message("system", ("be brief",)), Message("user", ("hi",))])


@pytest.mark.parametrize(
    "template",
    ["{{ messages + 1 }}", "{{ 1 / 0 }}", "{{ messages[7].role }}", "{{ ''.__class__.__mro__[1] }}", "{% do x %}"],
)
def test_bad_templates_are_clear_errors(tmp_path: Path, template: str) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises((InvalidInput, BundleError), match=r"chat template"):
        ChatText(tmp_path).render([Message("user", ("hi",))])


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer.json cannot be read"):
        ChatText(tmp_path)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BundleError, match="no chat template"):
        ChatText(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(BundleError, match=r"tokenizer_config.json cannot be read"):
        ChatText(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(BundleError, match="no added token 400"):
        ChatText(tmp_path, image_token_id=400)


def test_truncation_in_the_file_is_ignored(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content[0].text }}")
    assert len(ChatText(tmp_path).encode([Message("user", ("abcdef",))])) == 6


@pytest.mark.parametrize("token", SPECIALS)
def test_special_tokens_in_text_are_refused_by_field(llava: ChatText, token: str) -> None:
    messages = [Message("user", ("hi",)), Message("assistant", ("yes",)), Message("user", (PICTURE, f"see {token}"))]
    with pytest.raises(InvalidInput, match=token) as caught:
        llava.encode(messages)
    assert caught.value.field == "messages[2].parts[1]"


def test_a_raw_prompt_is_read_as_it_is(llava: ChatText) -> None:
    conversation = [Message("user", ("hi",)), Message("assistant", ("yes",)), Message("user", ("and?",))]
    prompt = llava.render(conversation)
    assert llava.raw(Message("user", (prompt,))) == llava.encode(conversation)
    assert llava.raw(Message("user", ("a</s>", PICTURE)))[0] == IMAGE
    for parts in (("a <image>",), (PICTURE, "a <image>")):
        with pytest.raises(InvalidInput, match="holds the token of a picture"):
            llava.raw(Message("user", parts))


@pytest.mark.parametrize("parts", [("<ima", "ge>"), ("</", "s>"), (" <ima\n", " ge>"), ("<", "image", ">", PICTURE)])
def test_parts_that_join_up_to_a_special_token_are_refused(tmp_path: Path, parts: tuple[Any, ...]) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(
        "{% for p in messages[0].content %}{{ p.text | trim if p.type == 'text' else '<image>' }}{% endfor %}"
    )
    with pytest.raises(InvalidInput, match="join up"):
        ChatText(tmp_path, IMAGE).encode([Message("user", parts)])


def test_every_picture_has_its_placeholder(tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% for p in m.content %}{{ p.text or ('<image>' if loop.last == loop.first or "
        "m.content|length < 4) }}"
        "{% endfor %}{% endfor %}"
    )
    chat = ChatText(tmp_path, IMAGE)
    with pytest.raises(InvalidInput, match="places 0 of 1 pictures"):
        chat.encode([Message("user", ("a", "b", "c", PICTURE))])


@given(plain)
def test_any_plain_text_survives_the_byte_tokenizer(llava: ChatText, text: str) -> None:
    ids = llava.encode([Message("user", (text,))])
    assert llava.tokenizer.decode(ids, skip_special_tokens=False) == llava.render([Message("user", (text,))])


BYTES, FALLBACK = byte_tokenizer(), fallback_tokenizer()


def spell(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = Detokenizer(tokenizer)
    return [*(stream.push(id) for id in ids), stream.flush()]


@given(st.lists(st.integers(0, BYTES.get_vocab_size() - 1)))
def test_spelling_any_tokens_joins_up_to_the_whole(ids: list[int]) -> None:
    assert "".join(spell(BYTES, ids)) == BYTES.decode(ids)


emoji = st.text(st.sampled_from("aé€😀👩🏽🚀 \u200d\n") | st.characters(exclude_categories=["Cs"]))


@given(emoji)
@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["byte-level", "byte-fallback"])
def test_spelling_text_never_breaks_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = spell(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in pieces)


def test_spelling_emits_as_soon_as_a_character_is_whole() -> None:
    assert spell(BYTES, BYTES.encode("a😀b", add_special_tokens=False).ids) == ["a", "", "", "", "😀", "b", ""]
    assert spell(BYTES, BYTES.encode("a😀", add_special_tokens=False).ids[:3]) == ["a", "", "", "\ufffd"]


def stopped(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    stream, out = StopStrings(stops), ""
    for piece in pieces:
        out += stream.push(piece)
        assert not any(stop in out for stop in stops)
        if stream.found:
            return out, True
    return out + stream.flush(), False


@given(st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.lists(st.text("abc", max_size=4)))
def test_stop_strings_do_not_depend_on_how_the_text_arrives(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    out, found = stopped(stops, pieces)
    assert (out, found) == stopped(stops, list(text)) == stopped(stops, [text])
    assert found == any(stop in text for stop in stops)
    assert text.startswith(out)


def test_stop_strings_hold_back_no_more_than_needed() -> None:
    stream = StopStrings(["\nUSER:"])
    assert [stream.push(piece) for piece in ("red", "\nUS", "A\n", "USER", ": hi")] == ["red", "", "\nUSA", "", ""]
    assert stream.found


@given(st.lists(st.text("ab", min_size=1, max_size=5), max_size=3), st.text("ab", max_size=12))
def test_stop_strings_end_the_text_where_a_search_of_all_of_it_does(stops: list[str], text: str) -> None:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert stopped(stops, list(text)) == ((text[: min(ends)[1]], True) if ends else (text, False))


@pytest.mark.timeout(60)
def test_a_very_long_stop_string_takes_linear_time() -> None:
    stream = StopStrings(["a" * 1_000_000 + "b"])
    pieces = [stream.push("a" * 100) for _ in range(1000)]
    assert not any(pieces) and stream.push("c") == "a" * 100_000 + "c"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (Message("robot", ("x",)), "m.role"),  # type: ignore[arg-type]
        (Message("user", ("x",), (ToolCall("f", {}),)), "m.tool_calls"),
        (Message("user", ()), "m.parts"),
        (Message("user", ("a", np.zeros((2, 2, 4), np.uint8))), "m.parts[1]"),
        (Message("user", (np.zeros((2, 2, 3), np.float32),)), "m.parts[0]"),
        (Message("user", ("\ud83d",)), "m.parts[0]"),
    ],
)
def test_messages_of_the_wrong_kind_are_named(message: Message, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        message.check("m")
    assert caught.value.field == field


def test_without_a_template_pictures_are_in_front(tmp_path: Path) -> None:
    """Texts follow one another, with what the tokenizer itself puts around a text, and none may write a placeholder."""
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    chat = PlainText(tmp_path, IMAGE)
    messages = [Message("user", ("a", PICTURE)), Message("assistant", ("b",)), Message("user", (PICTURE, "", "c"))]
    assert chat.encode(messages) == [IMAGE, IMAGE, *chat.tokenizer.encode("a b c").ids]
    assert chat.encode([Message("user", (PICTURE,))]) == [IMAGE, *chat.tokenizer.encode("").ids]
    with pytest.raises(InvalidInput, match="<image>"):
        chat.encode([Message("user", ("<image>",))])


BARE = "{% for m in messages %}{% if m.role != 'tool' %}{{ m.role + ' ' + m.content }}{% endif %}{% endfor %}"
SHOWING = (
    "{% for m in messages %}{{ m.role + ' ' + m.content }}{% for call in m.tool_calls or () %}"
    "{{ call.function | tojson }}{% endfor %}{% endfor %}"
)
RESULTS = BARE.replace("{% if m.role != 'tool' %}", "").replace("{% endif %}", "")
CALLED = (
    Message("user", ("go",)),
    Message("assistant", ("",), (ToolCall("paint", {}), ToolCall("mix", {"a": 1}))),
    Message("tool", ("done",), tool="paint"),
    Message("tool", ("mixed",), tool="mix"),
)


@pytest.mark.parametrize(
    ("template", "messages", "field"),
    [
        (BARE, CALLED, r"messages\[1\]\.tool_calls: cannot be shown to this model, which has a chat template that"),
        (BARE, (CALLED[0], CALLED[2]), r"messages\[1\]: cannot be shown"),
        (RESULTS, CALLED, r"messages\[1\]\.tool_calls: cannot be shown"),
        (SHOWING.replace("m.tool_calls or ()", "(m.tool_calls or ())[:1]"), CALLED, r"messages\[1\]\.tool_calls"),
        (SHOWING.replace("call.function |", "call.function.name |"), CALLED, r"messages\[1\]\.tool_calls"),
    ],
)
def test_calls_that_a_template_leaves_out_are_refused(
    tmp_path: Path, template: str, messages: tuple[Message, ...], field: str
) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(template)
    text = ChatText(tmp_path)
    with pytest.raises(InvalidInput, match=field):
        text.encode(messages)
    text.encode([CALLED[0]])
    (tmp_path / "chat_template.jinja").write_text(SHOWING)
    shown = ChatText(tmp_path)
    assert '"mix"' in shown.tokenizer.decode(shown.encode(CALLED)) and "mixed" in shown.render(CALLED)


def test_calls_without_a_template_are_refused(tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    text = PlainText(tmp_path)
    with pytest.raises(InvalidInput, match=r"messages\[1\]\.tool_calls: .* which has no chat template"):
        text.encode(CALLED)
    assert text.tokenizer.decode(text.encode(CALLED[2:])) == "done mixed", "results are texts"
