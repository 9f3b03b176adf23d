"""Depth of a photograph by a model in a single ONNX file, such as Depth Anything or MiDaS small: what control networks
of depth are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import cv2
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from export.checkpoint.component import read_json
from runtime.errors import EngineError, NotFound, SourceError, UnsupportedModel
from runtime.vision.images import Picture

PUBLISHED: Final = "preprocessor_config.json"
FLOATS: Final = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
"""ONNX Runtime's names of the types that pictures and depths may have."""
Triple = tuple[float, float, float]
UNWRITTEN: Final[Mapping[str, Any]] = {
    "size": {"height": 384, "width": 384}, "keep_aspect_ratio": False, "ensure_multiple_of": 1,
    "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5),
}  # fmt: skip
"""What DPTImageProcessor does where a preprocessor_config.json does not say it."""


class Edges(BaseModel):
    """A size in pixels, as a preprocessor_config.json has it."""

    height: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=4096)


class Preparation(BaseModel):
    """How a model wants its pictures, under the names of transformers' DPTImageProcessor. The defaults are those of
    Depth Anything; its mean and deviation of red, green and blue are MiDaS', too.
    """

    size: Edges = Edges(height=518, width=518)
    keep_aspect_ratio: bool = True
    ensure_multiple_of: int = Field(default=14, ge=1, le=256)
    resample: int = Field(default=Image.Resampling.BICUBIC, ge=0, le=5)
    rescale_factor: float = 1 / 255
    image_mean: Triple = (0.485, 0.456, 0.406)
    image_std: Triple = (0.229, 0.224, 0.225)
    do_resize: Literal[True] = True
    do_rescale: Literal[True] = True
    do_normalize: Literal[True] = True
    do_pad: Literal[False] | None = None

    @classmethod
    def beside(cls, file: Path) -> Preparation:
        """That of the preprocessor_config.json beside a file, or in the folder above it, else the defaults. Raises
        SourceError.
        """
        found = next((one for one in (file.parent / PUBLISHED, file.parent.parent / PUBLISHED) if one.is_file()), None)
        if found is None:
            return cls()
        try:
            return cls.model_validate({**UNWRITTEN, **read_json(found)})
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise SourceError(f"{found} cannot be followed: {reasons}. Correct it, or move it away") from None

    def lengths(self, height: int, width: int) -> tuple[int, int]:
        """The height and width that a picture is resized to: DPTImageProcessor's `get_resize_output_image_size`."""
        scales = self.size.height / height, self.size.width / width
        if self.keep_aspect_ratio:
            scales = (min(scales, key=lambda scale: abs(1 - scale)),) * 2
        found = (round(s * own / self.ensure_multiple_of) for s, own in zip(scales, (height, width), strict=True))
        rows, columns = (max(1, count) * self.ensure_multiple_of for count in found)
        return rows, columns


@dataclass(frozen=True)
class DepthModel:
    """A model of depth. `fixed` are the height and width of its pictures where the file says them."""

    file: Path
    session: onnxruntime.InferenceSession
    preparation: Preparation
    fixed: tuple[int | None, int | None]

    @classmethod
    def open(
        cls, file: Path, edge: int | None = None, mean: Triple | None = None, std: Triple | None = None
    ) -> DepthModel:
        """Load a model. `edge`, `mean` and `std` replace what `Preparation` finds.

        Raises NotFound, SourceError where ONNX Runtime cannot read the file, and UnsupportedModel where its input is
        no picture or no output a depth of each pixel.
        """
        if not file.is_file():
            raise NotFound(f"model {file} does not exist: expected an ONNX file")
        try:
            session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has an exception of its own for each kind of failure
            raise SourceError(f"{file} cannot be read by ONNX Runtime: {' '.join(str(error).split())}") from None
        _check(file, session)
        found = Preparation.beside(file)
        chosen = {"size": edge and Edges(height=edge, width=edge), "image_mean": mean, "image_std": std}
        found = found.model_copy(update={name: value for name, value in chosen.items() if value is not None})
        rows, columns = (one if isinstance(one, int) else None for one in session.get_inputs()[0].shape[2:])
        return cls(file, session, found, (rows, columns))

    def __call__(self, picture: Picture) -> Picture:
        """Grey, near bright, of uint8 RGB [height, width, 3], and of its size: from 0 for the farthest pixel to 255 for
        the nearest, as transformers' depth-estimation pipeline has it, which diffusers' examples use. The model must
        give larger numbers for what is nearer. Raises EngineError where it fails.
        """
        height, width = picture.shape[:2]
        (given,), output = self.session.get_inputs(), _depth(self.session)
        pixels = self._pixels(picture).astype(FLOATS[given.type])
        try:
            (found,) = self.session.run([output.name], {given.name: pixels})
        except Exception as error:  # as above
            raise EngineError(f"{self.file} fails on this picture: {' '.join(str(error).split())}") from None
        depth = np.asarray(found, np.float32).reshape(found.shape[-2:])
        depth = cv2.resize(depth, (width, height), interpolation=cv2.INTER_CUBIC)
        if not np.isfinite(depth).all():
            raise EngineError(f"{self.file} gave NaN or infinite depths: take its float32 weights")
        spread = float(depth.max() - depth.min()) or 1.0
        grey = ((depth - depth.min()) / spread * 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)

    def _pixels(self, picture: Picture) -> NDArray[np.float32]:
        """The model's input [1, 3, height, width]."""
        chosen = self.preparation.lengths(*picture.shape[:2])
        rows, columns = (own or length for own, length in zip(self.fixed, chosen, strict=True))
        wanted = self.preparation
        resized = np.asarray(Image.fromarray(picture).resize((columns, rows), wanted.resample), np.float32)
        mean, std = (np.array(values, np.float32) for values in (wanted.image_mean, wanted.image_std))
        return np.ascontiguousarray(
            ((resized * np.float32(wanted.rescale_factor) - mean) / std).transpose(2, 0, 1)[None]
        )


def _depth(session: onnxruntime.InferenceSession) -> Any:
    """The first output that is a number for each pixel: [1, height, width] or [1, 1, height, width]."""
    return next((one for one in session.get_outputs() if one.type in FLOATS and _is_depth(one.shape)), None)


def _is_depth(shape: Sequence[Any]) -> bool:
    """Whether a shape, whose variable lengths are names, is that of one number for each pixel."""
    return len(shape) in (3, 4) and all(axis == 1 for axis in shape[:-2] if isinstance(axis, int))


def _check(file: Path, session: onnxruntime.InferenceSession) -> None:
    inputs = session.get_inputs()
    pictures = [one for one in inputs if one.type in FLOATS and len(one.shape) == 4 and one.shape[1] in (3, None)]
    batches = [one for one in pictures if not isinstance(one.shape[0], int) or one.shape[0] == 1]
    if len(inputs) != 1 or not batches:
        raise UnsupportedModel(
            f"{file} reads {_listed(inputs)}, expected one input, float [1, 3, height, width]: take a model of depth "
            "that reads a picture"
        )
    if _depth(session) is None:
        raise UnsupportedModel(
            f"{file} gives {_listed(session.get_outputs())}, expected float [1, height, width]: take a model that "
            "gives a depth for each pixel"
        )


def _listed(several: Any) -> str:
    return ", ".join(f"{one.name} {one.type} {one.shape}" for one in several) or "nothing"
