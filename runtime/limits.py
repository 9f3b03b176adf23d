"""Every limit of a request, each declared once: what it bounds, how much, in what unit, and why. `docs/limits.md` lists
them.

A limit is checked by length or count, before the value is tokenized, decoded, hashed or compared with anything. What
depends on the model (its context, its picture sizes) is checked by its pipeline, behind these.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import Final

from runtime.errors import InvalidInput

LIMITS: Final[list[Limit]] = []
"""All of them, in the order of their declaration."""


@dataclass(frozen=True)
class Limit:
    """At most `most` (and, of numbers, at least `least`) of `unit`. `fields` are those of the protocol it is about."""

    name: str
    most: int
    unit: str
    why: str
    fields: tuple[str, ...] = ()
    least: int | None = None

    def __post_init__(self) -> None:
        LIMITS.append(self)

    def length(self, field: str, value: Sized) -> None:
        """Raise InvalidInput naming `field` when the value is too long."""
        self.count(field, len(value))

    def count(self, field: str, count: int) -> None:
        """Raise InvalidInput naming `field` when it has more than `most`."""
        if count > self.most:
            raise InvalidInput(field, f"has {count:,} {self.unit}, expected at most {self.most:,}")

    def number(self, field: str, value: float) -> None:
        """Raise InvalidInput naming `field` unless the value is a number from `least` to `most`."""
        least = self.least or 0
        if not least <= value <= self.most:  # false of NaN too
            raise InvalidInput(field, f"is {value}, expected {least} to {self.most}")


IMAGE, CHAT = "GenerateRequest", "ChatRequest"

# The message as it arrives.
MESSAGE: Final = Limit(
    "message", 20 << 20, "bytes", "pictures travel in chat requests: one of the largest size, or several of a camera"
)
FIELDS: Final = Limit(
    "fields of a message",
    10_000,
    "fields, those of nested messages included",
    "an empty part takes 2 bytes to send and 50 to hold",
)
ARRIVAL: Final = Limit(
    "arrival of a message", 30, "seconds from the beginning of the call", "a message that never ends holds memory"
)
METADATA: Final = Limit("metadata of a call", 8 << 10, "bytes", "gRPC's own default; none is read")

# Fields.
MODEL_NAME: Final = Limit(
    "model name", 200, "characters", "names are compared with those served",
    (f"{IMAGE}.model", f"{CHAT}.model", *(f"{call}ModelRequest.name" for call in ("Get", "Load", "Unload")),
        "HealthCheckRequest.service"),
)  # fmt: skip
NAME: Final = Limit(
    "target, sampler", 64, "characters", "compared with those known", ("LoadModelRequest.target", f"{IMAGE}.sampler")
)
GRACE: Final = Limit(
    "grace period", 3600, "seconds", "unloading ends some time", ("UnloadModelRequest.grace_seconds",), least=0
)
PROMPT: Final = Limit(
    "prompt, negative prompt",
    10_000,
    "characters",
    "text encoders read 77 tokens",
    (f"{IMAGE}.prompt", f"{IMAGE}.negative_prompt"),
)
STEPS: Final = Limit(
    "steps", 1000, "steps", "the timesteps that diffusion models are trained on", (f"{IMAGE}.steps",), least=1
)
IMAGES: Final = Limit("images", 64, "pictures", "of one request", (f"{IMAGE}.images",), least=1)
ALL_STEPS: Final = Limit(
    "steps times images",
    4000,
    "steps",
    "one request may not hold the engine for a day",
    (f"{IMAGE}.steps", f"{IMAGE}.images"),
)
PREVIEW_EVERY: Final = Limit("preview_every", 1000, "steps", "as many as steps", (f"{IMAGE}.preview_every",), least=0)
GUIDANCE: Final = Limit(
    "guidance_scale", 50, "(a factor)", "beyond it pictures saturate", (f"{IMAGE}.guidance_scale",), least=0
)
ETA: Final = Limit("eta", 1, "(a factor)", "1 is as noisy as DDPM", (f"{IMAGE}.eta",), least=0)
EDGE: Final = Limit(
    "width, height", 65_536, "pixels", "a model's own range, which `INVALID_ARGUMENT` states, is far below",
    (f"{IMAGE}.width", f"{IMAGE}.height"), least=0,
)  # fmt: skip
IMAGE_SEED: Final = Limit(
    "seed of pictures",
    2**63 - 1,
    "(a number, images - 1 less)",
    "picture n is drawn from seed + n",
    (f"{IMAGE}.seed",),
    least=0,
)
SEED: Final = Limit("seed of an answer", 2**64 - 1, "(a number)", "what the field holds", (f"{CHAT}.seed",), least=0)
MESSAGES: Final = Limit(
    "messages", 1000, "messages", "templates are rendered over all of them", (f"{CHAT}.messages", "Message.role")
)
PARTS: Final = Limit("parts", 2000, "parts of all messages", "as messages", ("Message.parts",))
TEXT: Final = Limit(
    "text",
    100_000,
    "characters of all parts",
    "some 25,000 tokens; tokenizing takes 200 bytes and a microsecond for each byte",
    ("Part.text",),
)
PICTURES: Final = Limit(
    "pictures",
    32,
    "pictures of all messages",
    "they are encoded together, and each takes tokens of the context",
    ("Part.image",),
)
PICTURE_BYTES: Final = Limit("size of a picture file", 16 << 20, "bytes", "photographs of cameras", ("Part.image",))
PICTURE_PIXELS: Final = Limit(
    "pixels of a picture",
    64_000_000,
    "pixels",
    "read from the header; one picture at a time is decoded",
    ("Part.image",),
)
DECODED: Final = Limit(
    "a decoded picture", 192 << 20, "bytes of memory to decode it in",
    "4 a pixel of RGB files, 5 of grey ones, 8 with transparency or turned by EXIF, 8 of HEIC, 12 of WebP and AVIF",
    ("Part.image",),
)  # fmt: skip
RESIZED_PIXELS: Final = Limit(
    "pixels of a resized picture",
    8_000_000,
    "pixels",
    "a strip whose short edge gets the model's size becomes very long",
    ("Part.image",),
)
REQUEST_PIXELS: Final = Limit(
    "pixels of all pictures",
    256_000_000,
    "pixels",
    "read from the headers; decoding takes a second per 64 million",
    ("Part.image",),
)
STOPS: Final = Limit(
    "stop strings", 16, "strings", "each is looked for in every piece of the answer", (f"{CHAT}.stop",)
)
STOP: Final = Limit("stop string", 500, "characters", "as much text may be held back", (f"{CHAT}.stop",))
MAX_TOKENS: Final = Limit(
    "max_tokens", 1_000_000, "tokens", "the model's context is below", (f"{CHAT}.max_tokens",), least=1
)
TEMPERATURE: Final = Limit(
    "temperature",
    100,
    "(a divisor; 0, or at least 0.01)",
    "beyond it all tokens are alike",
    (f"{CHAT}.temperature",),
    least=0,
)
TOP_K: Final = Limit(
    "top_k",
    2**32 - 1,
    "tokens",
    "what the field holds; beyond the vocabulary it has no effect",
    (f"{CHAT}.top_k",),
    least=0,
)
TOP_P: Final = Limit("top_p", 1, "(a probability, above 0)", "1 is all tokens", (f"{CHAT}.top_p",), least=0)
PENALTY: Final = Limit(
    "repetition_penalty", 100, "(a factor, at least 0.01)", "1 is no penalty", (f"{CHAT}.repetition_penalty",)
)
BEAMS: Final = Limit(
    "beams", 8, "beams", "each holds keys and values of its own, and takes a step of the decoder", (f"{CHAT}.beams",),
    least=1,
)  # fmt: skip
LENGTH_PENALTY: Final = Limit(
    "length_penalty", 5, "(an exponent)", "lengths to this power stay numbers", (f"{CHAT}.length_penalty",), least=-5
)

# What clients take of the server.
CALLS: Final = Limit("calls at once", 4000, "calls of all clients", "each holds some memory while it waits")
CONNECTION_CALLS: Final = Limit("calls at once on a connection", 1000, "calls", "further ones wait in the client")
ARRIVING: Final = Limit("messages arriving at once on a connection", 4, "messages", "further ones wait unread")
CHECKED: Final = Limit(
    "requests checked at once of a connection", 1, "requests", "tokenizing a long text takes a part of a second"
)
CHECKS: Final = Limit("requests checked at once", 2, "requests of all clients", "as above")
WAITING_BYTES: Final = Limit(
    "pictures waiting", 128 << 20, "bytes of the files of all requests", "they are kept until it is their turn"
)
UNREAD: Final = Limit(
    "answers unread", 30, "seconds until the request is cancelled", "a reader that stands still may not hold the engine"
)
UNREAD_BYTES: Final = Limit(
    "pictures unread",
    32 << 20,
    "bytes of the pictures of a request",
    "older previews are left out, and drawing waits to be read",
)
VANISHED: Final = Limit("a client that vanished", 30, "seconds until its requests are cancelled", "pings go unanswered")
ERROR_TEXT: Final = Limit("error message", 1000, "characters", "it travels in trailers of 8 KiB, percent-encoded")


def table() -> str:
    """All limits as a Markdown table: `docs/limits.md`."""
    rows = [f"| {one.name} | {_shown(one)} | {one.unit} | {one.why} | {_fields(one)} |" for one in LIMITS]
    return "\n".join(["| Limit | Value | Unit | Why | Fields |", "|---|---|---|---|---|", *rows]) + "\n"


def _shown(limit: Limit) -> str:
    return f"{limit.most:,}" if limit.least is None else f"{limit.least:,} to {limit.most:,}"


def _fields(limit: Limit) -> str:
    return ", ".join(f"`{field}`" for field in limit.fields)
