"""What is read from pictures: the parameters in their files, and by a chat model what they show."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from fastapi import APIRouter

from runtime.diffusion.further import SIZE
from runtime.diffusion.infotext import KEY, Infotext
from runtime.errors import InvalidInput
from runtime.language.templates import Message
from runtime.tasks.chat import ChatRequest, TextDelta
from runtime.vision.texts import COMMENT, texts_of
from serving.dialects.a1111.choosing import answering
from serving.dialects.a1111.fields import Interrogation, PngInfo, Question
from serving.dialects.http.pictures import file_of
from serving.dialects.http.running import collected, run
from serving.host.models import ModelHost

CLIP: Final = "clip"
OWN_PROMPT: Final = "Use Prompt"
"""The question of SD.Next that stands for the field prompt."""


def add(routes: APIRouter, host: ModelHost) -> None:
    """Add the endpoints."""

    @routes.post("/sdapi/v1/png-info")
    async def png_info(message: PngInfo) -> dict[str, Any]:
        return await asyncio.to_thread(_parameters, message.image)

    @routes.post("/sdapi/v1/interrogate")
    async def interrogate(message: Interrogation) -> dict[str, str]:
        name = "" if message.model == CLIP else message.model
        return {"caption": await _answer(host, name, Question(image=message.image))}

    @routes.post("/sdapi/v1/vqa")
    async def ask(message: Question) -> dict[str, str]:
        return {"answer": await _answer(host, message.model or "", message)}

    @routes.post("/sdapi/v1/caption")
    async def caption(message: Question) -> dict[str, str]:
        text = await _answer(host, message.model or "", message)
        return {"backend": "vlm", "caption": text, "answer": text}


def _parameters(text: str) -> dict[str, Any]:
    """The parameters in a file, its other texts, and the parameters one by one, as the web UI names them."""
    file = file_of(text.strip(), "image")
    texts = texts_of(file.data, "image")
    info = texts.pop(KEY, None) or texts.pop(COMMENT, "")
    read = Infotext.parse(info)
    values: dict[str, str] = {}
    for name, value in read.values.items():
        if size := SIZE.fullmatch(value):
            values |= {f"{name}-1": size[1], f"{name}-2": size[2]}
        else:
            values[name] = value
    found = {"Prompt": read.prompt, "Negative prompt": read.negative_prompt, **values} if info else {}
    return {"info": info, "items": texts, "parameters": found}


async def _answer(host: ModelHost, name: str, message: Question) -> str:
    """What a chat model says of a picture."""
    picture = await asyncio.to_thread(file_of, message.image, "image")
    asked = message.question
    if asked == OWN_PROMPT:
        asked = message.prompt
    elif asked and message.prompt:
        raise InvalidInput("prompt", f"comes with a question: send one of both, or the question '{OWN_PROMPT}'")
    asked = asked or message.prompt
    said = [Message("system", (message.system,))] if message.system else []
    request = ChatRequest(
        messages=(*said, Message("user", (picture, asked) if asked else (picture,))),
        max_tokens=message.max_tokens,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        beams=message.num_beams,
    )
    events = await collected(run(host, answering(host, name).name, request))
    return "".join(event.text for event in events if isinstance(event, TextDelta)).strip()
