"""Text to tokens and back: the tokenizer that a model was published with, its chat template if it has one, and what a
stream of tokens spells.

No text of a conversation can write a special token, such as the placeholder of an image or the end of a turn: text that
contains one is refused, and so is a conversation whose parts join up to one in the rendered prompt. Refusing was chosen
over tokenizing such text as plain because the boundaries of the pieces would then tokenize unlike the model's own
tokenizer does.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final

from tokenizers import Tokenizer

from runtime.errors import BundleError, InvalidInput
from runtime.language.calls import CallForm
from runtime.language.shown import hidden
from runtime.language.templates import ChatTemplate
from runtime.language.templates import Message as Message  # for the modules above this one
from runtime.language.templates import Part as Part
from runtime.language.templates import Role as Role

REPLACEMENT: Final = "\ufffd"
"""What a decoder writes for bytes that are no whole character, or not yet."""
RARE: Final = "\U00010380"
"""A letter, of Ugaritic, that vocabularies do not have."""


class PlainText:
    """The tokenizer of a model without chat template, read from its tokenizer folder: a prompt is the placeholder of
    every picture, then the texts with a space between them, as transformers' processor of BLIP-2 writes it.

    `image_token_id` is the placeholder that stands for a picture, of models that see.
    Raises BundleError when a file is missing or cannot be used.
    """

    _around: ClassVar[bool] = True
    """Whether the tokenizer puts its own tokens around a prompt."""

    def __init__(self, folder: Path, image_token_id: int | None = None) -> None:
        self.file = path = folder / "tokenizer.json"
        try:
            self.tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"{path} cannot be read: {error}") from None
        self.tokenizer.no_truncation()  # files may ask for either; a prompt is never cut silently
        self.tokenizer.no_padding()
        added = self.tokenizer.get_added_tokens_decoder()
        if image_token_id is not None and image_token_id not in added:
            raise BundleError(
                f"{path} has no added token {image_token_id}, the placeholder of images that the model's config.json "
                "names"
            )
        self.image_token_id = image_token_id
        self.special = {token.content: id for id, token in added.items() if token.special or id == image_token_id}
        unknown = self._encoded(RARE, False)  # a special token that any text may become, in vocabularies without bytes
        self._reserved = set(self.special.values()) - set(unknown)

    @property
    def last(self) -> tuple[str, int]:
        """The token with the largest id that a text can be made of, and its id. Special tokens are none: no text may
        hold them.
        """
        plain = ((token, id) for token, id in self.tokenizer.get_vocab().items() if token not in self.special)
        return max(plain, key=lambda item: item[1], default=("", -1))

    def require_below(self, vocabulary: int) -> None:
        """Raise BundleError where a text can be made of a token that the model has no embedding for."""
        token, largest = self.last
        if largest >= vocabulary:
            raise BundleError(
                f"{self.file} has the token '{token}' with id {largest}, the model has embeddings for ids below "
                f"{vocabulary} (vocab_size in its config.json): take both from the same checkpoint"
            )

    def encode(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids of the prompt, with one placeholder per image; the answer may call the functions `tools`.

        Raises InvalidInput naming the part whose text contains a special token, calls of functions and results that the
        prompt would leave out, and "messages" when parts join up to a special token or the template does not place
        every picture.
        """
        for i, message in enumerate(messages):
            for j, part in enumerate(message.content):
                self._check_plain(part, f"messages[{i}].parts[{j}]")
            self._check_plain(_json([call.spec for call in message.calls]), f"messages[{i}].tool_calls")
        self._check_plain(_json(tools), "tools")
        self._check_shown(messages, tools)
        ids = self._ids(messages, tools)
        harmless = [replace(m, content=tuple(_harmless(part) for part in m.content)) for m in messages]
        if self._specials(ids) != self._specials(self._ids(harmless, tools)):
            raise InvalidInput(
                "messages", "texts of this conversation join up to a special token of the model: rephrase them"
            )
        images, placed = sum(len(message.images) for message in messages), ids.count(self._placeholder)
        if images != placed:
            raise InvalidInput(
                "messages",
                f"the model's chat template places {placed} of {images} pictures: show them in user messages",
            )
        return ids

    def raw(self, message: Message) -> list[int]:
        """Token ids of a message that is the prompt as the model reads it: a placeholder per image, then the text, and
        special tokens in it count. Raises InvalidInput where it holds a placeholder.
        """
        ids = PlainText._ids(self, [message])
        if self.image_token_id is not None and ids.count(self.image_token_id) != len(message.images):
            raise InvalidInput("messages[0]", "holds the token of a picture: send pictures, they come before the text")
        return ids

    def tokens(self, text: str, field: str) -> list[int]:
        """Token ids of one text, with what the tokenizer puts around it. Raises InvalidInput naming `field` for a text
        that contains a special token.
        """
        self._check_plain(text, field)
        return self._encoded(text, True)

    @property
    def _placeholder(self) -> int:
        return -1 if self.image_token_id is None else self.image_token_id

    def call_form(self) -> CallForm:
        """How the model writes calls of functions. Raises InvalidInput where it cannot."""
        raise InvalidInput("tools", "cannot be called by this model, which has no chat template: leave it out")

    def _check_shown(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
        """Raise InvalidInput for calls of functions: there is no form to write them in. Results are texts."""
        for i, message in enumerate(messages):
            if message.calls:
                raise _unshown(f"messages[{i}].tool_calls", "has no chat template to write it with")

    def _ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        parts = [part for message in messages for part in message.content]
        texts = [part for part in parts if isinstance(part, str)]
        return [self._placeholder] * (len(parts) - len(texts)) + self._encoded(
            " ".join(filter(None, texts)), self._around
        )

    def _encoded(self, text: str, add_special_tokens: bool) -> list[int]:
        # A batch of one: `encode` holds the interpreter lock, `encode_batch` does not.
        return list(self.tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)

    def _specials(self, ids: Sequence[int]) -> Counter[int]:
        return Counter(id for id in ids if id in self._reserved)

    def _check_plain(self, part: Part, field: str) -> None:
        found = [token for token in self.special if isinstance(part, str) and token in part]
        if found:
            raise InvalidInput(
                field, f"contains {found[0]}, a special token of the model that text may not hold: write it another way"
            )


class ChatText(PlainText):
    """The tokenizer and chat template of one model. The template writes the whole prompt: nothing is added around it.

    Raises BundleError also when there is no chat template that can be used.
    """

    _around = False

    def __init__(self, folder: Path, image_token_id: int | None = None) -> None:
        super().__init__(folder, image_token_id)
        token = None if image_token_id is None else self.tokenizer.id_to_token(image_token_id)
        self.template = ChatTemplate(folder, token)

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt that asks for the next answer. Raises InvalidInput when the template refuses the conversation."""
        return self.template.render(messages, tools)

    def call_form(self) -> CallForm:
        return self.template.call_form(self.special)

    def _check_shown(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
        """Raise InvalidInput for a call of a function, or a result, that the template leaves out."""
        field = hidden(messages, lambda tried: self.render(tried, tools))
        if field is not None:
            raise _unshown(field, "has a chat template that leaves it out")

    def _ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        return self._encoded(self.render(messages, tools), False)


PROMPTS: Final[Mapping[str, type[PlainText]]] = {"template": ChatText, "plain": PlainText}
"""How a prompt is made of messages, by its name in a bundle."""


def captioned(messages: Sequence[Message], instruction: str) -> Sequence[Message]:
    """The messages, the last with an instruction behind its pictures where it has no text."""
    *before, last = messages
    if not instruction or any(isinstance(part, str) for part in last.content):
        return messages
    return [*before, replace(last, content=(*last.content, instruction))]


def _unshown(field: str, why: str) -> InvalidInput:
    return InvalidInput(field, f"cannot be shown to this model, which {why}: write it as the text of a message")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _harmless(part: Part) -> Part:
    """A part of the same kind that writes no special token; blank text stays, as templates may treat it apart."""
    return "x" if isinstance(part, str) and part.strip() else part


class Detokenizer:
    """Spells a stream of tokens, a whole character at a time: the pieces join up to the decoded whole, special tokens
    left out.

    Each piece is decoded behind the piece before it, since decoders treat the start of a text apart (a leading space,
    say). For byte fallback (SentencePiece) this holds as long as the bytes are valid UTF-8; for byte-level tokenizers
    always.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """What is newly spelled with this token; empty while a character is incomplete."""
        self._pending.append(token)
        text = self._spelled()
        if text.endswith(REPLACEMENT):
            return ""
        if text:
            self._before, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character, as replacement characters."""
        text = self._spelled()
        self._before, self._pending = self._pending, []
        return text

    def _spelled(self) -> str:
        before: str = self._tokenizer.decode(self._before)
        return str(self._tokenizer.decode(self._before + self._pending))[len(before) :]


class StopStrings:
    """Ends a stream of text at the first stop string, which is not part of it. What may yet become one is held back.

    Takes time linear in the text, whatever the strings: each is followed by the automaton of Knuth, Morris and Pratt
    (1977).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What may be passed on. After a stop string was completed, `found` is true and the stream is over."""
        held, self._held = self._held, ""
        for end, character in enumerate(text, start=1):
            self._matched = [
                _follow(*stop, matched, character) for stop, matched in zip(self._stops, self._matched, strict=True)
            ]
            complete = [n for (stop, _), n in zip(self._stops, self._matched, strict=True) if n == len(stop)]
            if (
                complete
            ):  # of those completed first the longest, so that the result does not hang on how the text arrived
                self.found = True
                return (held + text[:end])[: len(held) + end - max(complete)]
        text = held + text
        split = len(text) - max(self._matched, default=0)
        self._held = text[split:]
        return text[:split]

    def flush(self) -> str:
        """What was held back, when the stream ends without a stop string."""
        text, self._held = self._held, ""
        return text


def _borders(stop: str) -> list[int]:
    """For each beginning of the string, the length of the longest shorter beginning that it ends with."""
    borders = [0] * len(stop)
    for end in range(1, len(stop)):
        borders[end] = _follow(stop, borders, borders[end - 1], stop[end])
    return borders


def _follow(stop: str, borders: Sequence[int], matched: int, character: str) -> int:
    """How much of the string's beginning the text ends with, once one more character follows `matched` of them."""
    while matched and stop[matched] != character:
        matched = borders[matched - 1]
    return matched + (stop[matched] == character)
