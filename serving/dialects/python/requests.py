"""Makes the requests of pipelines from keyword arguments and pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.diffusion import guides
from runtime.diffusion.hires import Hires
from runtime.errors import InvalidInput, NotFound
from runtime.files import read_regular
from runtime.language import text
from runtime.language.grammar import Grammar
from runtime.limits import PICTURE_BYTES
from runtime.tasks.chat import ChatRequest
from runtime.tasks.embed import EmbedRequest, Match
from runtime.tasks.image import ImageRequest
from runtime.vision.images import Picture, PictureFile
from serving.dialects.python.results import Drawing

PictureLike = NDArray[np.uint8] | bytes | Path | Image.Image
"""A picture: uint8 RGB [height, width, 3] or grey [height, width], the bytes or the path of a picture file, or a Pillow
image.
"""


PICTURES: Final = ("image", "mask")
"""The options of a picture request that are pictures."""


@dataclass(frozen=True, eq=False)
class Control:
    """A picture that a control network of the bundle follows, by the network's name: what the network was trained on,
    such as white edges on black. It is resized to what is drawn.

    `scale` is how much it counts, 0 to 10. It counts in the steps between `start` and `end`, shares of all steps, 0 to
    1.
    """

    name: str
    image: PictureLike
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True, eq=False)
class Style:
    """A picture whose content or style an image adapter of the bundle follows, by the adapter's name. `scale` is how
    much it counts, 0 to 10.
    """

    name: str
    image: PictureLike
    scale: float = 1.0


class ImageOptions(TypedDict, total=False):
    """Options of a picture. A missing option, or None, means the model's default."""

    negative_prompt: str | None
    """A text that the picture must not match. Used with a `guidance_scale` above 1."""
    width: int | None
    """Width in pixels."""
    height: int | None
    """Height in pixels."""
    steps: int | None
    """Denoising steps, 1 to 1000."""
    guidance_scale: float | None
    """Classifier-free guidance, 0 to 50; 1 switches it off."""
    guidance_start: float | None
    """Guide from this share of the steps on, 0 to 1. Steps without guidance take half the work."""
    guidance_end: float | None
    """Guide up to this share of the steps, 0 to 1."""
    forecast: str | None
    """The steps that run the denoiser, "every 3 after 2" or "1-3,6,9,12"; in the others its output is continued from
    the ones before. "stored" are those that were chosen for the bundle, "none" (the default) is every step.
    """
    sampler: str | None
    """Name of the sampler, such as "euler" or "dpmpp_2m_karras"."""
    eta: float | None
    """Noise that the samplers "ddim" and "tcd" add, 0 to 1."""
    seed: int | None
    """Seed of the first picture; each further one uses 1 more. The same seed gives the same picture on the same
    engine. Without one, a random seed is chosen and reported.
    """
    images: int | None
    """Number of pictures, 1 to 64."""
    preview_every: int | None
    """Number of steps between previews (`Progress.preview`). 0 is never."""
    loras: Mapping[str, float] | None
    """LoRA files of the bundle by name (`enginecast build --adapter`), each with its scale; 1 is as it was trained."""
    controls: Sequence[Control] | None
    """Pictures for the control networks that the bundle was built with, each network at most once."""
    guess_mode: bool | None
    """Control networks count less where what they add is fine, and not for the negative prompt, so that they are
    followed without a prompt, too.
    """
    prompt_weights: bool | None
    """Read prompts as Automatic1111's web UI does: "(word:1.3)" weighs a word, and prompts may be longer than the text
    encoder reads at once.
    """
    image: PictureLike | None
    """A picture to begin with (image to image). It is resized to `width` and `height`; by default these are its own,
    rounded down to a multiple that the model can draw.
    """
    strength: float | None
    """How much of that picture is drawn anew, as a share of the steps, 0 to 1."""
    mask: PictureLike | None
    """A picture of the same size: only where it is white the picture is drawn anew (inpainting). May also be a uint8
    array [height, width].
    """
    mask_blur: float | None
    """Softens the border of the mask: standard deviation in pixels, 0 to 256."""
    keep_unmasked: bool | None
    """False takes what is not drawn from the autoencoder, too, instead of the picture."""
    mask_fill: str | None
    """What the latents of the drawn part begin with: "original", "noise" or "nothing"."""
    extend: tuple[int, int, int, int] | None
    """Pixels to add to the picture on the left, top, right and bottom, which are drawn (outpainting)."""
    denoising_end: float | None
    """Stop here, a share of the training's timesteps between 0 and 1: another model goes on with `Drawing.latents`."""
    denoising_start: float | None
    """Go on from here, with `latents` of a drawing whose `denoising_end` was the same."""
    original_size: tuple[int, int] | None
    """Of Stable Diffusion XL and its refiner: the size (height, width) that a picture is to look as if it was scaled
    from. Without one, the size that is drawn.
    """
    crop_top_left: tuple[int, int] | None
    """Where (top, left) it is to look as if it was cropped. Without one, (0, 0)."""
    target_size: tuple[int, int] | None
    """The size (height, width) that it is to look like. Without one, the size that is drawn."""
    aesthetic_score: float | None
    """Of the refiner, in place of `target_size`: how beautiful the picture is to be, 0 to 10. Without one, 6."""
    negative_original_size: tuple[int, int] | None
    """The same for the negative prompt. Without one, that of the prompt."""
    negative_crop_top_left: tuple[int, int] | None
    """See `negative_original_size`."""
    negative_target_size: tuple[int, int] | None
    """See `negative_original_size`."""
    negative_aesthetic_score: float | None
    """The score of the negative prompt. Without one, 2.5."""
    latents: NDArray[np.float32] | None
    """Latents [images, channels, height, width] to begin with, in place of the noise of the seed."""
    variation_seed: int | None
    """Another seed, whose noise is mixed with that of `seed`; each further picture uses 1 more."""
    variation_strength: float | None
    """The share of its noise, 0 to 1."""
    noise_size: tuple[int, int] | None
    """Draw the noise for a picture of this size (height, width), and put it into the middle of the drawn one."""
    hires: Hires | None
    """Draw each picture a second time, at a larger size."""
    styles: Sequence[Style] | None
    """Pictures for the image adapters that the bundle was built with, each adapter at most once."""
    scripts: Mapping[str, Mapping[str, Any]] | None
    """Scripts to run it with, the outermost one first, each with its arguments: {"wildcards": {}}."""


class ChatOptions(TypedDict, total=False):
    """Options of an answer. A missing option, or None, means the model's default."""

    max_tokens: int | None
    """Longest answer, in tokens."""
    fills_context: bool | None
    """The answer may have all tokens that the context leaves, in place of `max_tokens`."""
    raw: bool | None
    """The question is the prompt as the model reads it: no chat template writes around it, and it may hold special
    tokens. Pictures stand before it.
    """
    temperature: float | None
    """0 always takes the most likely token; at most 100."""
    top_k: int | None
    """Sample among the k most likely tokens."""
    top_p: float | None
    """Sample among the most likely tokens with this joint probability, above 0 to 1."""
    repetition_penalty: float | None
    """Above 1, tokens that occurred before become less likely."""
    seed: int | None
    """Seed of the sampling. The same seed gives the same answer on the same engine."""
    stop: Sequence[str] | None
    """The answer ends before the first of these strings."""
    beams: int | None
    """1 to 8. Above 1, the likeliest of that many answers continued side by side, as one text; needs temperature 0."""
    length_penalty: float | None
    """With several beams, the larger the longer the answers, -5 to 5; 1 compares means of tokens."""
    answers: int | None
    """1 to 64 answers, all of them in `Answer.choices`: with several beams the likeliest, at most as many as beams;
    with a temperature drawn one by one, answer n with the seed `seed` + n; else all are equal.
    """
    min_p: float | None
    """Leave out tokens that are less likely than this share of the likeliest one's probability, 0 to 1."""
    frequency_penalty: float | None
    """Subtracted from the score of a token for each time that it is in the answer so far, -2 to 2."""
    presence_penalty: float | None
    """Subtracted from the score of a token that is in the answer so far, -2 to 2."""
    grammar: Grammar | None
    """The form of the answer: `Grammar.json()`, `Grammar.schema(...)` or `Grammar.regex(...)`. Not with several
    beams.
    """
    logprobs: int | None
    """0 to 20: look up the log probability of each token, in `Choice.logprobs` and `TextDelta.logprobs`, and of that
    many of the likeliest tokens in its place. Not with several beams.
    """
    lookup_tokens: int | None
    """0 to 16: guess at most so many of the next tokens at a time from what the conversation and the answer repeat, and
    verify them in one call of the decoder. The same answer, sooner where guesses are right. Not with several beams.
    """
    draft_tokens: int | None
    """0 to 16: guess at most so many of the next tokens at a time by the draft that the model was built with, where
    nothing is repeated. The same answer, sooner where guesses are right. Not with several beams.
    """
    prediction: str | None
    """A text that the answer repeats in great part, such as the file that it changes: tokens are guessed from it, too,
    4 at a time where `lookup_tokens` does not say.
    """
    picture_tokens: int | None
    """The most positions of each picture that the model reads, those that are least alike: the first token comes
    sooner, with less detail. 0 is all of them.
    """
    context_overflow: str | None
    """"refuse" (the default), or "slide": a conversation that does not fit the context is answered without its oldest
    turns. System messages, turns with pictures and the last question stay; `Answer.left_out` counts the rest.
    """
    scripts: Mapping[str, Mapping[str, Any]] | None
    """Scripts to run it with, the outermost one first, each with its arguments."""


@dataclass(frozen=True, eq=False)
class Message:
    """One turn of a conversation.

    `role` is "system", "user" or "assistant". `content` is a text, or texts and pictures in order: a str is text,
    anything else a picture.
    """

    role: text.Role
    content: str | Sequence[str | PictureLike]


def image_request(prompt: str, options: Mapping[str, Any]) -> ImageRequest:
    """The request for pictures. Raises InvalidInput naming the option, NotFound for a missing file."""
    given = _given(options, ImageOptions.__annotations__)
    given |= {name: picture(given[name], name) for name in PICTURES if name in given}
    given["controls"] = tuple(map(_control, given.get("controls", ())))
    given["styles"] = tuple(map(_style, given.get("styles", ())))
    return ImageRequest(prompt=prompt, **given)


def going_on(request: ImageRequest, drawing: Drawing, **more: Any) -> ImageRequest:
    """The request to another model that goes on where this one ended, with what it has drawn, and `more`."""
    assert drawing.latents is not None, "a request with denoising_end hands its latents over"
    return request.going_on(drawing.latents, drawing.images[0].seed, **more)


def _style(style: Style) -> guides.Style:
    return guides.Style(style.name, picture(style.image, "styles"), style.scale)


def _control(control: Control) -> guides.Control:
    shown = picture(control.image, "controls")
    return guides.Control(control.name, shown, control.scale, control.start, control.end)


def chat_request(
    conversation: str | Sequence[Message], images: Sequence[PictureLike], options: Mapping[str, Any]
) -> ChatRequest:
    """The request for an answer. Raises InvalidInput naming the option or the picture, NotFound for a missing file."""
    shown = [picture(image, f"images[{i}]") for i, image in enumerate(images)]
    if isinstance(conversation, str):
        messages = [text.Message("user", (*shown, conversation))]
    elif shown:
        raise InvalidInput("images", "belongs to a question given as a str: put pictures into the messages instead")
    else:
        messages = [_message(message, f"messages[{i}]") for i, message in enumerate(conversation)]
    given = _given(options, ChatOptions.__annotations__)
    return ChatRequest(messages=tuple(messages), **given | {"stop": tuple(given.get("stop", ()))})


def caption_request(image: PictureLike, prompt: str | None, options: Mapping[str, Any]) -> ChatRequest:
    """The request for a caption: a question about one picture, or the picture alone. Raises as `chat_request` does."""
    content: list[str | PictureLike] = [image] if prompt is None else [image, prompt]
    return chat_request([Message("user", content)], (), options)


def embed_request(texts: Sequence[str], images: Sequence[PictureLike], match: Match | None = None) -> EmbedRequest:
    """The request for embeddings, or with `match` for scores. Raises InvalidInput naming the text or the picture,
    NotFound for a missing file.
    """
    shown = tuple(picture(image, f"images[{i}]") for i, image in enumerate(images))
    for i, one in enumerate(texts):
        if not isinstance(one, str):
            raise InvalidInput(f"texts[{i}]", f"is a {type(one).__name__}, expected a str")
    return EmbedRequest(tuple(texts), shown, match)


def picture(image: PictureLike, field: str) -> Picture | PictureFile:
    """Convert a picture for a pipeline. Only the header of a file is read; decoding comes later. Raises InvalidInput
    that names `field` or the file, and NotFound if the file cannot be read.
    """
    match image:
        case np.ndarray():
            return np.repeat(image[..., np.newaxis], 3, axis=2) if image.ndim == 2 else image
        case bytes():
            return PictureFile.open(image, field)
        case Path():
            return PictureFile.open(_read(image), str(image))
        case Image.Image():
            file = io.BytesIO()
            image.save(file, "png")
            return PictureFile.open(file.getvalue(), field)
    raise InvalidInput(
        field, f"is a {type(image).__name__}, expected a uint8 array, bytes, a pathlib.Path or a Pillow image"
    )


def _message(message: Message, field: str) -> text.Message:
    content = [message.content] if isinstance(message.content, str) else message.content
    parts = (
        part if isinstance(part, str) else picture(part, f"{field}.content[{i}]") for i, part in enumerate(content)
    )
    return text.Message(message.role, tuple(parts))


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, PICTURE_BYTES.most)
    except OSError as error:
        raise NotFound(f"picture {path} cannot be read: {error.strerror}") from None


def _given(options: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    for name in options.keys() - known.keys():
        raise InvalidInput(name, f"is not an option, expected one of {', '.join(known)}")
    return {name: value for name, value in options.items() if value is not None}
