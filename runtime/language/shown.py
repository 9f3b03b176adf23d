"""Whether a prompt shows the calls of functions in a conversation and their results: tried with other words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from runtime.language.calls import NAME, RESULT, ToolCall
from runtime.language.templates import Message


def hidden(messages: Sequence[Message], write: Callable[[Sequence[Message]], str]) -> str | None:
    """The field of the first calls, or of the first result, that the prompt leaves out; None where it shows all of
    them. `write` makes a prompt of messages.
    """
    words: dict[str, list[str]] = {}
    tried = []
    for i, message in enumerate(messages):
        if message.calls:
            names = [f"{NAME}{i}x{n}x" for n in range(len(message.calls))]
            words[f"messages[{i}].tool_calls"] = [word for name in names for word in (name, f"of{name}")]
            message = replace(message, calls=tuple(ToolCall(name, {"qxkey": f"of{name}"}) for name in names))
        elif message.role == "tool":
            words[f"messages[{i}]"] = [f"{RESULT}{i}x"]
            message = replace(message, content=(f"{RESULT}{i}x",))
        tried.append(message)
    prompt = write(tried) if words else ""
    return next((field for field, one in words.items() if not all(word in prompt for word in one)), None)
