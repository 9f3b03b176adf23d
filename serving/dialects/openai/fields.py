"""The fields of requests as clients of OpenAI send them, and what becomes of each
(https://platform.openai.com/docs/api-reference).
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from fastapi import UploadFile
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from runtime.vision.images import Encoding
from serving.dialects.http.states import Body, NoEffect, Refused
from serving.dialects.http.tools import FunctionTool

TOOLS: Final = "functions are sent as tools here, and chosen by tool_choice"
UNCALLED: Final = "nothing is called to embed it: leave it out"
SOUND: Final = "models here read and answer text and pictures, no sound: leave it out"
FILES: Final = "models here read no files: send the text, or pictures of the pages"
CACHE: Final = "beginnings are found again by themselves"
THINKING: Final = "models here do not think before they answer: leave it out"
USER: Final = "clients are told apart by their tokens"
STORED: Final = "nothing is stored: leave it out"
TIER: Final = "all requests are served alike: leave it out"
MODERATION: Final = "nothing is moderated: leave it out"


class ImageUrl(Body):
    """Where a picture is."""

    url: str
    detail: Annotated[
        Literal["auto", "low", "high"] | None, NoEffect("pictures are read in the size that the model was trained on")
    ] = None


class Part(Body):
    """A text or a picture of a message."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None
    input_audio: Annotated[Any, Refused(SOUND)] = None
    file: Annotated[Any, Refused(FILES)] = None
    prompt_cache_breakpoint: Annotated[Any, NoEffect(CACHE)] = None


def _parts(content: Any) -> Any:
    """A content of one text as parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Content = Annotated[list[Part], BeforeValidator(_parts, json_schema_input_type=str | list[Part])]


class CalledFunction(Body):
    """The function of a call; `arguments` is JSON."""

    name: str
    arguments: str


class Called(Body):
    """A call of an answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """A message of a conversation, also one that a completion had and that is sent back as it was."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: list[Called] | None = None
    tool_call_id: str | None = None
    name: Annotated[str | None, Refused("chat templates here know no names: write it into the text")] = None
    refusal: Annotated[str | None, Refused("models here do not mark refusals: send them as content")] = None
    annotations: Annotated[list[Any] | None, Refused("models here cite nothing", but=([],))] = None
    audio: Annotated[Any, Refused(SOUND)] = None
    function_call: Annotated[Any, Refused(TOOLS)] = None


Messages = Annotated[list[Message], Field(min_length=1)]


def _listed(value: Any) -> Any:
    """One text as a list of texts."""
    return [value] if isinstance(value, str) else value


class StreamOptions(Body):
    """How a stream is sent."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, NoEffect("nothing is obfuscated")] = None


class JsonSchema(Body):
    """The form of an answer."""

    name: Annotated[str | None, NoEffect("it is for people")] = None
    description: Annotated[str | None, NoEffect("models do not see it: write it into the text")] = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: Annotated[bool | None, NoEffect("answers always have the form")] = None


class ResponseFormat(Body):
    """Whether an answer is text, JSON, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Said(Body):
    """A text of a prediction."""

    type: Literal["text"]
    text: str


class Prediction(Body):
    """What the answer repeats in great part."""

    type: Literal["content"]
    content: Annotated[list[Said], BeforeValidator(_parts, json_schema_input_type=str | list[Said])]


class FunctionName(Body):
    """The function to call."""

    name: str


class Named(Body):
    """The choice of one function."""

    type: Literal["function"]
    function: FunctionName


class Completion(Body):
    """A conversation to answer. `top_k`, `min_p`, `repetition_penalty`, `beams`, `lookup_tokens`, `draft_tokens` and
    `picture_tokens` are ours, for `extra_body`.
    """

    model: str
    messages: Messages
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_listed, json_schema_input_type=str | list[str] | None)] = None
    response_format: ResponseFormat | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    prediction: Prediction | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    beams: int | None = None
    lookup_tokens: int | None = None
    picture_tokens: int | None = None
    draft_tokens: int | None = None
    logit_bias: Annotated[dict[str, Any] | None, Refused("single tokens are not weighted here", but=({},))] = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | Named | None = None
    parallel_tool_calls: Annotated[bool | None, NoEffect("an answer has one call at most")] = None
    functions: Annotated[list[Any] | None, Refused(TOOLS, but=([],))] = None
    function_call: Annotated[Any, Refused(TOOLS, but=("none", "auto"))] = None
    audio: Annotated[Any, Refused(SOUND)] = None
    modalities: Annotated[list[str] | None, Refused(SOUND, but=(["text"],))] = None
    reasoning_effort: Annotated[str | None, Refused(THINKING, but=("none",))] = None
    verbosity: Annotated[str | None, Refused("ask for it in the text, or send max_tokens", but=("medium",))] = None
    web_search_options: Annotated[Any, Refused("nothing is searched in the web: leave it out")] = None
    moderation: Annotated[Any, Refused(MODERATION)] = None
    store: Annotated[bool | None, Refused(STORED, but=(False,))] = None
    service_tier: Annotated[str | None, Refused(TIER, but=("auto", "default"))] = None
    metadata: Annotated[dict[str, str] | None, NoEffect("it is for stored completions")] = None
    user: Annotated[str | None, NoEffect(USER)] = None
    safety_identifier: Annotated[str | None, NoEffect(USER)] = None
    prompt_cache_key: Annotated[str | None, NoEffect(CACHE)] = None
    prompt_cache_retention: Annotated[str | None, NoEffect(CACHE)] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, NoEffect(CACHE)] = None


class Item(Body):
    """A text or a picture to embed."""

    text: str | None = None
    image: str | None = None


def _item(value: Any) -> Any:
    """A text as an item."""
    if not isinstance(value, str | dict):
        raise PydanticCustomError("item", "should be a valid string, or an object with a text or an image")
    return {"text": value} if isinstance(value, str) else value


def _items(value: Any) -> Any:
    """One text as a list of texts. Tokens are refused."""
    if isinstance(value, list) and value and isinstance(value[0], int | list):
        raise PydanticCustomError("tokens", "holds tokens, which are each model's own: send texts")
    return _listed(value)


class Shown(Message):
    """A message to embed."""

    tool_calls: Annotated[list[Called] | None, Refused(UNCALLED, but=([],))] = None
    tool_call_id: Annotated[str | None, Refused(UNCALLED)] = None


class Wanted(Body):
    """Texts and pictures to embed: those of `input`, or the one of `messages`, for `extra_body`."""

    model: str
    input: Annotated[
        list[Annotated[Item, BeforeValidator(_item, json_schema_input_type=str | Item)]] | None,
        BeforeValidator(_items, json_schema_input_type=str | list[str | Item] | None),
    ] = None
    messages: Annotated[list[Shown], Field(min_length=1, max_length=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: Annotated[str | None, NoEffect(USER)] = None


class Drawing(Body):
    """A picture to draw. Besides OpenAI's fields it has ours, for `extra_body`: `steps`, `guidance_scale`, `sampler`,
    `seed` and `negative_prompt`.
    """

    model: str
    prompt: str
    n: int | None = None
    size: str | None = None
    output_format: Encoding | None = None
    output_compression: int | None = None
    stream: bool | None = None
    partial_images: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    seed: int | None = None
    negative_prompt: str | None = None
    response_format: Annotated[
        str | None, Refused("pictures are not kept for download: send b64_json", but=("b64_json",))
    ] = None
    quality: Annotated[str | None, Refused("send steps instead", but=("auto", "standard"))] = None
    background: Annotated[str | None, Refused("pictures here are opaque", but=("auto", "opaque"))] = None
    style: Annotated[str | None, Refused("write it into the prompt")] = None
    complexity: Annotated[str | None, Refused("send steps instead")] = None
    moderation: Annotated[str | None, NoEffect("nothing is moderated")] = None
    user: Annotated[str | None, NoEffect(USER)] = None
    safety_identifier: Annotated[str | None, NoEffect(USER)] = None


class Edit(Drawing):
    """A picture to draw on, as a form. `strength` is ours."""

    model_config = ConfigDict(strict=False)  # forms have texts only
    image: UploadFile | None = None
    images: Annotated[list[UploadFile] | None, Field(alias="image[]")] = None
    mask: UploadFile | None = None
    strength: float | None = None
    input_fidelity: Annotated[str | None, Refused("send strength instead")] = None
    markup: Annotated[UploadFile | None, Refused("send a mask instead")] = None
