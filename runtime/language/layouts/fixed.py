"""Every picture is one tile, and every feature of the encoder one position: LLaVA 1.5 (Liu et al. 2023,
arXiv:2310.03744).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.signature import Array
from runtime.errors import BundleError
from runtime.language.layout import Layout, Size
from runtime.vision.images import Picture, PictureFile
from runtime.vision.preprocessing import ImagePreprocessor


@dataclass(frozen=True)
class Fixed(Layout):
    """`preprocessor` resizes a picture to the tile; `patches` are the features of one."""

    name: ClassVar[str] = "fixed"
    preprocessor: ImagePreprocessor
    patches: int

    @classmethod
    def open(cls, root: Path, patches: int, options: Mapping[str, Any]) -> Fixed:
        if options:
            raise BundleError(f"the chat settings have layout_options {', '.join(options)}, the layout fixed has none")
        return cls(ImagePreprocessor.from_folder(root / "preprocessor"), patches)

    @property
    def origin(self) -> str:
        return self.preprocessor.origin

    def check(self, size: Size, field: str) -> None:
        self.preprocessor.check((size.width, size.height), field)

    def positions(self, size: Size) -> int:
        return self.patches

    def tiles(self, picture: Picture | PictureFile, field: str) -> NDArray[np.float32]:
        return self.preprocessor([picture], field)

    def pack(self, features: Array, size: Size) -> Array:
        return np.asarray(features[0])
