"""Pictures in and out: safe decoding, encoding, and the preprocessing that a model's own preprocessor_config.json describes.

Preprocessing follows transformers' CLIPImageProcessor on Pillow (resize, center crop, rescale, normalize, in this order); a test
compares the two. Pictures are uint8 RGB [height, width, 3] everywhere.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from runtime import limits
from runtime.errors import BundleError, InvalidInput

Picture = NDArray[np.uint8]
MAX_PIXELS: Final = limits.PICTURE_PIXELS.most
"""Pictures of more pixels than this are refused, as files and as what a resize would make of them."""
COPIED: Final = ("WEBP",)
"""Formats whose decoders hold three copies of the picture."""
BYTES: Final = {"1": 1, "L": 1, "P": 1, "I;16": 2, "LA": 4, "RGB": 4, "RGBA": 4, "CMYK": 4}
"""Bytes that Pillow takes for a pixel, by mode."""
FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP")
CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)


def decode_image(data: bytes, field: str = "image", max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode a PNG, JPEG, WebP or BMP file to uint8 RGB [height, width, 3]; of an animation, its first frame.

    The EXIF orientation is applied and transparency laid over white, as transformers' load_image and convert_to_rgb do.
    Raises InvalidInput naming `field` when the data is none of these, is damaged, or holds more than `max_pixels` pixels; the size
    is read from the header, before any pixel is decoded.
    """
    with _opened(data, field, max_pixels) as image:
        return np.array(over_white(ImageOps.exif_transpose(image)), np.uint8)


@contextmanager
def _opened(data: bytes, field: str, max_pixels: int) -> Iterator[Image.Image]:
    """The picture in a file, its header read and no pixel. Raises InvalidInput also for what happens to it while it is open."""
    too_large = InvalidInput(field, f"holds more than {max_pixels / 1e6:g} megapixels, the most that is accepted: send a smaller picture")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise too_large
            yield image
    except InvalidInput:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # Pillow's own limits lie above ours by default
        raise too_large from None
    except UnidentifiedImageError:
        raise InvalidInput(field, f"is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture ({len(data)} bytes)") from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds of exception on damaged data
        raise InvalidInput(field, f"is a damaged picture: {error}") from None


_DECODING: Final = threading.Lock()
"""Files are decoded one after the other: a small file may hold many pixels."""


@dataclass(frozen=True, eq=False)
class PictureFile:
    """A picture file of a request, decoded when it is needed. `size` is (width, height) in pixels, upright; `field` what errors call it."""

    data: bytes
    field: str
    size: tuple[int, int]

    @classmethod
    def open(cls, data: bytes, field: str) -> PictureFile:
        """Look at a file's length and header. Raises InvalidInput as `decode_image` does, but for damaged pixels."""
        limits.PICTURE_BYTES.length(field, data)
        with _opened(data, field, MAX_PIXELS) as image:
            limits.DECODED.count(field, _memory(image))
            return cls(data, field, image.size[::-1] if _orientation(image) >= 5 else image.size)

    def decode(self) -> Picture:
        """Its pixels, as `decode_image` gives them. Raises InvalidInput when they are damaged."""
        with _DECODING:
            return decode_image(self.data, self.field)

    def resized(self, size: tuple[int, int], resample: Image.Resampling) -> Picture:
        """What `decode` gives, resized to (width, height): the same pixels, in much less memory. Raises as `decode` does."""
        with _DECODING, _opened(self.data, self.field, MAX_PIXELS) as image:
            return np.array(_upright(image).resize(size, resample), np.uint8)


TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What sets a picture upright, by its EXIF orientation."""
STRIP: Final = 1 << 20
"""Pixels that are converted to RGB at once."""


def _orientation(image: Image.Image) -> int:
    """Of its EXIF tags, 1 where there are none. 5 and above: width and height are exchanged."""
    return int(image.getexif().get(0x0112, 1))


def _upright(image: Image.Image) -> Image.Image:
    """What `over_white(ImageOps.exif_transpose(image))` gives, made a strip at a time: one copy besides the file's, or none."""
    orientation = _orientation(image)
    image.load()
    if image.mode == "RGB" and orientation not in TURNS and image.info.get("transparency") is None:
        return image
    across, backwards = orientation >= 5, orientation in (3, 4, 7, 8)  # its rows lie in the file as columns; the last comes first
    width, height = image.size[::-1] if across else image.size
    upright = Image.new("RGB", (width, height))
    step = max(1, STRIP // width)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        first, last = (height - bottom, height - top) if backwards else (top, bottom)
        strip = image.crop((first, 0, last, image.height) if across else (0, first, image.width, last))
        upright.paste(over_white(strip.transpose(TURNS[orientation]) if orientation in TURNS else strip), (0, top))
    return upright


def _memory(image: Image.Image) -> int:
    """Bytes that `_upright` takes at most, from the header: the decoder's own and those of the RGB picture, 4 a pixel as Pillow has it."""
    own = BYTES.get(image.mode, 4) * (3 if image.format in COPIED else 1)
    return image.width * image.height * (own if image.mode == "RGB" and _orientation(image) not in TURNS else own + 4)


def decoded(picture: Picture | PictureFile) -> Picture:
    """The pixels of a picture or of a file. Raises InvalidInput when they are damaged."""
    return picture.decode() if isinstance(picture, PictureFile) else picture


def over_white(image: Image.Image) -> Image.Image:
    """The picture as RGB, what is transparent laid over white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def encode_image(image: Picture, kind: Literal["png", "jpeg"] = "png", quality: int = 95) -> bytes:
    """Encode uint8 RGB [height, width, 3] as a PNG or JPEG file; `quality` 1 to 95 is for JPEG. Raises InvalidInput."""
    check_picture(image, "image")
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, quality=quality)
    return file.getvalue()


def check_picture(image: NDArray[Any], field: str) -> None:
    """Raise InvalidInput naming `field` unless the array is a uint8 RGB picture [height, width, 3] with pixels."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InvalidInput(field, f"has dtype {image.dtype} and shape {list(image.shape)}, expected uint8 [height, width, 3]")


class Edge(BaseModel):
    """Resize so that the shorter edge gets this length in pixels and the aspect stays."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    shortest_edge: int = Field(gt=0)


class Size(BaseModel):
    """An exact size in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    height: int = Field(gt=0)
    width: int = Field(gt=0)


def _present(value: object) -> object:
    """Sizes as some versions write them: with the keys that do not apply set to null."""
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


def _edge(value: object) -> object:
    return {"shortest_edge": value} if isinstance(value, int) else _present(value)


def _square(value: object) -> object:
    return {"height": value, "width": value} if isinstance(value, int) else _present(value)


class ImagePreprocessor(BaseModel):
    """What a CLIP-style preprocessor_config.json describes; the names and defaults are transformers'.

    Settings that would change the result and are not known here are refused, never ignored.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    do_convert_rgb: Literal[True, None] = True
    do_resize: bool = True
    size: Annotated[Edge | Size, BeforeValidator(_edge)] = Edge(shortest_edge=224)
    resample: Image.Resampling = Image.Resampling.BICUBIC
    do_center_crop: bool = True
    crop_size: Annotated[Size, BeforeValidator(_square)] = Size(height=224, width=224)
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    _file: str = PrivateAttr("the image processor's settings")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: object) -> object:
        if not isinstance(data, dict):
            raise ValueError("an object of settings was expected")
        kind = data.get("image_processor_type") or data.get("feature_extractor_type") or "CLIPImageProcessor"
        if not kind.startswith(("CLIP", "LlavaImageProcessor")):
            raise ValueError(f"{kind} is not supported (known: CLIPImageProcessor, LlavaImageProcessor)")
        unknown = sorted(key for key, value in data.items() if key.startswith("do_") and value and key not in cls.model_fields)
        if unknown:
            raise ValueError(f"{', '.join(unknown)} is not supported")
        return data

    @model_validator(mode="after")
    def _fixed_size(self) -> ImagePreprocessor:
        if not self.do_center_crop and not (self.do_resize and isinstance(self.size, Size)):
            raise ValueError(
                "pictures would keep sizes of their own; a vision encoder takes one size, so crop or resize to height and width"
            )
        return self

    @classmethod
    def from_folder(cls, folder: Path) -> ImagePreprocessor:
        """Read preprocessor_config.json, else the "image_processor" section of processor_config.json. Raises BundleError."""
        for name, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
            path = folder / name
            if path.is_file():
                try:
                    data = json.loads(path.read_bytes())
                    found = cls.model_validate(data[section] if section else data)
                    found._file = str(path)
                    return found
                except (ValueError, KeyError, TypeError) as error:
                    raise BundleError(f"{path} cannot be used: {_reason(error)}") from None
        raise BundleError(f"{folder} holds neither preprocessor_config.json nor processor_config.json")

    @property
    def origin(self) -> str:
        """The file and field that say how large the pictures are."""
        return f"{self._file} ({'crop_size' if self.do_center_crop else 'size'})"

    @property
    def output_size(self) -> Size:
        """Height and width in pixels of what the vision encoder gets."""
        if self.do_center_crop:
            return self.crop_size
        assert isinstance(self.size, Size)
        return self.size

    def __call__(self, images: Sequence[Picture | PictureFile], field: str = "image") -> NDArray[np.float32]:
        """Preprocess pictures, each uint8 RGB [height, width, 3] or a file, to pixel_values float32 [images, 3, height, width].

        Raises InvalidInput naming `field`, or that of the file, for another kind of array, a damaged file, or a picture so elongated
        that its resized form would have too many pixels.
        """
        return np.stack([self._one(image, field) for image in images])

    def _one(self, image: Picture | PictureFile, field: str) -> NDArray[np.float32]:
        if not isinstance(image, PictureFile):
            check_picture(image, field)
        image = self._resize(image, field) if self.do_resize else decoded(image)
        if self.do_center_crop:
            image = center_crop(image, self.crop_size)
        # float64 and back, then float32: the roundings of the reference.
        scale = np.float64(self.rescale_factor if self.do_rescale else 1)
        pixels = np.multiply(image, scale, dtype=np.float64).astype(np.float32)
        if self.do_normalize:
            pixels -= np.array(self.image_mean, np.float32)
            pixels /= np.array(self.image_std, np.float32)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def check(self, size: tuple[int, int], field: str) -> None:
        """Raise InvalidInput naming `field` where a picture of this (width, height) cannot be resized."""
        if self.do_resize:
            self._target(size, field)

    def _target(self, size: tuple[int, int], field: str) -> tuple[int, int]:
        """What (width, height) is resized to."""
        width, height = size
        if not isinstance(self.size, Edge):
            return self.size.width, self.size.height
        edge, short = self.size.shortest_edge, min(height, width)
        target = (int(edge * width / short), int(edge * height / short))
        if target[0] * target[1] > limits.RESIZED_PIXELS.most:
            raise InvalidInput(
                field, f"is {width}x{height}, which would be resized to {target[0]}x{target[1]}: send a less elongated picture"
            )
        return target

    def _resize(self, image: Picture | PictureFile, field: str) -> Picture:
        if isinstance(image, PictureFile):
            return image.resized(self._target(image.size, image.field), self.resample)
        height, width = image.shape[:2]
        return np.array(Image.fromarray(image).resize(self._target((width, height), field), self.resample), np.uint8)


def center_crop(image: Picture, size: Size) -> Picture:
    """The middle of a picture; where the picture is smaller than `size`, zeros around it."""
    top, left = (image.shape[0] - size.height) // 2, (image.shape[1] - size.width) // 2
    inside = image[max(top, 0) : top + size.height, max(left, 0) : left + size.width]
    y, x = max(-top, 0), max(-left, 0)
    window = np.zeros((size.height, size.width, 3), np.uint8)
    window[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return window


def _reason(error: Exception) -> str:
    """Pydantic's reasons on one line, other exceptions as they are."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(": ".join(filter(None, [".".join(map(str, e["loc"])), e["msg"]])) for e in error.errors())
