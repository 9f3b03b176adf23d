"""Calls of functions in conversations and answers, as clients of OpenAI have them
(https://platform.openai.com/docs/guides/function-calling).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runtime import limits
from runtime.errors import InvalidInput
from runtime.language.calls import ToolCall
from runtime.language.tools import Toolbox
from serving.dialects.http.tools import toolbox
from serving.dialects.http.values import check_values
from serving.dialects.openai.fields import Called, Completion, Message, Named


def tools_of(body: Completion) -> Toolbox | None:
    """The functions that the answer may call. Raises InvalidInput."""
    choice = body.tool_choice
    if not body.tools and (choice == "required" or isinstance(choice, Named)):
        raise InvalidInput("tool_choice", "is of tools: send tools, or leave it out")
    if choice == "none":
        return None
    only = choice.function.name if isinstance(choice, Named) else ""
    return toolbox(body.tools, choice == "required" or bool(only), only)


def calls_of(message: Message, field: str) -> tuple[ToolCall, ...]:
    """The calls of an answer that is sent back. Raises InvalidInput."""
    texts = [one.function.arguments for one in message.tool_calls or ()]
    limits.TEXT.count(f"{field}.tool_calls", sum(map(len, texts)))
    return tuple(
        ToolCall(one.function.name, _arguments(one, f"{field}.tool_calls[{i}].function.arguments"))
        for i, one in enumerate(message.tool_calls or ())
    )


def _arguments(call: Called, field: str) -> Mapping[str, Any]:
    check_values(call.function.arguments.encode(), field)
    try:
        found = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidInput(field, "is no JSON object: send the arguments as they came")
    return found


def names_of(messages: Sequence[Message]) -> Iterator[str]:
    """The function whose result each message is, empty for others. Raises InvalidInput."""
    called: dict[str, str] = {}
    for i, message in enumerate(messages):
        called |= {one.id: one.function.name for one in message.tool_calls or ()}
        result = message.role == "tool"
        if result != (message.tool_call_id is not None):
            why = "is missing" if result else "does not belong here"
            raise InvalidInput(f"messages[{i}].tool_call_id", f"{why} in a message of the role {message.role}")
        if result and message.tool_call_id not in called:
            raise InvalidInput(f"messages[{i}].tool_call_id", "is that of no call before: send the call as it came")
        yield called[message.tool_call_id or ""] if result else ""


def call_json(call: ToolCall) -> dict[str, Any]:
    """A call of an answer."""
    arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
