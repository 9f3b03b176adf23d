"""Defaults of a model that draws, and what requests to it may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import Field, ValidationError

from runtime import limits
from runtime.bundle.manifest import Frozen
from runtime.errors import SourceError

DEFAULTS: Final = "enginecast.json"
"""File of a checkpoint's folder with the defaults of its model, which the published layouts have no place for."""


class ImageDefaults(Frozen):
    """Defaults of a request. `sampler` None is the one that the model was published with; `strength` is for requests
    that begin with a picture.
    """

    steps: int = Field(default=25, ge=1, le=limits.STEPS.most)
    guidance_scale: float = Field(default=7.5, ge=0, le=limits.GUIDANCE.most)
    sampler: str | None = None
    strength: float = Field(default=0.8, ge=0, le=limits.STRENGTH.most)

    @classmethod
    def read(cls, folder: Path, usual: ImageDefaults | None = None) -> ImageDefaults:
        """Those of the file `enginecast.json` of a checkpoint's folder, where there is one, else the family's usual.
        Raises SourceError.
        """
        file, usual = folder / DEFAULTS, usual or cls()
        if not file.is_file():
            return usual
        try:
            own = cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())
            raise SourceError(
                f"{file} gives no defaults that can be used: {reasons}. It may hold {', '.join(cls.model_fields)}"
            ) from None
        return usual.model_copy(update=own.model_dump(exclude_unset=True))


class ImageAbilities(Frozen):
    """What requests to a model may ask for. Edges of pictures are in pixels: `min_edge` to `max_edge`, multiples of
    `edge_multiple`, `default_edge` where a request names none. `defaults` are those of the model, its sampler included,
    `samplers` all that it can be drawn with. `image` is whether it can begin with a picture, `masked` whether it must
    be given a mask. `controls`, `styles` and `loras` are the names of the bundle's, `conditions` those of CONDITIONS
    that it takes.
    """

    min_edge: int
    max_edge: int
    default_edge: int
    edge_multiple: int
    defaults: ImageDefaults
    samplers: tuple[str, ...] = ()
    image: bool = False
    masked: bool = False
    controls: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> ImageAbilities | None:
        """Those that a model says (`ModelPipeline.abilities`), None if it says none."""
        return cls.model_validate(found) if found else None
