"""Pictures to the pixels that a vision encoder gets, as the image processor files of a model describe it.

The steps and their roundings are those of transformers' image processors on Pillow, which a test compares with: pad to
a square (LLaVA's class alone), resize, center crop, rescale, normalize. The classes differ in what they take for a
setting that the file leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from runtime import limits
from runtime.errors import BundleError, InvalidInput
from runtime.vision.images import Picture, PictureFile, check_picture, decoded, lengths, resized

CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
HALF: Final = (0.5, 0.5, 0.5)


class Edge(BaseModel):
    """Resize so that the shorter edge gets this length in pixels and the aspect stays."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    shortest_edge: int = Field(gt=0)


class Size(BaseModel):
    """An exact size in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    height: int = Field(gt=0)
    width: int = Field(gt=0)


CLIP: Final[Mapping[str, Any]] = {
    "size": Edge(shortest_edge=224), "crop_size": Size(height=224, width=224), "do_center_crop": True,
    "resample": Image.Resampling.BICUBIC, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
}  # fmt: skip
SQUARE: Final[Mapping[str, Any]] = {
    "size": Size(height=224, width=224), "crop_size": None, "do_center_crop": False, "image_mean": HALF,
    "image_std": HALF,
}  # fmt: skip
Classes = Mapping[str, Mapping[str, Any]]
"""Image processor classes by name, and what each takes for a setting that the file leaves out. The first is the class
of files that name none.
"""
CLASSES: Final[Classes] = {
    "LlavaImageProcessor": CLIP,
    "CLIPImageProcessor": CLIP,
    "SiglipImageProcessor": {**SQUARE, "resample": Image.Resampling.BICUBIC},
    "ViTImageProcessor": {**SQUARE, "resample": Image.Resampling.BILINEAR},
    "BlipImageProcessor": {
        "size": Size(height=384, width=384), "crop_size": None, "do_center_crop": False,
        "resample": Image.Resampling.BICUBIC, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
    },
}  # fmt: skip
"""Those of models whose pictures are one tile. Files without a class are LLaVA's, as transformers has it."""
SQUARES: Final = ("ViTImageProcessor", "BlipImageProcessor")
"""The classes to which a size of one number is both height and width; to the others, it is the shortest edge."""
PADS: Final = "LlavaImageProcessor"
"""The class that pads pictures to squares before it resizes them. The others pad to one size for all, which they have
already.
"""
RGB: Final = "do_convert_rgb"
"""Pictures are RGB when they come here, so it makes no difference."""


def _size(value: object, square: bool = True) -> object:
    """A size as files write it: a number, two numbers, or an object, whose keys that do not apply may be null."""
    if isinstance(value, bool) or value is None or isinstance(value, Edge | Size):
        return value
    if isinstance(value, int):
        return Size(height=value, width=value) if square else Edge(shortest_edge=value)
    if isinstance(value, list | tuple) and len(value) == 2:
        return Size(height=value[0], width=value[1])
    if not isinstance(value, dict):
        raise ValueError(
            f"is {value!r}, expected a number of pixels, or an object with shortest_edge, or with height and width"
        )
    given = {key: length for key, length in value.items() if length is not None}
    if given.keys() == {"shortest_edge"}:
        return Edge(**given)
    if given.keys() == {"height", "width"}:
        return Size(**given)
    raise ValueError(f"has {', '.join(map(str, given)) or 'nothing'}, expected shortest_edge, or height and width")


def _three(value: object) -> object:
    """One number for all colours, or one for each."""
    return (value,) * 3 if isinstance(value, int | float) and not isinstance(value, bool) else value


Colours = Annotated[tuple[float, float, float] | None, BeforeValidator(_three)]


class ImagePreprocessor(BaseModel):
    """What a preprocessor_config.json describes; names and defaults are transformers'. A step that is null is left out,
    as there.

    Settings that would change the result and are not known here are refused, never ignored.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")
    image_processor_type: str
    do_pad: bool | None = False
    do_resize: bool | None = True
    size: Edge | Size | None
    resample: Image.Resampling | None
    do_center_crop: bool | None
    crop_size: Annotated[Size | None, BeforeValidator(_size)]
    do_rescale: bool | None = True
    rescale_factor: float | None = 1 / 255
    do_normalize: bool | None = True
    image_mean: Colours
    image_std: Colours
    _file: str = PrivateAttr("the image processor's settings")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: object, info: ValidationInfo) -> object:
        """Settle the class, fill in what it takes for absent settings. The context is the `Classes` to choose from."""
        classes: Classes = info.context or CLASSES
        if not isinstance(data, dict):
            raise ValueError("an object of settings was expected")
        named = data.get("image_processor_type") or data.get("feature_extractor_type") or next(iter(classes))
        kind = str(named).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
        if kind not in classes:
            raise ValueError(f"the class {named} is not supported, expected one of {', '.join(classes)}")
        unknown = sorted(
            key
            for key, value in data.items()
            if key.startswith("do_") and value and key not in {*cls.model_fields, RGB}
        )
        if data.get("do_pad") and data.get("pad_size") is not None and kind != PADS:
            unknown.append("pad_size")
        if unknown:
            raise ValueError(f"{', '.join(unknown)} is not supported")
        if data.get("do_pad") and kind == PADS and isinstance(data.get("image_mean"), int | float):
            raise ValueError(
                "image_mean is one number, expected three where pictures are padded: the padding has that colour"
            )
        settings = {**classes[kind], **data, "image_processor_type": kind}
        try:
            settings["size"] = _size(settings["size"], square=kind in SQUARES)
        except ValueError as error:
            raise ValueError(f"size {_reason(error)}") from None
        return settings

    @model_validator(mode="after")
    def _complete(self) -> ImagePreprocessor:
        needs = {
            "do_resize": ("size", "resample"), "do_center_crop": ("crop_size",), "do_rescale": ("rescale_factor",),
            "do_normalize": ("image_mean", "image_std"),
        }  # fmt: skip
        for step, settings in needs.items():
            for name in settings:
                if getattr(self, step) and getattr(self, name) is None:
                    raise ValueError(f"{step} needs {name}, which is null")
        if self.do_normalize and not all(self.image_std or ()):
            raise ValueError("image_std is 0, expected what colours are divided by")
        if not self.do_center_crop and not (self.do_resize and (isinstance(self.size, Size) or self.pads)):
            raise ValueError(
                "pictures would keep sizes of their own; a vision encoder takes one size, so crop or resize to height "
                "and width"
            )
        return self

    @classmethod
    def from_folder(cls, folder: Path, classes: Classes = CLASSES) -> ImagePreprocessor:
        """The section image_processor of processor_config.json, else preprocessor_config.json, as transformers 5.
        Raises BundleError, also for a class that is none of `classes`.
        """
        nested, own = folder / "processor_config.json", folder / "preprocessor_config.json"
        for path in filter(Path.is_file, (nested, own)):
            try:
                data = json.loads(path.read_bytes())
                if path == nested:
                    data = data.get("image_processor") if isinstance(data, dict) else []
                    if data is None:
                        continue
                found = cls.model_validate(data, context=classes)
            except (ValueError, TypeError, RecursionError) as error:
                raise BundleError(f"{path} cannot be used: {_reason(error)}") from None
            found._file = str(path)
            return found
        raise BundleError(
            f"{folder} has no image processor, neither preprocessor_config.json nor image_processor in "
            "processor_config.json"
        )

    @property
    def pads(self) -> bool:
        """Whether pictures are padded to squares first."""
        return bool(self.do_pad) and self.image_processor_type == PADS

    @property
    def origin(self) -> str:
        """The file and field that say how large the pictures are."""
        return f"{self._file} ({'crop_size' if self.do_center_crop else 'size'})"

    @property
    def output_size(self) -> Size:
        """Height and width in pixels of what the vision encoder gets."""
        if self.do_center_crop:
            assert self.crop_size is not None
            return self.crop_size
        return Size(height=self.square[1], width=self.square[0])

    @property
    def square(self) -> tuple[int, int]:
        """Width and height in pixels of a picture that is resized without regard to its aspect."""
        assert self.size is not None
        if isinstance(self.size, Edge):
            return self.size.shortest_edge, self.size.shortest_edge
        return self.size.width, self.size.height

    def __call__(self, images: Sequence[Picture | PictureFile], field: str = "image") -> NDArray[np.float32]:
        """Preprocess pictures, each uint8 RGB [height, width, 3] or a file, to pixel_values float32 [images, 3, height,
        width].

        Raises InvalidInput naming `field`, or that of the file, for another kind of array, a damaged file, or a picture
        so elongated that its resized form would have too many pixels.
        """
        return np.stack([self._one(image, field) for image in images])

    def _one(self, image: Picture | PictureFile, field: str) -> NDArray[np.float32]:
        if not isinstance(image, PictureFile):
            check_picture(image, field)
        if self.pads:
            self.check(lengths(image)[::-1], field)
            image = self._padded(decoded(image))
        image = self._resize(image, field) if self.do_resize else decoded(image)
        if self.do_center_crop:
            assert self.crop_size is not None
            image = center_crop(image, self.crop_size)
        # float64 and back, then float32: the roundings of the reference.
        scale = np.float64((self.rescale_factor or 0) if self.do_rescale else 1)
        pixels = np.multiply(image, scale, dtype=np.float64).astype(np.float32)
        if self.do_normalize:
            pixels -= np.array(self.image_mean, np.float32)
            pixels /= np.array(self.image_std, np.float32)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def check(self, size: tuple[int, int], field: str) -> None:
        """Raise InvalidInput naming `field` where a picture of this (width, height) cannot be padded or resized."""
        if self.pads and max(size) ** 2 > limits.PICTURE_PIXELS.most:
            raise InvalidInput(
                field, f"is {size[0]}x{size[1]}, which would be padded to a square: send a less elongated picture"
            )
        if self.do_resize:
            self._target((max(size), max(size)) if self.pads else size, field)

    def _padded(self, image: Picture) -> Picture:
        """A square with the picture in its middle, around it the mean colour."""
        height, width = image.shape[:2]
        edge, colour = max(height, width), [int(mean * 255) for mean in self.image_mean or (0, 0, 0)]
        square = np.empty((edge, edge, 3), np.uint8)
        square[:] = np.array(colour).astype(np.uint8)
        top, left = (edge - height) // 2, (edge - width) // 2
        square[top : top + height, left : left + width] = image
        return square

    def _target(self, size: tuple[int, int], field: str) -> tuple[int, int]:
        """What (width, height) is resized to."""
        width, height = size
        assert self.size is not None
        if isinstance(self.size, Size):
            return self.size.width, self.size.height
        edge, short = self.size.shortest_edge, min(height, width)
        target = (int(edge * width / short), int(edge * height / short))
        if target[0] * target[1] > limits.RESIZED_PIXELS.most:
            raise InvalidInput(
                field,
                f"is {width}x{height}, which would be resized to {target[0]}x{target[1]}: send a less elongated "
                "picture",
            )
        return target

    def _resize(self, image: Picture | PictureFile, field: str) -> Picture:
        if isinstance(image, PictureFile):
            return self.resized(image, self._target(image.size, image.field))
        height, width = image.shape[:2]
        return self.resized(image, self._target((width, height), field))

    def resized(self, image: Picture | PictureFile, size: tuple[int, int]) -> Picture:
        """A picture resized to (width, height) with the model's filter. Raises InvalidInput for a damaged file."""
        assert self.resample is not None
        return resized(image, size, self.resample)


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
    return "; ".join(
        ": ".join(filter(None, [".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")]))
        for e in error.errors()
    )
