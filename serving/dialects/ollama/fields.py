"""What clients of Ollama send (https://github.com/ollama/ollama, docs/api.md), and what becomes of each field."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from serving.dialects.http.states import Body, NoEffect, Refused
from serving.dialects.http.tools import FunctionTool
from serving.dialects.ollama.options import seconds

MACHINE: Final = NoEffect("where and how models run is decided when the server starts")
CONTEXT: Final = NoEffect("the model's own context counts; where it is full, the oldest turns are left out")
MIROSTAT: Final = NoEffect("it belongs to `mirostat`")
CHOOSING: Final = "tokens are not chosen in this way here: leave it out"
TEMPLATE: Final = "templates of Ollama are not read here: send raw true, and the prompt as the model reads it"
THOUGHTS: Final = "models here have no thoughts of their own: leave it out"
WHOLE: Final = "models are loaded whole: leave it out"
OWN: Final = "it belongs to the checkpoint, or to a request: leave it out"


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _form(value: Any) -> Any:
    if not isinstance(value, str | dict | None):
        raise PydanticCustomError("format", "is no format, expected 'json' or a JSON schema")
    return value


Texts = Annotated[list[str], BeforeValidator(_one_or_more, json_schema_input_type=str | list[str])]
"""One text or several."""
KeepAlive = Annotated[float, PlainValidator(seconds, json_schema_input_type=str | float)]
"""Seconds that the model stays loaded after the request."""
Format = Annotated[Any, PlainValidator(_form, json_schema_input_type=str | dict[str, Any] | None)]
"""The form of answers."""
Think = Annotated[Any, Refused(THOUGHTS, but=(False,))]
Shift = Annotated[
    bool | None, Refused("an answer ends where the context does: send false, or leave it out", but=(False,))
]


class MachineOptions(Body):
    """Options of the machine that a model runs on."""

    num_ctx: Annotated[int | None, CONTEXT] = None
    numa: Annotated[bool | None, MACHINE] = None
    num_batch: Annotated[int | None, MACHINE] = None
    num_gpu: Annotated[int | None, MACHINE] = None
    main_gpu: Annotated[int | None, MACHINE] = None
    low_vram: Annotated[bool | None, MACHINE] = None
    f16_kv: Annotated[bool | None, MACHINE] = None
    use_mmap: Annotated[bool | None, MACHINE] = None
    use_mlock: Annotated[bool | None, MACHINE] = None
    num_thread: Annotated[int | None, MACHINE] = None


class AnswerOptions(MachineOptions):
    """How a model answers."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    num_predict: int | None = None
    stop: Texts | None = None
    seed: int | None = None
    typical_p: Annotated[float | None, Refused(CHOOSING, but=(1.0,))] = None
    tfs_z: Annotated[float | None, Refused(CHOOSING, but=(1.0,))] = None
    mirostat: Annotated[int | None, Refused(CHOOSING, but=(0,))] = None
    mirostat_tau: Annotated[float | None, MIROSTAT] = None
    mirostat_eta: Annotated[float | None, MIROSTAT] = None
    repeat_last_n: Annotated[
        int | None, Refused("a penalty counts the whole conversation here: send -1, or leave it out", but=(-1,))
    ] = None
    penalize_newline: Annotated[
        bool | None, Refused("newlines are tokens like others here: send true, or leave it out", but=(True,))
    ] = None
    num_keep: Annotated[
        int | None, Refused("system messages, pictures and the last question stay here: leave it out", but=(-1, 0))
    ] = None
    logits_all: Annotated[bool | None, Refused("logits are not kept here: leave it out", but=(False,))] = None
    vocab_only: Annotated[bool | None, Refused(WHOLE, but=(False,))] = None
    embedding_only: Annotated[bool | None, Refused(WHOLE, but=(False,))] = None


class Options(AnswerOptions):
    """How a model answers or draws. Those of the other task are refused."""

    negative_prompt: str | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    strength: float | None = None


class Answered(Body):
    """What requests of answers have in common."""

    model: str
    options: AnswerOptions | None = None
    stream: bool | None = None
    keep_alive: KeepAlive | None = None
    truncate: bool | None = None
    format: Format = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    think: Think = None
    shift: Shift = None


class CalledFunction(Body):
    """The function of a call."""

    name: str
    arguments: dict[str, Any]
    index: Annotated[int | None, NoEffect("calls are in their order")] = None
    description: Annotated[str | None, NoEffect("it is for people")] = None


class Called(Body):
    """A call of an answer."""

    function: CalledFunction
    id: Annotated[str | None, NoEffect("results are of the calls before them, by their names")] = None
    type: Annotated[str | None, NoEffect("calls are of functions")] = None


class Message(Body):
    """A message of a conversation, also an answer that is sent back as it was."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: list[str] | None = None
    thinking: Annotated[str | None, Refused(THOUGHTS, but=("",))] = None
    tool_calls: list[Called] | None = None
    tool_name: str | None = None
    tool_call_id: Annotated[str | None, NoEffect("results are of the calls before them, by their names")] = None


class Chat(Answered):
    """A request of /api/chat."""

    messages: list[Message] | None = None
    tools: list[FunctionTool] | None = None


class Generate(Answered):
    """A request of /api/generate. `width`, `height` and `steps` are of models that draw."""

    options: Options | None = None
    prompt: str | None = None
    system: str | None = None
    images: list[str] | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    raw: bool | None = None
    suffix: Annotated[str | None, Refused("models here do not fill in: send what comes before", but=("",))] = None
    template: Annotated[str | None, Refused(TEMPLATE, but=("",))] = None
    context: Annotated[
        list[int] | None, Refused("send the conversation to /api/chat: its beginning is found again", but=([],))
    ] = None


class Embed(Body):
    """A request of /api/embed. `images` are of models that see, and come behind the texts."""

    model: str
    input: Texts = Field(default_factory=list)
    images: list[str] | None = None
    dimensions: Annotated[int | None, Field(ge=1)] = None
    keep_alive: KeepAlive | None = None
    options: MachineOptions | None = None
    truncate: Annotated[
        bool | None, Refused("a text that is too long is refused: send false, or leave it out", but=(False,))
    ] = None


class Embedding(Body):
    """A request of /api/embeddings, the form of before."""

    model: str
    prompt: str
    keep_alive: KeepAlive | None = None
    options: MachineOptions | None = None


class Name(Body):
    """A request about a model. Old clients call it `name`."""

    model: str | None = None
    name: str | None = None


class Show(Name):
    """A request of /api/show."""

    verbose: Annotated[bool | None, NoEffect("all that is known is always shown")] = None
    system: Annotated[str | None, Refused(OWN, but=("",))] = None
    template: Annotated[str | None, Refused(OWN, but=("",))] = None
    options: Annotated[dict[str, Any] | None, Refused(OWN, but=({},))] = None


class Pull(Name):
    """A request of /api/pull."""

    stream: bool | None = None
    insecure: Annotated[bool | None, NoEffect("bundles come from a folder of this machine")] = None


class Push(Pull):
    """A request of /api/push."""


class Copy(Body):
    """A request of /api/copy."""

    source: str
    destination: str


class Create(Name):
    """A request of /api/create. `from_` names a checkpoint, `quantize` is a format of `enginecast build --quant`."""

    from_: Annotated[str, Field(alias="from")]
    quantize: str | None = None
    stream: bool | None = None
    files: Annotated[
        dict[str, str] | None, Refused("put the checkpoint into the folder of --checkpoints", but=({},))
    ] = None
    adapters: Annotated[dict[str, str] | None, Refused("build with `enginecast build --lora`", but=({},))] = None
    template: Annotated[str | None, Refused(OWN, but=("",))] = None
    system: Annotated[str | None, Refused(OWN, but=("",))] = None
    license: Annotated[Any, Refused(OWN, but=("", []))] = None
    parameters: Annotated[dict[str, Any] | None, Refused(OWN, but=({},))] = None
    messages: Annotated[list[Any] | None, Refused(OWN, but=([],))] = None
