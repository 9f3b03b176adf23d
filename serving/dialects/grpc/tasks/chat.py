"""ChatService: converts conversations and their answers."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Final

from runtime import limits
from runtime.errors import InvalidInput
from runtime.language import text
from runtime.language.grammar import Grammar
from runtime.language.logprobs import TokenLogprob
from runtime.language.overflow import Overflow
from runtime.pipeline import Event
from runtime.tasks.chat import GUESSES, ChatRequest, Finished, TextDelta
from runtime.vision import images
from serving.dialects.grpc.messages import done_event, engines, file_of, given, queued, queued_event, timings
from serving.dialects.grpc.task import GrpcTask
from serving.enginecast_pb import chat_pb2, model_pb2
from serving.host.job import Done, Queued

ROLES: Final[dict[int, text.Role]] = {
    chat_pb2.ROLE_SYSTEM: "system",
    chat_pb2.ROLE_USER: "user",
    chat_pb2.ROLE_ASSISTANT: "assistant",
}
REASONS: Final = {"stop": chat_pb2.FINISH_REASON_STOP, "length": chat_pb2.FINISH_REASON_LENGTH}
ROLE_NUMBERS: Final = {role: number for number, role in ROLES.items()}
OVERFLOW_NUMBERS: Final = {
    "refuse": chat_pb2.CONTEXT_OVERFLOW_REFUSE,
    "slide": chat_pb2.CONTEXT_OVERFLOW_SLIDE,
}
OVERFLOW_NAMES: Final[dict[int, Overflow]] = {
    chat_pb2.CONTEXT_OVERFLOW_UNSPECIFIED: "refuse",
    chat_pb2.CONTEXT_OVERFLOW_REFUSE: "refuse",
    chat_pb2.CONTEXT_OVERFLOW_SLIDE: "slide",
}
REASON_NAMES: Final = {number: reason for reason, number in REASONS.items()}
COUNTS: Final = ("completion_tokens", *GUESSES)
"""What the end of each answer counts."""
OPTIONS: Final = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "seed",
    "beams",
    "length_penalty",
    "answers",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "logprobs",
    "lookup_tokens",
)
"""Fields that may be left open, with the same name in the message."""
PLAIN: Final = ("fills_context", "raw", "prediction", "picture_tokens", "draft_tokens")
"""Those that may not."""


def chat_request(message: chat_pb2.ChatRequest) -> ChatRequest:
    """Convert a request. Picture files are not decoded yet. Raises InvalidInput that names the field."""
    limits.MESSAGES.length("messages", message.messages)
    limits.PARTS.count("messages", sum(len(turn.parts) for turn in message.messages))
    limits.PICTURES.count("messages", sum(part.HasField("image") for turn in message.messages for part in turn.parts))
    limits.STOPS.length("stop", message.stop)
    turns = tuple(_turn(turn, f"messages[{i}]") for i, turn in enumerate(message.messages))
    if message.context_overflow not in OVERFLOW_NAMES:
        raise InvalidInput(
            "context_overflow",
            f"is {message.context_overflow}, expected CONTEXT_OVERFLOW_REFUSE or CONTEXT_OVERFLOW_SLIDE",
        )
    overflow = OVERFLOW_NAMES[message.context_overflow]
    grammar = _grammar(message.grammar) if message.HasField("grammar") else None
    options = given(message, OPTIONS) | {name: getattr(message, name) for name in PLAIN}
    return ChatRequest(turns, stop=tuple(message.stop), context_overflow=overflow, grammar=grammar, **options)


def _grammar(message: chat_pb2.Grammar) -> Grammar:
    match message.WhichOneof("form"):
        case "json_schema":
            return Grammar("json_schema", message.json_schema)
        case "regex":
            return Grammar("regex", message.regex)
        case _:
            raise InvalidInput("grammar", "is empty, expected json_schema or regex")


def _turn(turn: chat_pb2.Message, field: str) -> text.Message:
    if turn.role not in ROLES:
        raise InvalidInput(f"{field}.role", "is missing or unknown, expected ROLE_SYSTEM, ROLE_USER or ROLE_ASSISTANT")
    return text.Message(
        ROLES[turn.role], tuple(_part(part, f"{field}.parts[{i}]") for i, part in enumerate(turn.parts))
    )


def _part(part: chat_pb2.Part, field: str) -> text.Part:
    match part.WhichOneof("content"):
        case "text":
            return part.text
        case "image":
            return images.PictureFile.open(part.image, f"{field}.image")
        case _:
            raise InvalidInput(field, "is empty, expected text or image")


class ChatStream:
    """Converts the events of one chat request to responses."""

    def __init__(self) -> None:
        self._finished: list[Finished] = []

    def response(self, event: Event) -> chat_pb2.ChatResponse | None:
        """The response for an event, None if it has none."""
        match event:
            case Queued():
                return chat_pb2.ChatResponse(queued=queued(event))
            case TextDelta(delta, answer):
                logprobs = map(_logprob_message, event.logprobs)
                return chat_pb2.ChatResponse(delta=chat_pb2.TextDelta(text=delta, answer=answer, logprobs=logprobs))
            case Finished():
                self._finished.append(event)
            case Done():
                return chat_pb2.ChatResponse(done=self._done(event))
        return None

    def _done(self, event: Done) -> chat_pb2.ChatDone:
        first = self._finished[0]
        ends = [
            chat_pb2.AnswerEnd(reason=REASONS[one.reason], **{name: getattr(one, name) for name in COUNTS})
            for one in self._finished
        ]
        return chat_pb2.ChatDone(
            reason=REASONS[first.reason],
            prompt_tokens=first.prompt_tokens,
            completion_tokens=first.completion_tokens,
            timings=timings(event),
            engines=engines(event),
            notes=event.notes,
            left_out_messages=first.left_out,
            answers=ends,
            reused_tokens=first.reused_tokens,
        )


def chat_message(model: str, request: ChatRequest) -> chat_pb2.ChatRequest:
    """Convert a request to its message. Arrays become PNG files."""
    if request.tools is not None or any(turn.calls or turn.role not in ROLE_NUMBERS for turn in request.messages):
        raise InvalidInput("tools", "cannot be sent over gRPC: use the HTTP endpoints of OpenAI or Ollama")
    options = {name: getattr(request, name) for name in (*OPTIONS, *PLAIN)}
    turns = [
        chat_pb2.Message(role=ROLE_NUMBERS[turn.role], parts=map(_part_message, turn.content))  # type: ignore[arg-type]
        for turn in request.messages
    ]
    overflow = OVERFLOW_NUMBERS[request.context_overflow]
    form = request.grammar
    grammar = None if form is None else chat_pb2.Grammar(**{form.kind: form.text})
    return chat_pb2.ChatRequest(
        model=model, messages=turns, stop=request.stop, context_overflow=overflow, grammar=grammar, **options
    )


def _part_message(part: text.Part) -> chat_pb2.Part:
    if isinstance(part, str):
        return chat_pb2.Part(text=part)
    return chat_pb2.Part(image=file_of(part))


def chat_events(responses: Iterator[chat_pb2.ChatResponse]) -> Generator[Event, None, None]:
    """The events of a stream of ChatService.Chat."""
    for response in responses:
        match response.WhichOneof("event"):
            case "queued":
                yield queued_event(response.queued)
            case "delta":
                delta = response.delta
                yield TextDelta(delta.text, delta.answer, logprobs=tuple(map(_logprob, delta.logprobs)))
            case "done":
                yield from _finished(response.done)
                yield done_event(response.done)


def _logprob_message(one: TokenLogprob) -> chat_pb2.TokenLogprob:
    top = map(_logprob_message, one.top)
    return chat_pb2.TokenLogprob(id=one.id, piece=one.piece, logprob=one.logprob, top=top)


def _logprob(message: chat_pb2.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(message.id, message.piece, message.logprob, tuple(map(_logprob, message.top)))


def _finished(done: chat_pb2.ChatDone) -> Iterator[Finished]:
    """The end of each answer."""
    for number, one in enumerate(done.answers):
        reason = REASON_NAMES[one.reason]
        counts = {name: getattr(one, name) for name in COUNTS}
        yield Finished(
            reason, done.prompt_tokens, left_out=done.left_out_messages, answer=number,
            reused_tokens=done.reused_tokens, **counts,
        )  # fmt: skip


def opening(message: chat_pb2.ChatRequest) -> bytes:
    """The first picture that the user shows in the first question; without one, all up to that question."""
    turns = list(message.messages)
    end = next((i + 1 for i, turn in enumerate(turns) if turn.role == chat_pb2.ROLE_USER), len(turns))
    picture = next((part.image for turn in turns[:end] for part in turn.parts if part.HasField("image")), None)
    return picture or b"".join(turn.SerializeToString(deterministic=True) for turn in turns[:end])


TASK: Final = GrpcTask(
    ChatRequest.task,
    chat_pb2.DESCRIPTOR.services_by_name["ChatService"],
    chat_request,
    ChatStream,
    chat_message,
    chat_events,
    model_pb2.MODEL_KIND_CHAT,
    opening,
)
