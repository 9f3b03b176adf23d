"""Functions that answers may call, as clients of OpenAI and Ollama send them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from runtime.language.tools import Tool, Toolbox
from serving.dialects.http.states import Body, NoEffect


class Function(Body):
    """A function; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[bool | None, NoEffect("arguments always have the form of the schema")] = None


class FunctionTool(Body):
    """A tool, which is a function."""

    type: Literal["function"] = "function"
    function: Function


def toolbox(tools: Sequence[FunctionTool] | None, must: bool = False, only: str = "") -> Toolbox | None:
    """The functions of a request, None if it has none. Raises InvalidInput."""
    return Toolbox(tuple(_tool(one.function) for one in tools), must, only) if tools else None


def _tool(function: Function) -> Tool:
    given = {} if function.parameters is None else {"parameters": function.parameters}
    return Tool(function.name, function.description or "", **given)
