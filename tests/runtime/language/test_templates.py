"""A template is found where transformers finds it, and gets messages in the form that it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from runtime.errors import BundleError, InvalidInput
from runtime.language.templates import FILES, ChatTemplate, Message, named_tokens
from runtime.language.text import ChatText

PICTURE = np.zeros((2, 2, 3), np.uint8)
PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for p in m.content %}"
    "{{ p.text if p.type == 'text' else '<image>' }}{% endfor %};{% endfor %}"
)
CONTENT = {
    "added": "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ';' }}{% endfor %}",
    "trimmed": "{% for m in messages %}{{ m['role'] }}:{{ m['content'] | trim }};{% endfor %}",
    "written": "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}",
    "joined": "{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ ';' }}{% endfor %}",
    "method": "{% for m in messages %}{{ m.role }}:{{ m.content.strip() }};{% endfor %}",
    "tested": "{% for m in messages %}{% if m.content is string %}{{ m.role }}:{{ m.content }};{% endif %}{% endfor %}",
    "split": "{% for m in messages %}{{ m.role }}:{{ m.content.split('</think>')[-1] }};{% endfor %}",
}
"""Published ways of writing a message whose content is one string."""


def chat_template(folder: Path, template: str, image: str | None = "<image>") -> ChatTemplate:
    (folder / "chat_template.jinja").write_text(template)
    return ChatTemplate(folder, image)


def turns() -> list[Message]:
    return [
        Message("system", ("be brief",)),
        Message("user", (PICTURE, "what?")),
        Message("assistant", ("a fox",)),
        Message("user", ("and", PICTURE, "here?")),
    ]


@pytest.mark.parametrize("form", CONTENT)
def test_content_as_a_string(tmp_path: Path, form: str) -> None:
    expected = "system:be brief;user:<image>\nwhat?;assistant:a fox;user:and\n<image>\nhere?;"
    assert chat_template(tmp_path, CONTENT[form]).render(turns()) == expected


@pytest.mark.parametrize("form", CONTENT)
def test_a_string_is_what_transformers_renders(tmp_path: Path, form: str) -> None:
    """The library is given the string that a user of such a template writes."""
    processor = processor_of(CONTENT[form])
    messages = [Message("user", (PICTURE, "what?"))]
    expected = processor.apply_chat_template(
        [{"role": "user", "content": "<image>\nwhat?"}], add_generation_prompt=True
    )
    assert chat_template(tmp_path, CONTENT[form]).render(messages) == expected


def test_content_as_parts_is_preferred(tmp_path: Path) -> None:
    both = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{{ p.text if p.type == 'text' else '<image>' }}{% endfor %}{% endif %}{% endfor %}"
    )
    for template in (PARTS, both):
        rendered = chat_template(tmp_path, template).render(turns()[1:])
        assert "<image>what?" in rendered and "and<image>here?" in rendered


def test_each_role_has_its_own_form(tmp_path: Path) -> None:
    """As Pixtral's and Llama's templates: users send parts, the others strings."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{% for p in m.content %}{{ p.text if p.type == 'text' else "
        "'<image>' }}"
        "{% endfor %}{% else %}{{ '[' + m.content + ']' }}{% endif %}{% endfor %}"
    )
    assert chat_template(tmp_path, template).render(turns()) == "[be brief]<image>what?[a fox]and<image>here?"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("USER:", "it leaves out the text of a message of the user"),
        (
            "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
            "it places 0 of 1 pictures",
        ),
        ("{{ messages[0].content[0] }}", "it writes the list itself into the prompt"),
        ("{{ raise_exception('never') }}", "it refuses a message of the user: never"),
        ("{{ messages[7].role.name }}", "it refuses a message of the user: .* has no element 7"),
        ("{% for %}", "cannot be used: Expected an expression"),
    ],
)
def test_templates_that_no_form_satisfies(tmp_path: Path, template: str, reason: str) -> None:
    with pytest.raises(BundleError, match=reason) as caught:
        chat_template(tmp_path, template)
    assert str(tmp_path / "chat_template.jinja") in str(caught.value)


def test_a_message_that_is_left_out_is_refused(tmp_path: Path) -> None:
    """Better than an answer that ignores it."""
    template = chat_template(tmp_path, "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(InvalidInput, match="leaves out the text of a message of the system"):
        template.render(turns()[:2])


def test_a_language_model_needs_no_image_token(tmp_path: Path) -> None:
    template = chat_template(tmp_path, CONTENT["added"], image=None)
    assert template.render([Message("user", ("a", "b"))]) == "user:a\nb;"


def test_pictures_of_a_string_are_placeholders(tmp_path: Path) -> None:
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(CONTENT["added"])
    chat = ChatText(tmp_path, 1)
    assert chat.encode(turns()).count(1) == 2
    with pytest.raises(InvalidInput, match="special token"):
        chat.encode([Message("user", ("<image>",))])


# Where templates lie


def tokenizer() -> Tokenizer:
    made = Tokenizer(
        models.BPE(
            vocab={"<s>": 0, "<image>": 1}
            | {c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
            merges=[],
        )
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "<image>")])
    return made


def processor_of(template: str | dict[str, str] | None) -> LlavaProcessor:
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer(), bos_token="<s>", pad_token="<s>", extra_special_tokens={"image_token": "<image>"}
    )
    return LlavaProcessor(CLIPImageProcessorPil(), wrapped, patch_size=112, chat_template=template)  # type: ignore[no-untyped-call]


def marked(name: str) -> str:
    return "{{ bos_token }}" + name + PARTS


CONTENTS: dict[str, Any] = {
    "processor_config.json": lambda data: data | {"chat_template": marked("processor_config.json")},
    "chat_template.json": lambda data: {"chat_template": marked("chat_template.json")},
    "chat_template.jinja": None,
    "additional_chat_templates/default.jinja": None,
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the library leaves a file open
@pytest.mark.parametrize("names", [FILES[:3], FILES[1:3], FILES[2:4], FILES[3:4]], ids=lambda names: names[0])
def test_where_templates_lie_and_which_counts(tmp_path: Path, names: tuple[str, ...]) -> None:
    processor_of(None).save_pretrained(tmp_path)
    for name in names:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        if file.suffix == ".json":
            data = json.loads(file.read_bytes()) if file.is_file() else {}
            file.write_text(json.dumps(CONTENTS[name](data)))
        else:
            file.write_text(marked(name))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]
    expected = AutoProcessor.from_pretrained(tmp_path).apply_chat_template(chat, add_generation_prompt=True)
    found = ChatTemplate(tmp_path, "<image>")
    assert found.render([Message("user", (PICTURE, "hi"))]) == expected
    assert names[0] in expected and found.file == tmp_path / names[0]


@pytest.mark.parametrize("listed", [False, True])
def test_templates_by_name(tmp_path: Path, listed: bool) -> None:
    templates = {"tool_use": "{{ never }}", "default": marked("default")}
    processor_of(None).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    field = [{"name": name, "template": text} for name, text in templates.items()] if listed else templates
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"chat_template": field}))
    chat = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    expected = loaded.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert ChatTemplate(tmp_path, "<image>").render([Message("user", ("hi",))]) == expected


def test_templates_by_name_without_default(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": {"rag": "x", "tool_use": "y"}}))
    with pytest.raises(
        BundleError,
        match=r"tokenizer_config\.json has chat templates by name \(rag, tool_use\), expected one .* default",
    ):
        ChatTemplate(tmp_path)


@pytest.mark.parametrize("content", [b'{"chat_template": 5}', b"[", b"[]", b"\xff"])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "chat_template.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"chat_template\.json"):
        ChatTemplate(tmp_path)


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match=r"chat_template\.jinja cannot be read"):
        ChatTemplate(tmp_path)


def test_tokens_that_a_template_names(tmp_path: Path) -> None:
    """Those of the model's own, such as image_token, too."""
    processor_of(None).save_pretrained(tmp_path)
    assert named_tokens(tmp_path) == AutoTokenizer.from_pretrained(tmp_path).special_tokens_map
    assert named_tokens(tmp_path)["image_token"] == "<image>"


@pytest.mark.parametrize("newer", [False, True])
def test_tokens_of_older_folders(tmp_path: Path, newer: bool) -> None:
    processor_of(None).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    data = json.loads(file.read_bytes()) | ({"added_tokens_decoder": {"0": {"content": "<s>"}}} if newer else {})
    file.write_text(json.dumps(data))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<image>"}}))
    assert named_tokens(tmp_path) == AutoTokenizer.from_pretrained(tmp_path).special_tokens_map
