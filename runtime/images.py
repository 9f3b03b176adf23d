"""Pictures in and out: safe decoding, and encoding. Pictures are uint8 RGB [height, width, 3] everywhere."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime import limits
from runtime.errors import InvalidInput

Picture = NDArray[np.uint8]
MAX_PIXELS: Final = limits.PICTURE_PIXELS.most
"""Pictures of more pixels than this are refused, as files and as what a resize would make of them."""
COPIED: Final = ("WEBP",)
"""Formats whose decoders hold three copies of the picture."""
BYTES: Final = {"1": 1, "L": 1, "P": 1, "I;16": 2, "LA": 4, "RGB": 4, "RGBA": 4, "CMYK": 4}
"""Bytes that Pillow takes for a pixel, by mode."""
FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP")


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
