"""The form in which published chat templates write calls is found by trying them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from runtime.errors import InvalidInput
from runtime.language.calling import called
from runtime.language.calls import CallForm, ToolCall
from runtime.language.templates import ChatTemplate
from runtime.pipeline import Event, answer
from runtime.tasks.chat import Finished, TextDelta, ToolCalled

SPECIAL = ("<|start|>", "<|end|>", "[CALLS]")
HERMES = """
{%- if tools %}{{ '<|start|>system\\n' }}{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}
{{- '<|end|>' }}{% endif %}
{%- for m in messages %}{{ '<|start|>' + m.role + '\\n' }}
{%- if m.tool_calls %}{% for call in m.tool_calls %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}{{ call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}{% endfor %}{% else %}{{ m.content }}{% endif %}{{ '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"""
"""As Qwen2.5's template writes calls, and Hermes'."""
FORM = CallForm('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")
LLAMA = HERMES.replace("<tool_call>\\n", "").replace("\\n</tool_call>", "").replace('"arguments": ', '"parameters": ')


def template(folder: Path, text: str) -> ChatTemplate:
    (folder / "chat_template.jinja").write_text(text)
    return ChatTemplate(folder)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (HERMES, FORM),
        (LLAMA, CallForm('{"name": "', '", "parameters": ', "}")),
    ],
)
def test_forms(tmp_path: Path, text: str, form: CallForm) -> None:
    assert template(tmp_path, text).call_form(SPECIAL) == form


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "shows no functions"),
        (HERMES.replace("<tool_call>", "[CALLS]"), "with special tokens"),
        (HERMES.replace(" | tojson }}\n{{- '}", " }}\n{{- '}"), "writes no calls of functions as JSON"),
        (HERMES.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}"), "leaves out their results"),
        (HERMES.replace("{% else %}", "{{ raise_exception('none') }}{% else %}"), r"refuses them \(none\)"),
    ],
)
def test_templates_without(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(InvalidInput, match=f"tools: cannot be called by this model, .* {why}"):
        template(tmp_path, text).call_form(SPECIAL)


WHOLE = '<tool_call>\n{"name": "paint", "arguments": {"a": {"b": "}"}}}\n</tool_call>'


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (WHOLE, [ToolCall("paint", {"a": {"b": "}"}})]),
        (f"so <tool: {WHOLE}", ["so <tool: ", ToolCall("paint", {"a": {"b": "}"}})]),
        ("a <tool_call>", ["a <tool_call>"]),
        ("a <tool", ["a <tool"]),
        (WHOLE[:-3], [WHOLE[:-3]]),
        (WHOLE.replace('"}"', ""), [WHOLE.replace('"}"', "")]),
        ("", []),
    ],
)
def test_calls_in_texts(size: int, text: str, parts: Sequence[str | ToolCall]) -> None:
    """However the text arrives; its tokens are counted once."""
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    events: list[Event] = [*(TextDelta(piece, 2, 1) for piece in pieces), Finished("stop", 5, len(pieces), answer=2)]
    *found, end = answer(called((event for event in events), FORM), lambda call: {})
    assert end == events[-1]
    joined: list[str | ToolCall] = []
    for event in found:
        assert isinstance(event, TextDelta | ToolCalled) and event.answer == 2
        if isinstance(event, ToolCalled):
            joined.append(event.call)
        elif joined:
            joined[-1] += event.text  # type: ignore[operator]
        else:
            joined.append(event.text)
    assert joined == list(parts)
    assert sum(event.counts["output_tokens"] for event in found) == len(pieces)
