"""The chat template that a model was published with: where it lies, how it is rendered, and in which form it takes a
message.

Templates are rendered the way transformers renders them (`apply_chat_template`, checked by a test), in jinja2's
immutable sandbox.

Published templates differ in what they take as the content of a message. Some take a list of parts, `{"type": "text",
"text": ...}` and `{"type": "image"}`; others one string, in which the model's image token stands for a picture. A
template that gets the other form often writes Python's own notation of the list into the prompt instead of failing. So
each template is tried once, when it is opened: the form that shows every text and every picture of a few short messages
is used from then on, for each role.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal, get_args

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.errors import BundleError, InvalidInput
from runtime.language.calls import ARGUMENTS, NAME, RESULT, TRIED, CallForm, ToolCall, call_form, unfit
from runtime.vision.images import Picture, PictureFile, check_picture

Role = Literal["system", "user", "assistant", "tool"]
Part = str | Picture | PictureFile
"""Text, a picture, or a file with one."""
Form = Literal["parts", "text"]
"""What a template takes as content: a list of parts, or one string."""

FILES: Final = (
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/default.jinja",
    "tokenizer_config.json",
)
"""Where a template may lie, in transformers' order: a processor's own come first, the tokenizer's field comes last."""
TEXTS: Final = ("qxzebra", "qxquartz")
"""Words for trying a template, which none contains."""


@dataclass(frozen=True, eq=False)
class Message:
    """One turn: its texts and pictures in order. A str is text, an array a picture, uint8 RGB [height, width, 3].

    An answer may be a call of functions, `calls`. The result of each is a message of the role "tool", a text; `tool` is
    the function's name.
    """

    role: Role
    content: tuple[Part, ...]
    calls: tuple[ToolCall, ...] = ()
    tool: str = ""

    @property
    def images(self) -> list[Picture | PictureFile]:
        return [part for part in self.content if not isinstance(part, str)]

    @property
    def characters(self) -> int:
        """Those of its texts, of the calls in it, and of the function whose result it is."""
        texts = (part for part in self.content if isinstance(part, str))
        return sum(map(len, texts)) + sum(len(call.text) for call in self.calls) + len(self.tool)

    def check(self, field: str) -> None:
        """Raise InvalidInput, naming the part below `field`, unless role and every part are of the right kind."""
        if self.role not in get_args(Role):
            raise InvalidInput(f"{field}.role", f"is '{self.role}', expected {', '.join(get_args(Role))}")
        if self.calls and self.role != "assistant":
            raise InvalidInput(f"{field}.tool_calls", f"does not belong in a message of the role {self.role}")
        for i, call in enumerate(self.calls):
            call.check(f"{field}.tool_calls[{i}]")
        if not self.content:
            raise InvalidInput(f"{field}.parts", "is empty, expected texts and pictures (an empty text is allowed)")
        for i, part in enumerate(self.content):
            if isinstance(part, PictureFile):
                continue
            if not isinstance(part, str):
                check_picture(part, f"{field}.parts[{i}]")
            else:
                check_unicode(f"{field}.parts[{i}]", part)


def check_unicode(field: str, text: str) -> None:
    """Raise InvalidInput naming `field` for a text with half a surrogate pair, which no tokenizer takes."""
    if not is_unicode(text):
        raise InvalidInput(field, "holds half a surrogate pair, which is no Unicode text")


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class ChatTemplate:
    """The chat template of a tokenizer folder. `image_token` is the text that stands for a picture, of models that see.

    Raises BundleError, naming the file, when there is no template, or none of the forms shows a user's text (and
    picture).
    """

    def __init__(self, folder: Path, image_token: str | None = None) -> None:
        self.file, source = _find(folder)
        self._template = _compile(source, self.file)
        self._names = named_tokens(folder)
        self._image = image_token
        self._forms: dict[Role, Form] = {"tool": "text"}
        self._form: CallForm | None = None
        self._refusals: dict[Role, str] = {}
        for role in ("user", "system", "assistant"):
            self._settle(role)
        if "user" in self._refusals:
            raise BundleError(
                f"{self.file}: this chat template cannot be used: {self._refusals['user']}. Correct it, or take the "
                "one that the model "
                "was trained with"
            )

    def call_form(self, special: Collection[str]) -> CallForm:
        """How calls of functions are written, by a model with these special tokens. Raises InvalidInput."""
        if self._form is None:
            user, call = Message("user", (TEXTS[0],)), Message("assistant", ("",), (ToolCall(NAME, ARGUMENTS),))
            try:
                asked = self.render([user], [TRIED])
                called = self.render([user, call, Message("tool", (RESULT,), tool=NAME)], [TRIED])
            except InvalidInput as error:
                raise unfit(f"refuses them ({error.reason.rpartition('conversation: ')[2]})") from None
            self._form = call_form(asked, called, special)
        return self._form

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt that asks for the next answer, which may call these functions. Raises InvalidInput when the
        template refuses the conversation.
        """
        for message in messages:
            if message.role in self._refusals:
                raise InvalidInput(
                    "messages", f"the model's chat template refuses this conversation: {self._refusals[message.role]}"
                )
        return self._render(messages, self._forms, tools)

    def _render(
        self, messages: Sequence[Message], forms: Mapping[Role, Form], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        conversation = [_turn(message, self._content(message, forms[message.role])) for message in messages]
        try:
            return self._template.render(
                messages=conversation,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=True,
                **self._names,
            )
        except MemoryError:
            raise
        except Exception as error:  # a template can raise whatever Python's operators raise
            raise InvalidInput("messages", f"the model's chat template refuses this conversation: {error}") from None

    def _content(self, message: Message, form: Form) -> object:
        """A message's content as the template takes it. In a string, each part is on a line of its own."""
        if form == "parts":
            return [_part(part) for part in message.content]
        return "\n".join(part if isinstance(part, str) else self._image or "" for part in message.content)

    def _settle(self, role: Role) -> None:
        """Choose the form that passes most trials of a role, the necessary ones among them; else keep the reasons."""
        necessary, desirable = self._trials(role)
        passed: dict[Form, int] = {}
        reasons: dict[Form, str] = {}
        for form in get_args(Form):
            faults = [self._fault(role, form, trial) for trial in (*necessary, *desirable)]
            if any(faults[: len(necessary)]):
                reasons[form] = next(filter(None, faults))
            else:
                passed[form] = faults.count("")
        if passed:
            self._forms[role] = max(passed, key=lambda form: passed[form])
        elif len(set(reasons.values())) == 1:
            self._refusals[role] = next(iter(reasons.values()))
        else:
            self._refusals[role] = (
                f"given the content as a list, {reasons['parts']}; given it as a string, {reasons['text']}"
            )

    def _trials(self, role: Role) -> tuple[list[tuple[Part, ...]], list[tuple[Part, ...]]]:
        """Contents that a role must be able to have, and those that it had better."""
        first, second = TEXTS
        picture = np.zeros((1, 1, 3), np.uint8)
        if role != "user" or self._image is None:
            return [(first,)], [(first, second)]
        return [(first,), (picture, first)], [
            (first, second),
            (first, picture),
            (first, picture, second),
            (picture, picture, first),
        ]

    def _fault(self, role: Role, form: Form, content: tuple[Part, ...]) -> str:
        """What is wrong with the prompt of a conversation with such a message; empty where nothing is."""
        message, user = Message(role, content), Message("user", ("x",))
        conversation = {"user": [message], "system": [message, user], "assistant": [user, message, user]}[role]
        if role != "user" and "user" not in self._forms:
            return "it shows no message of a user"
        try:
            prompt = self._render(conversation, {**self._forms, role: form})
        except InvalidInput as error:
            return f"it refuses a message of the {role}: {str(error).rpartition('conversation: ')[2]}"
        parts = [_part(part) for part in content]
        if any(notation in prompt for part in parts for notation in (str(part), json.dumps(part))):
            return f"it writes the list itself into the prompt of a message of the {role}"
        if not all(part in prompt for part in content if isinstance(part, str)):
            return f"it leaves out the text of a message of the {role}"
        placed = prompt.count(self._image) if self._image else 0
        if placed != len(message.images):
            return f"it places {placed} of {len(message.images)} pictures"
        return ""


def _turn(message: Message, content: object) -> dict[str, Any]:
    """A message as templates expect it."""
    calls = {"tool_calls": [call.spec for call in message.calls]} if message.calls else {}
    return {"role": message.role, "content": content} | calls | ({"name": message.tool} if message.tool else {})


def _part(part: Part) -> dict[str, str]:
    """A part as templates expect it."""
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


def named_tokens(folder: Path) -> dict[str, str]:
    """What a template may name, as transformers has it: special_tokens_map.json of older folders decides, else
    tokenizer_config.json.
    """
    settings = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= read_json(folder / "special_tokens_map.json")
    extra = settings.get("extra_special_tokens")
    named = {name: value for name, value in settings.items() if name.endswith("_token")} | (
        extra if isinstance(extra, dict) else {}
    )
    contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}


def _find(folder: Path) -> tuple[Path, str]:
    """The first file with a template, and the template."""
    for file in filter(Path.is_file, (folder / name for name in FILES)):
        template = read_json(file).get("chat_template") if file.suffix == ".json" else _read(file)
        if template is not None:
            return file, _default(template, file)
    raise BundleError(
        f"{folder} holds no chat template, neither chat_template.jinja nor the field chat_template in "
        "processor_config.json or "
        "tokenizer_config.json. A model that was trained to chat is published with one: take that model, or write the "
        "file"
    )


def _default(template: object, file: Path) -> str:
    """Of several templates by name, the one called default; the others are for tools and the like."""
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        if not isinstance(template.get("default"), str):
            raise BundleError(
                f"{file} has chat templates by name ({', '.join(map(str, template))}), expected one of them called "
                "default"
            )
        template = template["default"]
    if not isinstance(template, str):
        raise BundleError(f"{file} has a chat_template that is no text")
    return template


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{file} cannot be read: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, empty when there is no such file. Raises BundleError."""
    try:
        data = json.loads(file.read_bytes()) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise BundleError(f"{file} holds no JSON object")
    return data


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model said, for training; here it is what it encloses."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str, file: Path) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda pattern: datetime.now().strftime(pattern)}
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise BundleError(f"{file}: this chat template cannot be used: {error}") from None


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's escapes for HTML, as transformers' templates expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> str:
    raise jinja2.TemplateError(message)
