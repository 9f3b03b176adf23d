"""Safe decoding and encoding of pictures. Pictures are uint8 RGB [height, width, 3] everywhere.

Decoding returns the first frame, rotated by EXIF or the container, with transparency composited over white, as
transformers' load_image and convert_to_rgb do. 16-bit grey is scaled to 8 bits by the PNG specification (third edition,
section 13.12); Pillow alone would clip it. Of 16-bit colours Pillow returns the high byte. Colours are treated as sRGB:
colour profiles are not applied, as in transformers.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.ExifTags import IFD
from PIL.ExifTags import Base as Tag
from PIL.PngImagePlugin import PngInfo
from pillow_heif import register_heif_opener

from runtime import limits
from runtime.errors import InvalidInput

Picture = NDArray[np.uint8]
Encoding = Literal["png", "jpeg", "webp"]
"""The formats that pictures are written in."""
MAX_PIXELS: Final = limits.PICTURE_PIXELS.most
"""Pictures with more pixels are refused, as files and as results of a resize."""
COPIES: Final = {"WEBP": 3, "AVIF": 3, "HEIF": 2}
"""Measured number of copies of the picture in a decoder's memory, if it is more than one."""
UPRIGHT: Final = ("TIFF", "HEIF")
"""Formats whose decoders apply the orientation themselves."""
BYTES: Final = {"1": 1, "L": 1, "P": 1, "I;16": 2, "LA": 4, "RGB": 4, "RGBA": 4, "CMYK": 4}
"""Bytes of a pixel in Pillow's memory, by mode."""
FORMATS: Final = {
    "PNG": "PNG", "JPEG": "JPEG", "WEBP": "WebP", "BMP": "BMP", "GIF": "GIF", "TIFF": "TIFF", "AVIF": "AVIF",
    "HEIF": "HEIC",
}  # fmt: skip
"""The formats that are read: Pillow's names and the common ones. No other decoder opens a file."""
SIXTEEN: Final = ("I;16", "I;16B", "I;16L", "I;16N")
"""Pillow's modes of 16-bit grey."""
MODES: Final = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", *SIXTEEN})
"""Pillow's modes with a defined brightness. The others are LAB and 32-bit integers or floats."""
COMPRESSIONS: Final = frozenset({"raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "jpeg"})
"""TIFF compressions that are read, in Pillow's spelling. Decoders of others, such as fax, print a line to stderr for
each damaged row.
"""
WHITE_IS_ZERO: Final = "white_is_zero"
"""Key in `info` of 16-bit grey TIFF files in which 0 is white."""
UNICODE: Final = b"UNICODE\x00"
"""The character code before a comment in UTF-16 (EXIF 2.32, tag UserComment)."""
COMMENT: Final = 65_000
"""The longest comment in bytes of a JPEG file, whose EXIF data share one segment of 65,533 (JPEG, marker APP1)."""
CHUNKS: Final = 10_000
"""The most chunks of a PNG file that are searched for its orientation."""


def decode_image(data: bytes, field: str = "image", max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode a picture file of one of `FORMATS` to uint8 RGB [height, width, 3].

    Raises InvalidInput that names `field` if the data has another format, is damaged, or has more than `max_pixels`
    pixels. The size is read from the header before any pixel is decoded.
    """
    with opened(data, field, max_pixels) as image:
        return np.array(_upright(image), np.uint8)


@contextmanager
def opened(data: bytes, field: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open a picture file and read its header, but no pixel. Also converts errors that occur in the block to
    InvalidInput, except for a MemoryError.
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
    except (InvalidInput, MemoryError):
        raise
    # Pillow's own limits are above these by default.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise too_large from None
    except UnidentifiedImageError:
        *names, last = FORMATS.values()
        raise InvalidInput(
            field, f"is no {', '.join(names)} or {last} picture that can be read ({len(data)} bytes)"
        ) from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds of exception on damaged data
        raise InvalidInput(field, f"is a damaged picture: {error}") from None


def _check_kind(image: Image.Image, field: str) -> None:
    """Raise InvalidInput if the pixel type or compression of a file is not supported."""
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
    """Pillow's names of the formats. Registers the decoder of HEIC, which is a separate library."""
    register_heif_opener(thumbnails=False, depth_images=False, aux_images=False)
    return list(FORMATS)


def _amend(image: Image.Image, data: bytes) -> None:
    """Correct Pillow's `info` after the header was read: its values have the file's bit depth, the pixels will have 8
    bits.
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
    """The first chunk of a kind in a PNG file. Pillow reads chunks after the pixels only once these are decoded."""
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
"""Only one file is decoded at a time: a small file may have many pixels."""


@dataclass(frozen=True, eq=False)
class PictureFile:
    """A picture file of a request, decoded when it is needed. `size` is (width, height) in pixels after rotation by
    EXIF; `field` is its name in errors.
    """

    data: bytes
    field: str
    size: tuple[int, int]

    @classmethod
    def open(cls, data: bytes, field: str) -> PictureFile:
        """Check a file's length and header. Raises InvalidInput as `decode_image` does, except for damaged pixels."""
        limits.PICTURE_BYTES.length(field, data)
        with opened(data, field, MAX_PIXELS) as image:
            limits.DECODED.count(field, _memory(image))
            return cls(data, field, image.size[::-1] if _orientation(image) >= 5 else image.size)

    def decode(self) -> Picture:
        """Decode the file as `decode_image` does. Raises InvalidInput if its pixels are damaged."""
        with _DECODING:
            return decode_image(self.data, self.field)

    def resized(self, size: tuple[int, int], resample: Image.Resampling) -> Picture:
        """Decode and resize to (width, height): the same pixels as from `decode`, in much less memory. Raises
        InvalidInput if they are damaged.
        """
        with _DECODING, opened(self.data, self.field, MAX_PIXELS) as image:
            return np.array(_upright(image).resize(size, resample), np.uint8)

    def opacity(self) -> Picture:
        """How opaque each pixel is, uint8 [height, width]. Raises InvalidInput if the pixels are damaged."""
        with _DECODING, opened(self.data, self.field, MAX_PIXELS) as image:
            orientation = _orientation(image)
            alpha = image.convert("RGBA").getchannel("A")
            return np.array(alpha.transpose(TURNS[orientation]) if orientation in TURNS else alpha, np.uint8)

    def holes(self) -> Picture:
        """White where the file is fully transparent, black elsewhere, uint8 RGB [height, width, 3]. Raises InvalidInput
        if its pixels are damaged.
        """
        white = np.where(self.opacity() == 0, 255, 0).astype(np.uint8)
        return np.repeat(white[:, :, None], 3, axis=2)


TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""The transposition that undoes each EXIF orientation."""
STRIP: Final = 1 << 20
"""Number of pixels that are converted to RGB at once."""


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 if there is none. From 5 on, width and height are exchanged."""
    if image.format in UPRIGHT:
        return 1
    found = Image.Image.getexif(image).get(Tag.Orientation, 1)  # PNG files' own getexif would decode the pixels
    return found if found in TURNS else 1


def _upright(image: Image.Image) -> Image.Image:
    """The rotated picture as RGB, converted strip by strip, so that there is at most one more copy in memory."""
    orientation, size = _orientation(image), image.size
    image.load()
    if image.size != size:
        raise ValueError(f"its header says {size[0]}x{size[1]} pixels, it has {image.size[0]}x{image.size[1]}")
    if image.mode == "RGB" and orientation not in TURNS and image.info.get("transparency") is None:
        return image
    # Whether rows of the result are columns of the file, and whether the last one comes first.
    across, backwards = orientation >= 5, orientation in (3, 4, 7, 8)
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
    """The most bytes that `_upright` needs, from the header: the decoder's, and 4 for each pixel of the RGB picture."""
    own = BYTES.get(image.mode, 4) * COPIES.get(image.format or "", 1)
    return image.width * image.height * (own if image.mode == "RGB" and _orientation(image) not in TURNS else own + 4)


def decoded(picture: Picture | PictureFile) -> Picture:
    """The pixels of a picture or of a file. Raises InvalidInput if they are damaged."""
    return picture.decode() if isinstance(picture, PictureFile) else picture


def resized(picture: Picture | PictureFile, size: tuple[int, int], resample: Image.Resampling) -> Picture:
    """The pixels of a picture or of a file, resized to (width, height). Raises InvalidInput if they are damaged."""
    if isinstance(picture, PictureFile):
        return picture.resized(size, resample)
    return np.array(Image.fromarray(picture).resize(size, resample), np.uint8)


def grey(picture: Picture | PictureFile) -> Picture:
    """The brightness of the pixels of a picture or of a file, uint8 [height, width]. Raises InvalidInput if they are
    damaged.
    """
    return np.array(Image.fromarray(decoded(picture)).convert("L"), np.uint8)


def files(pictures: Iterable[Picture | PictureFile]) -> list[PictureFile]:
    """Those of the pictures that are files."""
    return [picture for picture in pictures if isinstance(picture, PictureFile)]


def file_bytes(pictures: Iterable[Picture | PictureFile]) -> int:
    """What the files among pictures hold."""
    return sum(len(file.data) for file in files(pictures))


def file_pixels(pictures: Iterable[Picture | PictureFile]) -> int:
    """The pixels that the files among pictures have once they are decoded."""
    return sum(width * height for width, height in (file.size for file in files(pictures)))


def lengths(picture: Picture | PictureFile) -> tuple[int, int]:
    """Height and width of a picture or of a file, in pixels."""
    return picture.size[::-1] if isinstance(picture, PictureFile) else picture.shape[:2]


def _rgb(image: Image.Image) -> Image.Image:
    """A picture or a strip of it as RGB, with transparency composited over white."""
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


def encode_image(
    image: Picture, kind: Encoding = "png", quality: int = 95, texts: Mapping[str, str] | None = None
) -> bytes:
    """Encode uint8 RGB [height, width, 3] as a file; `quality` 0 to 100 is for JPEG and WebP. PNG files have all
    `texts` by keyword, others the first one as the comment in their EXIF data. Raises InvalidInput.
    """
    check_picture(image, "image")
    file, info, exif = io.BytesIO(), PngInfo(), Image.Exif()
    for keyword, text in (texts or {}).items():
        info.add_text(keyword, text)
    more: dict[str, Any] = {"pnginfo": info} if kind == "png" else {"quality": quality}
    if kind != "png" and texts:
        comment = UNICODE + next(iter(texts.values())).encode("utf-16-be")
        if kind == "jpeg" and len(comment) > COMMENT:
            raise InvalidInput("image", f"cannot hold a text of {len(comment):,} bytes as JPEG, expected at most "
                f"{COMMENT:,}: choose PNG or WebP, or write less")  # fmt: skip
        exif.get_ifd(IFD.Exif)[Tag.UserComment] = comment
        more["exif"] = exif
    Image.fromarray(image).save(file, kind, **more)
    return file.getvalue()


def check_picture(image: NDArray[Any], field: str) -> None:
    """Raise InvalidInput naming `field` unless the array is a uint8 RGB picture [height, width, 3] with pixels."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InvalidInput(
            field, f"has dtype {image.dtype} and shape {list(image.shape)}, expected uint8 [height, width, 3]"
        )
