"""The tab that talks about pictures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gradio as gr

from runtime.errors import Cancelled, InvalidInput
from runtime.tasks.chat import TextDelta
from serving.dialects.python.requests import Message, chat_request
from serving.enginecast_pb import model_pb2
from serving.host.job import Done, Queued
from serving.page import lines
from serving.page.backend import Models
from serving.page.drawing import number, whole
from serving.page.parts import Page, Updates, busy, named, optional
from serving.page.pictures import read

TAB: Final = "talk"
OWN: Final = "the model's own"
LABELS: Final = {
    "max_tokens": "Longest answer, tokens",
    "temperature": "Temperature",
    "top_k": "Likeliest tokens (top k)",
    "top_p": "Joint probability (top p)",
    "repetition_penalty": "Repetition penalty",
    "seed": "Seed",
}
"""The options of an answer, and what the page calls them."""
WHOLE: Final = ("max_tokens", "top_k", "seed")


@dataclass(frozen=True)
class Conversation:
    """What was said, as the model is told, and as the page shows it."""

    messages: tuple[Message, ...] = ()
    shown: tuple[dict[str, Any], ...] = ()

    def asked(self, text: str, pictures: list[bytes], files: list[str]) -> Conversation:
        """With a question about pictures."""
        content: list[Any] = [*pictures, text] if text else list(pictures)
        shown = [*({"path": file} for file in files), *([text] if text else [])]
        rows = tuple({"role": "user", "content": one} for one in shown)
        return Conversation((*self.messages, Message("user", content)), (*self.shown, *rows))

    def answered(self, text: str) -> Conversation:
        """With what there is of an answer."""
        return Conversation(
            (*self.messages, Message("assistant", text)), (*self.shown, {"role": "assistant", "content": text})
        )


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
            with gr.Column(scale=3, min_width=260):
                self.model = gr.Dropdown(label="Model", elem_id="talk-model", filterable=False)
                self._options = self._filled_in()
        self.said = gr.State(Conversation())

    def _filled_in(self) -> dict[str, Any]:
        with gr.Accordion("How it answers", open=True):
            system = gr.Textbox(label="System prompt", lines=2, elem_id="talk-system")
            return {"system": system} | {
                name: optional(label, "random" if name == "seed" else OWN, f"talk-{name}")
                for name, label in LABELS.items()
            }

    def wire(self) -> None:
        """Say what happens when something is clicked."""
        outputs = [self.chat, self.status, self.question, self.halt, self.said]
        inputs = [self.question, self.said, self.model, *self._options.values()]
        self.question.submit(self._ask, inputs, outputs, show_progress="hidden", trigger_mode="once")
        self.halt.click(self._stop, None, None, show_progress="hidden")
        for clears in (self.anew.click, self.chat.clear):
            clears(self._clear, None, outputs, show_progress="hidden")

    def offered(self, models: Models, model: str | None) -> Updates:
        """The choice of models."""
        return {self.model: named(models, model_pb2.MODEL_KIND_CHAT, model)}

    async def _stop(self, request: gr.Request) -> None:
        await self._page.runs.stop(str(request.session_hash), TAB)

    async def _clear(self, request: gr.Request) -> Updates:
        await self._stop(request)
        return {self.chat: [], self.said: Conversation(), self.status: ""}

    async def _ask(
        self, request: gr.Request, asked: dict[str, Any], said: Conversation, model: str | None, *filled: Any
    ) -> AsyncGenerator[Updates, None]:
        files, text = asked["files"] or [], str(asked["text"] or "")
        options = dict(zip(self._options, filled, strict=True))
        answer, last = "", Updates()
        yield busy(True, self.question, self.halt) | {self.status: lines.line("starting")}
        try:
            pictures = [await asyncio.to_thread(read, Path(file)) for file in files]
            if not (text or pictures):
                raise InvalidInput("question", "is empty: ask something, or give a picture")
            now = said.asked(text, pictures, files)
            async with aclosing(self._answer(str(request.session_hash), model, now, options)) as updates:
                async for so_far, update in updates:
                    answer, last = so_far, last | update
                    yield update
        except Exception as error:
            last = {self.status: lines.failed(error), self.chat: list(said.shown)}
            if isinstance(error, Cancelled) and answer:
                said = now.answered(answer)
                last |= {self.said: said, self.chat: list(said.shown), self.question: _empty()}
        yield _joined(last, busy(False, self.question, self.halt))

    async def _answer(
        self, session: str, model: str | None, now: Conversation, options: dict[str, Any]
    ) -> AsyncGenerator[tuple[str, Updates], None]:
        """The answer so far, and what to show of it, after each event."""
        if not model:
            raise InvalidInput("model", "is missing: this server has none that talks")
        wanted, answer = request_of(now, options), ""
        async with aclosing(self._page.runs.events(session, TAB, model, wanted)) as events:
            async for event in events:
                match event:
                    case Queued():
                        yield answer, {self.status: lines.queued(event), self.chat: list(now.shown)}
                    case TextDelta():
                        answer += event.text
                        yield (
                            answer,
                            {self.chat: list(now.answered(answer).shown), self.status: lines.line("answering")},
                        )
                    case Done():
                        text = f"{len(answer)} characters"
                        kept = {self.question: _empty(), self.said: now.answered(answer)}
                        yield answer, {self.status: lines.done(event, text)} | kept


def _empty() -> Any:
    return gr.update(value=None)


def _joined(one: Updates, other: Updates) -> Updates:
    """Updates of two kinds; of a part that both have, the properties of both."""
    return {
        part: (one[part] | other[part]) if part in one and part in other else (one | other)[part]
        for part in one | other
    }


def request_of(now: Conversation, options: dict[str, Any]) -> Any:
    """The request for an answer. Raises InvalidInput."""
    system = [Message("system", options["system"])] if options["system"] else []
    given = {name: (whole if name in WHOLE else number)(name, options[name]) for name in LABELS}
    return chat_request([*system, *now.messages], (), given)
