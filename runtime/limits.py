"""The limits of requests. Each is declared once, with its value, unit and reason. `docs/limits.md` lists them.

Lengths and counts are checked before a value is tokenized, decoded, hashed or compared. Limits of the model (its
context, its picture sizes) are checked later, by its pipeline.
"""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import Final

from runtime.errors import InvalidInput

LIMITS: Final[list[Limit]] = []
"""All limits, in the order of their declaration."""


@dataclass(frozen=True)
class Limit:
    """At most `most` of `unit`, and for numbers at least `least`. `fields` lists the limited fields of messages."""

    name: str
    most: int
    unit: str
    why: str
    fields: tuple[str, ...] = ()
    least: int | None = None

    def __post_init__(self) -> None:
        LIMITS.append(self)

    def length(self, field: str, value: Sized) -> None:
        """Raise InvalidInput that names `field` if the value is too long."""
        self.count(field, len(value))

    def count(self, field: str, count: int) -> None:
        """Raise InvalidInput that names `field` if the count is above `most`."""
        if count > self.most:
            raise InvalidInput(field, f"has {count:,} {self.unit}, expected at most {self.most:,}")

    def number(self, field: str, value: float) -> None:
        """Raise InvalidInput that names `field` unless the value is a number from `least` to `most`."""
        least = self.least or 0
        if not least <= value <= self.most:  # false of NaN too
            raise InvalidInput(field, f"is {value}, expected {least} to {self.most}")


IMAGE, CHAT, EMBED, INFER = "GenerateRequest", "ChatRequest", "EmbedRequest", "ModelInferRequest"
SHOWN: Final = ("Part.image", f"{EMBED}.images")

# Messages, before they are parsed.
MESSAGE: Final = Limit("message", 20 << 20, "bytes", "room for one picture of the largest size, or several photographs")
FIELDS: Final = Limit(
    "fields of a message",
    10_000,
    "fields, including those of nested messages",
    "an empty part has 2 bytes on the wire and 50 in memory",
)
ARRIVAL: Final = Limit(
    "arrival of a message",
    30,
    "seconds from the start of the call, or of the connection to the end of its handshake",
    "an unfinished message occupies memory",
)
METADATA: Final = Limit("metadata of a call", 8 << 10, "bytes", "gRPC's default; a token and an id need less")

# Fields.
MODEL_NAME: Final = Limit(
    "model name", 200, "characters", "long enough for every name",
    (*(f"{request}.model" for request in (IMAGE, CHAT, EMBED)),
        *(f"{call}ModelRequest.name" for call in ("Get", "Load", "Unload", "Reload")), "HealthCheckRequest.service",
        *(f"{INFER}.{name}" for name in ("model_name", "model_version", "id")),
        *(f"Model{call}Request.{name}" for call in ("Ready", "Metadata") for name in ("name", "version")),
        "InferInputTensor.name", "InferInputTensor.datatype", "InferRequestedOutputTensor.name",
        *(f"Repository{call}Request.repository_name" for call in ("Index", "ModelLoad", "ModelUnload")),
        *(f"Repository{call}Request.model_name" for call in ("ModelLoad", "ModelUnload"))),
)  # fmt: skip
NAME: Final = Limit(
    "target, sampler, control, style, LoRA, script",
    64,
    "characters",
    "long enough for every name",
    (
        "LoadModelRequest.target",
        f"{IMAGE}.sampler",
        "Control.name",
        "Style.name",
        "LorasEntry.key",
        "Script.name",
        f"{IMAGE}.hires",
        f"{IMAGE}.mask_fill",
        "Hires.sampler",
        "Hires.upscaler",
    ),
)
GRACE: Final = Limit(
    "grace period", 3600, "seconds", "unloading ends eventually", ("UnloadModelRequest.grace_seconds",), least=0
)
KEEP_ALIVE: Final = Limit(
    "keep-alive", 604_800, "seconds, a negative number is endless", "a week; memory is for those who use it",
    ("Terms.keep_alive_seconds", "LoadModelRequest.keep_alive_seconds",
        *(f"{request}.terms" for request in (IMAGE, CHAT, EMBED))),
    least=-1,
)  # fmt: skip
PROMPT: Final = Limit(
    "prompt, negative prompt",
    10_000,
    "characters",
    "text encoders read 77 tokens",
    (f"{IMAGE}.prompt", f"{IMAGE}.negative_prompt", "Hires.prompt", "Hires.negative_prompt"),
)
PROMPT_CHUNKS: Final = Limit(
    "chunks of a prompt",
    16,
    "chunks of as many tokens as the text encoder reads",
    "attention to the prompt costs memory and time for each",
    (f"{IMAGE}.prompt_weights",),
)
PROMPT_WEIGHT: Final = Limit(
    "weight of a word", 100, "(a factor, of either sign)", "larger ones leave nothing of the rest",
    (f"{IMAGE}.prompt_weights",),
)  # fmt: skip
STEPS: Final = Limit(
    "steps", 1000, "steps", "the training timesteps of diffusion models", (f"{IMAGE}.steps", "Hires.steps"), least=1
)
IMAGES: Final = Limit("images", 64, "pictures", "of one request", (f"{IMAGE}.images",), least=1)
ALL_STEPS: Final = Limit(
    "steps times images",
    4000,
    "steps",
    "one request must not occupy the engine for hours",
    (f"{IMAGE}.steps", f"{IMAGE}.images"),
)
PREVIEW_EVERY: Final = Limit("preview_every", 1000, "steps", "the limit of steps", (f"{IMAGE}.preview_every",), least=0)
GUIDANCE: Final = Limit(
    "guidance_scale", 50, "(a factor)", "larger values saturate pictures", (f"{IMAGE}.guidance_scale",), least=0
)
GUIDED: Final = Limit(
    "guidance_start, guidance_end", 1, "(a share of the steps)", "1 is all of them",
    (f"{IMAGE}.guidance_start", f"{IMAGE}.guidance_end"), least=0,
)  # fmt: skip
FORECAST: Final = Limit("forecast", 1000, "characters", "a list of steps; ranges shorten it", (f"{IMAGE}.forecast",))
ETA: Final = Limit("eta", 1, "(a factor)", "1 has the noise of DDPM", (f"{IMAGE}.eta",), least=0)
STRENGTH: Final = Limit(
    "strength", 1, "(a share of the steps)", "1 takes all of them", (f"{IMAGE}.strength", "Hires.strength"), least=0
)
VARIATION: Final = Limit(
    "variation_strength", 1, "(a share of another noise)", "1 has the noise of the variation seed alone",
    (f"{IMAGE}.variation_strength",), least=0,
)  # fmt: skip
HIRES_SCALE: Final = Limit(
    "scale of a second pass", 8, "(a factor of height and width)", "models draw smaller pictures; the error states "
    "their range", (f"{IMAGE}.hires", "Hires.scale"), least=1,
)  # fmt: skip
DENOISING: Final = Limit(
    "denoising_start, denoising_end", 1, "(a share of the training's timesteps, between both)",
    "0 and 1 are all of them", (f"{IMAGE}.denoising_start", f"{IMAGE}.denoising_end"), least=0,
)  # fmt: skip
LATENTS: Final = Limit("latents", 64, "latents", "one of each picture of a request", (f"{IMAGE}.latents",), least=1)
LATENT_EDGE: Final = Limit(
    "channels, height and width of latents", 65_536, "values", "models have fewer; the error states how many",
    ("Latents.channels", "Latents.height", "Latents.width", "Latents.values"), least=1,
)  # fmt: skip
MASK_BLUR: Final = Limit("mask_blur", 256, "pixels", "softer borders are no borders", (f"{IMAGE}.mask_blur",), least=0)
EXTEND: Final = Limit(
    "extend", 65_536, "pixels of each edge", "models draw smaller pictures; the error states their range",
    (f"{IMAGE}.extend", *(f"Edges.{side}" for side in ("left", "top", "right", "bottom"))), least=0,
)  # fmt: skip
CONTROLS: Final = Limit(
    "controls", 8, "control networks", "each is run in every step of the denoiser", (f"{IMAGE}.controls",)
)
CONTROL_SCALE: Final = Limit(
    "scale of a control", 10, "(a factor)", "larger values destroy pictures", ("Control.scale",), least=0
)
CONTROL_SHARE: Final = Limit(
    "start, end of a control",
    1,
    "(a share of the steps)",
    "1 is all of them",
    ("Control.start", "Control.end"),
    least=0,
)
STYLES: Final = Limit(
    "styles", 8, "image adapters", "each is read by every cross-attention of the denoiser", (f"{IMAGE}.styles",)
)
STYLE_SCALE: Final = Limit(
    "scale of a style", 10, "(a factor)", "larger values destroy pictures", ("Style.scale",), least=0
)
GRID_CELLS: Final = Limit("cells of a grid", 100, "cells", "each is a picture, drawn as a request of its own")
SCRIPTS: Final = Limit(
    "scripts", 8, "scripts of a request", "each runs in the thread of the model",
    tuple(f"{request}.scripts" for request in (IMAGE, CHAT, EMBED)),
)  # fmt: skip
SCRIPT_ARGUMENTS: Final = Limit(
    "arguments of a script", 100_000, "characters of JSON", "long enough for lists of values", ("Script.arguments",)
)
LORAS: Final = Limit("loras", 64, "LoRA files", "a bundle has a few", (f"{IMAGE}.loras",))
LORA_SCALE: Final = Limit(
    "scale of a LoRA", 100, "(a factor)", "1 is as it was trained; pictures fall apart long before",
    ("LorasEntry.value",), least=-100,
)  # fmt: skip
EDGE: Final = Limit(
    "width, height", 65_536, "pixels", "models have smaller ranges; the error states them",
    (f"{IMAGE}.width", f"{IMAGE}.height", *(f"{IMAGE}.{of}{name}" for of in ("", "negative_") for name in
        ("original_size", "crop_top_left", "target_size")), "Pixels.down", "Pixels.across", "Hires.width",
        "Hires.height", f"{IMAGE}.noise_size"), least=0,
)  # fmt: skip
AESTHETIC_SCORE: Final = Limit(
    "aesthetic_score", 10, "(a score)", "models are trained on scores of 1 to 10",
    (f"{IMAGE}.aesthetic_score", f"{IMAGE}.negative_aesthetic_score"), least=0,
)  # fmt: skip
IMAGE_SEED: Final = Limit(
    "seed of pictures",
    2**63 - 1,
    "(minus images, plus 1)",
    "picture n has the seed `seed + n`",
    (f"{IMAGE}.seed", f"{IMAGE}.variation_seed"),
    least=0,
)
SEED: Final = Limit("seed of an answer", 2**64 - 1, "(a number)", "the range of the field", (f"{CHAT}.seed",), least=0)
MESSAGES: Final = Limit(
    "messages",
    1000,
    "messages",
    "a chat template renders all of them",
    (f"{CHAT}.messages", "Message.role", f"{CHAT}.context_overflow"),
)
PARTS: Final = Limit("parts", 2000, "parts of all messages", "a chat template renders all of them", ("Message.parts",))
TEXT: Final = Limit(
    "text",
    100_000,
    "characters of all texts of a request",
    "about 25,000 tokens; tokenizing needs 200 bytes and a microsecond for each byte",
    ("Part.text", f"{EMBED}.texts"),
)
TEXTS: Final = Limit(
    "texts", 1000, "texts", "a text takes a row of the encoder, and its embedding some kilobytes", (f"{EMBED}.texts",)
)
PAIRS: Final = Limit(
    "pairs", 1000, "pairs of a picture and a text", "each is read by the matching network", (f"{EMBED}.match",)
)
PICTURES: Final = Limit(
    "pictures",
    32,
    "pictures of a request",
    "they are encoded together, and each needs tokens of the context",
    SHOWN,
)
PICTURE_FILES: Final = (*SHOWN, "Control.image", "Style.image", f"{IMAGE}.image", f"{IMAGE}.mask")
"""The fields that hold a picture file."""
PICTURE_BYTES: Final = Limit("size of a picture file", 16 << 20, "bytes", "enough for photographs", PICTURE_FILES)
PICTURE_PIXELS: Final = Limit(
    "pixels of a picture",
    64_000_000,
    "pixels",
    "read from the header; the server decodes one picture at a time",
    PICTURE_FILES,
)
DECODED: Final = Limit(
    "a decoded picture", 192 << 20, "bytes of memory to decode it in",
    "a pixel needs 4 bytes in RGB files, 5 in grey ones, 8 with transparency or EXIF rotation, 8 in HEIC, 12 in WebP "
    "and AVIF",
    PICTURE_FILES,
)  # fmt: skip
RESIZED_PIXELS: Final = Limit(
    "pixels of a resized picture",
    8_000_000,
    "pixels",
    "a narrow picture becomes very long when its short edge is resized to the model's size",
    SHOWN,
)
REQUEST_PIXELS: Final = Limit(
    "pixels of all pictures",
    256_000_000,
    "pixels",
    "read from the headers; decoding 64 million takes a second",
    SHOWN,
)
QUALITY: Final = Limit("output_compression", 100, "(a quality, of JPEG and WebP files)", "100 is the best", least=0)
PARTIAL_IMAGES: Final = Limit("partial_images", 3, "previews of a picture", "as OpenAI has it", least=0)
URL: Final = Limit("URL of a picture", 2000, "characters", "data: URLs are none of these; servers read no longer ones")
FETCH: Final = Limit(
    "fetching the pictures of a request",
    15,
    "seconds",
    "a slow host must not hold requests; together they have the bytes of a message at most",
)
FETCHERS: Final = Limit("fetching at once", 8, "requests of all clients", "what they have fetched is in memory")
STOPS: Final = Limit("stop strings", 16, "strings", "each is searched in every piece of the answer", (f"{CHAT}.stop",))
STOP: Final = Limit(
    "stop string", 500, "characters", "as much text may be held back before it is sent", (f"{CHAT}.stop",)
)
MAX_TOKENS: Final = Limit(
    "max_tokens", 1_000_000, "tokens", "models have a smaller context", (f"{CHAT}.max_tokens",), least=1
)
TEMPERATURE: Final = Limit(
    "temperature",
    100,
    "(a divisor; 0, or at least 0.01)",
    "larger values make all tokens equally likely",
    (f"{CHAT}.temperature",),
    least=0,
)
TOP_K: Final = Limit(
    "top_k",
    2**32 - 1,
    "tokens",
    "the range of the field; values above the vocabulary's size have no effect",
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
ANSWERS: Final = Limit(
    "answers", 64, "answers of one request", "they are decoded one after the other", (f"{CHAT}.answers",), least=1
)
MIN_P: Final = Limit(
    "min_p", 1, "(a share of the likeliest token's probability)", "0 is all tokens", (f"{CHAT}.min_p",), least=0
)
COUNT_PENALTY: Final = Limit(
    "frequency_penalty, presence_penalty", 2, "(subtracted from the score of a token)", "the range of OpenAI's API",
    (f"{CHAT}.frequency_penalty", f"{CHAT}.presence_penalty"), least=-2,
)  # fmt: skip
LOGPROBS: Final = Limit(
    "logprobs", 20, "likeliest tokens in place of each token", "the range of OpenAI's API", (f"{CHAT}.logprobs",),
    least=0,
)  # fmt: skip
LOOKUP: Final = Limit(
    "lookup_tokens", 16, "guesses of the next tokens in one call of the decoder",
    "0 is none; a call takes longer with more", (f"{CHAT}.lookup_tokens",), least=0,
)  # fmt: skip
PICTURE_TOKENS: Final = Limit(
    "picture_tokens", 65_536, "positions of each picture", "0 is all of them; models have fewer",
    (f"{CHAT}.picture_tokens",), least=0,
)  # fmt: skip
DRAFT: Final = Limit(
    "draft_tokens", 16, "guesses of the next tokens by the bundle's draft, in one call of the decoder",
    "0 is none; each is a call of the draft", (f"{CHAT}.draft_tokens",), least=0,
)  # fmt: skip
PREDICTION: Final = Limit(
    "prediction", TEXT.most, "characters", "as many as a conversation has", (f"{CHAT}.prediction",)
)
GRAMMAR: Final = Limit(
    "grammar", 65_536, "characters of a JSON schema or a regular expression", "larger than published schemas",
    (f"{CHAT}.grammar", "Grammar.json_schema", "Grammar.regex"),
)  # fmt: skip
GRAMMAR_DEPTH: Final = Limit(
    "depth of a JSON schema", 64, "objects and arrays in each other", "deeper than published schemas",
    ("Grammar.json_schema",),
)  # fmt: skip
GRAMMAR_SYMBOLS: Final = Limit(
    "size of a grammar", 100_000, "symbols that llguidance makes of it", "each takes memory while the request waits",
    ("Grammar.json_schema", "Grammar.regex"),
)  # fmt: skip
GRAMMAR_WORK: Final = Limit(
    "work before an answer with a grammar", 1_000_000, "steps of llguidance's lexer", "about 20 ms",
    ("Grammar.json_schema", "Grammar.regex"),
)  # fmt: skip
GRAMMAR_STEP: Final = Limit(
    "work for a token of an answer with a grammar", 200_000, "steps of llguidance's lexer", "about 15 ms, while which "
    "the model's other answers wait", ("Grammar.json_schema", "Grammar.regex"),
)  # fmt: skip
GRAMMAR_STATES: Final = Limit(
    "states of a grammar", 50_000, "states of llguidance's lexer", "each takes 1 to 2 KB",
    ("Grammar.json_schema", "Grammar.regex"),
)  # fmt: skip
TOOLS: Final = Limit("functions that an answer may call", 128, "functions", "the range of OpenAI's API", least=1)
LENGTH_PENALTY: Final = Limit(
    "length_penalty", 5, "(an exponent)", "lengths to this power stay numbers", (f"{CHAT}.length_penalty",), least=-5
)

# Calls of single submodels (KServe).
INFER_TENSORS: Final = Limit(
    "tensors of a call of a submodel",
    64,
    "inputs, outputs or parameters",
    "submodels have fewer; unknown parameters are refused",
    (*(f"{INFER}.{name}" for name in ("inputs", "outputs", "raw_input_contents")),
        *(f"{of}.parameters" for of in (INFER, "InferInputTensor", "InferRequestedOutputTensor",
            "RepositoryModelLoadRequest", "RepositoryModelUnloadRequest")),
        "ParametersEntry.key", "ParametersEntry.value",
        *(f"InferParameter.{kind}_param" for kind in ("int64", "string", "double", "uint64")),
        *(f"ModelRepositoryParameter.{kind}_param" for kind in ("int64", "string", "bytes"))),
)  # fmt: skip
INFER_DIMS: Final = Limit("dims of a tensor", 8, "dims", "tensors of submodels have fewer", ("InferInputTensor.shape",))
INFER_ELEMENTS: Final = Limit(
    "elements of a tensor",
    20 << 20,
    "elements, counting empty dims as 1",
    "a message holds no more",
    ("InferInputTensor.shape", "InferInputTensor.contents", *(f"InferTensorContents.{kind}_contents" for kind in
        ("int", "int64", "uint", "uint64", "fp32", "fp64", "bytes"))),
    least=0,
)  # fmt: skip
INFER_OUTPUT: Final = Limit(
    "outputs of a call of a submodel", 64 << 20, "bytes", "computed from the inputs' shapes before anything runs",
    ("InferInputTensor.shape",),
)  # fmt: skip

# The server's resources.
CALLS: Final = Limit("calls at once", 4000, "calls of all clients", "each needs some memory while it waits")
CONNECTION_CALLS: Final = Limit("calls at once on a connection", 1000, "calls", "others wait in the client")
ARRIVING: Final = Limit("messages arriving at once on a connection", 4, "messages", "others wait unread")
CHECKED: Final = Limit(
    "requests checked at once for a connection", 1, "request", "tokenizing a long text takes a fraction of a second"
)
CHECKS: Final = Limit("requests checked at once", 2, "requests of all clients", "checking uses the processor")
WAITING_BYTES: Final = Limit(
    "pictures waiting", 128 << 20, "bytes of the files of all requests", "they stay in memory until their request runs"
)
UNREAD: Final = Limit(
    "answers unread",
    30,
    "seconds until the request is cancelled",
    "a client that does not read must not block the engine",
)
UNREAD_BYTES: Final = Limit(
    "pictures unread",
    32 << 20,
    "bytes of the pictures of a request",
    "above it, older previews are dropped, and drawing waits for the client",
)
JOB_ID: Final = Limit(
    "id of a request", 64, "characters", "long enough for every id", ("Terms.collect", "StopRequest.id")
)
SESSIONS: Final = Limit(
    "clients and jobs that are remembered", 1000, "of each, clients of Automatic1111's dialect",
    "above it, the oldest settings and the oldest jobs that have ended are forgotten",
)  # fmt: skip
RESULT_SECONDS: Final = Limit(
    "a result that waits to be collected", 600, "seconds after its request has ended", "a client comes back soon"
)
RESULT_BYTES: Final = Limit(
    "results that wait to be collected",
    256 << 20,
    "bytes of their pictures",
    "above it, the oldest that are complete are dropped",
)
VANISHED: Final = Limit("a lost client", 30, "seconds until its requests are cancelled", "it does not answer pings")
REQUEST_ID: Final = Limit("x-request-id", 128, "characters", "it stands in every line of the log about the request")
ERROR_TEXT: Final = Limit("error message", 1000, "characters", "percent-encoded, it must fit into trailers of 8 KiB")
