"""The tab that talks about pictures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import gradio as gr

from runtime.errors import Cancelled, InvalidInput
from runtime.tasks.chat import ChatRequest, TextDelta
from serving.enginecast_pb import model_pb2
from serving.host.job import Done, Queued
from serving.page import lines
from serving.page.backend import Models, Scripts, Visitor
from serving.page.parts import Page, Updates, busy, named, visitor
from serving.page.pictures import read
from serving.page.tabs.scripts import ScriptChoice
from serving.page.talking import OPTIONS, SWITCHES, Answers, Conversation, request_of

TAB: Final = "talk"
OWN: Final = "the model's own"
USUAL: Final = {"seed": "random"}
FIRST: Final = ("max_tokens", "temperature", "seed")
"""Those that are shown at once."""
FORMS: Final = [("any", ""), ("a JSON object", "json"), ("of a JSON schema", "schema"), ("of an expression", "regex")]
"""The forms of an answer."""


class Talk:
    """The tab."""

    def __init__(self, page: Page) -> None:
        self._page = page
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=340):
                self.chat = gr.Chatbot(
                    label="Conversation", height=460, render_markdown=False, elem_id="talk-chat", buttons=["copy"],
                    feedback_options=None, placeholder="Drop a picture below and ask about it.",
                )  # fmt: skip
                self.status = gr.HTML(elem_id="talk-status")
                self.question = gr.MultimodalTextbox(
                    show_label=False, placeholder="Ask something; pictures may be dropped here", file_count="multiple",
                    sources=["upload"], elem_id="talk-question", stop_btn=False,
                )  # fmt: skip
                with gr.Row():
                    self.halt = gr.Button("Stop", variant="stop", interactive=False, elem_id="talk-stop", min_width=90)
                    self.anew = gr.Button("New conversation", elem_id="talk-new", min_width=90)
                with gr.Accordion("How likely each token was", open=True, visible=False) as self.likely_box:
                    self.likely = gr.HTML(elem_id="talk-likely", elem_classes="wide")
            with gr.Column(scale=3, min_width=260):
                self.model = gr.Dropdown(label="Model", elem_id="talk-model", filterable=False)
                self._options = self._filled_in()
        self.said = gr.State(Conversation())

    def _filled_in(self) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        with gr.Accordion("How it answers", open=True):
            parts["system"] = gr.Textbox(label="System prompt", lines=2, elem_id="talk-system")
            parts |= {name: OPTIONS.part(name, TAB, USUAL.get(name, OWN)) for name in FIRST}
        with gr.Accordion("Form of the answer", open=False):
            parts["form"] = gr.Dropdown(FORMS, value="", label="Form", elem_id="talk-form")
            parts["grammar"] = gr.Textbox(label="JSON schema or regular expression", lines=3, elem_id="talk-grammar")
        with gr.Accordion("More", open=False):
            parts |= {name: OPTIONS.part(name, TAB, OWN) for name in OPTIONS.names if name not in FIRST}
            parts |= {name: gr.Checkbox(label=label, elem_id=f"talk-{name}") for name, label in SWITCHES.items()}
        self.scripts = ScriptChoice(ChatRequest.task, "talk-scripts")
        return parts | {"scripts": self.scripts.chosen, "script_settings": self.scripts.table}

    def wire(self) -> None:
        """Say what happens when something is clicked."""
        outputs = [self.chat, self.status, self.question, self.halt, self.said, self.likely_box, self.likely]
        self.scripts.wire()
        inputs = [self.question, self.said, self.model, *self._options.values()]
        self.question.submit(self._ask, inputs, outputs, show_progress="hidden", trigger_mode="once")
        self.halt.click(self._stop, None, None, show_progress="hidden")
        for clears in (self.anew.click, self.chat.clear):
            clears(self._clear, None, outputs, show_progress="hidden")

    @property
    def offers(self) -> list[Any]:
        """What `offered` changes."""
        return [self.model]

    def listed(self, scripts: Scripts) -> Updates:
        """The choice of scripts."""
        return self.scripts.listed(scripts)

    def offered(self, models: Models, model: str | None) -> Updates:
        """The choice of models."""
        return {self.model: named(models, model_pb2.MODEL_KIND_CHAT, model)}

    async def _stop(self, request: gr.Request) -> None:
        await self._page.runs.stop(str(request.session_hash), TAB)

    async def _clear(self, request: gr.Request) -> Updates:
        await self._stop(request)
        return {self.chat: [], self.said: Conversation(), self.status: "", self.likely_box: gr.update(visible=False)}

    async def _ask(
        self, request: gr.Request, asked: dict[str, Any], said: Conversation, model: str | None, *filled: Any
    ) -> AsyncGenerator[Updates, None]:
        files, text = asked["files"] or [], str(asked["text"] or "")
        options = dict(zip(self._options, filled, strict=True))
        answer, last = Answers(), Updates()
        yield busy(True, self.question, self.halt) | {self.status: lines.line("starting")}
        try:
            pictures = [await asyncio.to_thread(read, Path(file)) for file in files]
            if not (text or pictures):
                raise InvalidInput("question", "is empty: ask something, or give a picture")
            now = said.asked(text, pictures, files)
            async with aclosing(self._answer(visitor(request), model, now, options)) as updates:
                async for so_far, update in updates:
                    answer, last = so_far, last | update
                    yield update
        except Exception as error:
            last = {self.status: lines.failed(error), self.chat: list(said.shown)}
            if isinstance(error, Cancelled) and answer.texts:
                said = now.answered(answer)
                last |= {self.said: said, self.chat: list(said.shown), self.question: _empty()}
        yield _joined(last, busy(False, self.question, self.halt))

    def _likely(self, answers: Answers) -> Updates:
        if not answers.logprobs:
            return {}
        return {self.likely_box: gr.update(visible=True), self.likely: lines.likely(answers.logprobs)}

    async def _answer(
        self, asking: Visitor, model: str | None, now: Conversation, options: dict[str, Any]
    ) -> AsyncGenerator[tuple[Answers, Updates], None]:
        """The answer so far, and what to show of it, after each event."""
        if not model:
            raise InvalidInput("model", "is missing: this server has none that talks")
        wanted, answer = request_of(now, options), Answers()
        async with aclosing(self._page.runs.events(asking, TAB, model, wanted)) as events:
            async for event in events:
                match event:
                    case Queued():
                        yield answer, {self.status: lines.queued(event), self.chat: list(now.shown)}
                    case TextDelta():
                        answer = answer.joined(event)
                        shown = list(now.answered(answer).shown)
                        yield answer, {self.chat: shown, self.status: lines.line("answering")} | self._likely(answer)
                    case Done():
                        kept = {self.question: _empty(), self.said: now.answered(answer)}
                        yield answer, {self.status: lines.done(event, answer.counted)} | kept


def _empty() -> Any:
    return gr.update(value=None)


def _joined(one: Updates, other: Updates) -> Updates:
    """Updates of two kinds; of a part that both have, the properties of both."""
    return {
        part: (one[part] | other[part]) if part in one and part in other else (one | other)[part]
        for part in one | other
    }
