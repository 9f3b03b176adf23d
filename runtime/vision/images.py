"""Pictures in and out: safe decoding, and encoding. Pictures are uint8 RGB [height, width, 3] everywhere.

Of every format: the first frame, upright as EXIF or the container says, what is transparent laid over white, as
transformers' load_image and convert_to_rgb do. 16-bit grey is scaled to 8 bits as the PNG specification has it (third
edition, section 13.12), where Pillow alone would clip it; of 16-bit colours Pillow gives the high byte. Colours are
taken as sRGB: colour profiles are not applied, as there.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.ExifTags import Base as Tag
from pillow_heif import register_heif_opener

from runtime import limits
from runtime.errors import InvalidInput

Picture = NDArray[np.uint8]
MAX_PIXELS: Final = limits.PICTURE_PIXELS.most
"""Pictures of more pixels than this are refused, as files and as what a resize would make of them."""
COPIES: Final = {"WEBP": 3, "AVIF": 3, "HEIF": 2}
"""How many copies of the picture decoders hold, where it is more than one: measured."""
UPRIGHT: Final = ("TIFF", "HEIF")
"""Formats whose decoders set the picture upright themselves."""
BYTES: Final = {"1": 1, "L": 1, "P": 1, "I;16": 2, "LA": 4, "RGB": 4, "RGBA": 4, "CMYK": 4}
"""Bytes that Pillow takes for a pixel, by mode."""
FORMATS: Final = {
    "PNG": "PNG", "JPEG": "JPEG", "WEBP": "WebP", "BMP": "BMP", "GIF": "GIF", "TIFF": "TIFF", "AVIF": "AVIF",
    "HEIF": "HEIC",
}  # fmt: skip
"""What is read: Pillow's names, and those that people know. No other decoder gets to see a file."""
SIXTEEN: Final = ("I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of 16-bit grey."""
MODES: Final = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", *SIXTEEN})
"""Pillow's modes whose values have one meaning as a brightness. The others are LAB, and whole or real numbers of 32
bits.
"""
COMPRESSIONS: Final = frozenset({"raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "jpeg"})
"""Of TIFF files, as Pillow calls them. The decoders of the others, of faxes for one, write a line to stderr for each
damaged row.
"""
WHITE_IS_ZERO: Final = "white_is_zero"
"""Entry in `info` of a 16-bit grey TIFF file whose largest number is black."""
CHUNKS: Final = 10_000
"""How many chunks of a PNG file are looked at for its orientation."""


def decode_image(data: bytes, field: str = "image", max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode a picture file of one of `FORMATS` to uint8 RGB [height, width, 3].

    Raises InvalidInput naming `field` when the data is none of these, is damaged, or holds more than `max_pixels`
    pixels; the size is read from the header, before any pixel is decoded.
    """
    with _opened(data, field, max_pixels) as image:
        return np.array(_upright(image), np.uint8)


@contextmanager
def _opened(data: bytes, field: str, max_pixels: int) -> Iterator[Image.Image]:
    """The picture in a file, its header read and no pixel. Raises InvalidInput also for what happens to it while it is
    open.
    """
    too_large = InvalidInput(
        field, f"holds more than {max_pixels / 1e6:g} megapixels, the most that is accepted: send a smaller picture"
    )
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            if image.width * image.height > max_pixels:
                raise too_large
            _check_kind(image, field)
            _amend(image, data)
            yield image
    except InvalidInput:
        raise
    except (
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ):  # Pillow's own limits lie above ours by default
        raise too_large from None
    except UnidentifiedImageError:
        *names, last = FORMATS.values()
        raise InvalidInput(
            field, f"is no {', '.join(names)} or {last} picture that can be read ({len(data)} bytes)"
        ) from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds of exception on damaged data
        raise InvalidInput(field, f"is a damaged picture: {error}") from None


def _check_kind(image: Image.Image, field: str) -> None:
    """Raise InvalidInput for a file of a known format whose pixels or compression are not read."""
    if image.mode not in MODES:
        raise InvalidInput(
            field,
            f"is a {image.format} picture with pixels of kind {image.mode}, expected 8 or 16 bits of grey, RGB or CMYK",
        )
    compression = image.info.get("compression", "raw") if image.format == "TIFF" else "raw"
    if compression not in COMPRESSIONS:
        raise InvalidInput(
            field, f"is a TIFF picture with {compression} compression, expected none, LZW, deflate, packbits or JPEG"
        )


@cache
def _formats() -> list[str]:
    """Pillow's names of what is read. HEIC's decoder is a library of its own."""
    register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
    return list(FORMATS)


def _amend(image: Image.Image, data: bytes) -> None:
    """Correct what Pillow says of a file whose header was read: `info` is in the file's own numbers there, pixels are
    not.
    """
    transparent = image.info.get("transparency")
    if image.format == "PNG" and isinstance(image, ImageFile.ImageFile) and image.tile:
        kind = str(image.tile[0].args)
        if isinstance(transparent, int) and kind in ("L;2", "L;4"):
            image.info["transparency"] = transparent * 255 // (2 ** int(kind[-1]) - 1)
        if isinstance(transparent, tuple) and kind == "RGB;16B":
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
        if "exif" not in image.info and (exif := _png_chunk(data, b"eXIf")):
            image.info["exif"] = exif
    if (
        image.format == "TIFF"
        and image.mode in SIXTEEN
        and getattr(image, "tag_v2", {}).get(Tag.PhotometricInterpretation) == 0
    ):
        image.info[WHITE_IS_ZERO] = True


def _png_chunk(data: bytes, kind: bytes) -> bytes:
    """The first chunk of a kind in a PNG file; Pillow reads those behind the pixels only when it has decoded them."""
    start = 8
    for _ in range(CHUNKS):
        length = int.from_bytes(data[start : start + 4])
        if data[start + 4 : start + 8] == kind:
            return data[start + 8 : start + 8 + length]
        start += length + 12
        if start + 8 > len(data):
            break
    return b""


_DECODING: Final = threading.Lock()
"""Files are decoded one after the other: a small file may hold many pixels."""


@dataclass(frozen=True, eq=False)
class PictureFile:
    """A picture file of a request, decoded when it is needed. `size` is (width, height) in pixels, upright; `field`
    what errors call it.
    """

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
        """What `decode` gives, resized to (width, height): the same pixels, in much less memory. Raises as `decode`
        does.
        """
        with _DECODING, _opened(self.data, self.field, MAX_PIXELS) as image:
            return np.array(_upright(image).resize(size, resample), np.uint8)


TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What sets a picture upright, by its EXIF orientation."""
STRIP: Final = 1 << 20
"""Pixels that are converted to RGB at once."""


def _orientation(image: Image.Image) -> int:
    """Of its EXIF tags, 1 where there are none. 5 and above: width and height are exchanged."""
    if image.format in UPRIGHT:
        return 1
    found = Image.Image.getexif(image).get(Tag.Orientation, 1)  # that of PNG files would decode the pixels first
    return found if found in TURNS else 1


def _upright(image: Image.Image) -> Image.Image:
    """The picture upright and as RGB, made a strip at a time: one copy besides the file's, or none."""
    orientation, size = _orientation(image), image.size
    image.load()
    if image.size != size:
        raise ValueError(f"its header says {size[0]}x{size[1]} pixels, it has {image.size[0]}x{image.size[1]}")
    if image.mode == "RGB" and orientation not in TURNS and image.info.get("transparency") is None:
        return image
    across, backwards = (
        orientation >= 5,
        orientation in (3, 4, 7, 8),
    )  # its rows lie in the file as columns; the last comes first
    width, height = image.size[::-1] if across else image.size
    upright = Image.new("RGB", (width, height))
    step = max(1, STRIP // width)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        first, last = (height - bottom, height - top) if backwards else (top, bottom)
        strip = image.crop((first, 0, last, image.height) if across else (0, first, image.width, last))
        upright.paste(_rgb(strip.transpose(TURNS[orientation]) if orientation in TURNS else strip), (0, top))
    return upright


def _memory(image: Image.Image) -> int:
    """Bytes that `_upright` takes at most, from the header: the decoder's own and those of the RGB picture, 4 a pixel
    as Pillow has it.
    """
    own = BYTES.get(image.mode, 4) * COPIES.get(image.format or "", 1)
    return image.width * image.height * (own if image.mode == "RGB" and _orientation(image) not in TURNS else own + 4)


def decoded(picture: Picture | PictureFile) -> Picture:
    """The pixels of a picture or of a file. Raises InvalidInput when they are damaged."""
    return picture.decode() if isinstance(picture, PictureFile) else picture


def _rgb(image: Image.Image) -> Image.Image:
    """A picture or a strip of it as RGB, what is transparent laid over white."""
    if image.mode in SIXTEEN:
        return _scaled(image)
    if "A" not in image.mode.upper() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """16-bit grey as RGB: 8-bit level = round(255 sample / 65535)."""
    samples = np.asarray(image).astype(np.uint32)
    levels = ((samples + 128) // 257).astype(np.uint8)
    if image.info.get(WHITE_IS_ZERO):
        levels = 255 - levels
    levels[samples == image.info.get("transparency", -1)] = 255
    return Image.fromarray(levels).convert("RGB")


def encode_image(image: Picture, kind: Literal["png", "jpeg"] = "png", quality: int = 95) -> bytes:
    """Encode uint8 RGB [height, width, 3] as a PNG or JPEG file; `quality` 1 to 95 is for JPEG. Raises InvalidInput."""
    check_picture(image, "image")
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, quality=quality)
    return file.getvalue()


def check_picture(image: NDArray[Any], field: str) -> None:
    """Raise InvalidInput naming `field` unless the array is a uint8 RGB picture [height, width, 3] with pixels."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InvalidInput(
            field, f"has dtype {image.dtype} and shape {list(image.shape)}, expected uint8 [height, width, 3]"
        )
