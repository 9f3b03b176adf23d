"""The quality report of a bundle as one page: everything it shows is in the file, and it needs neither network nor scripts.

The text is `report.html`, a jinja2 template that escapes everything from the bundle; the page's own policy forbids it to load anything.
"""

from __future__ import annotations

import base64
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import jinja2
import numpy as np

from calibration.metrics import CAP_DB
from export.quality import TITLES, UNITS, PictureQuality, Quality, floors, load_quality
from runtime.bundle import Bundle
from runtime.errors import BundleError, InvalidInput, ResourceExhausted
from runtime.images import Picture, decode_image, encode_image

GAIN: Final = 8
"""How much the difference of two pictures is amplified: 32 levels of 255 become white."""
TEMPLATE: Final = Path(__file__).with_name("report.html")


def report(bundle: Bundle, output: Path) -> None:
    """Write the page of a bundle's quality to the file `output`; it appears whole or not at all.

    Raises NotFound when the bundle holds no quality report, BundleError when that is damaged, InvalidInput when `output` is a folder,
    ResourceExhausted when it cannot be written.
    """
    page = render(bundle, load_quality(bundle))
    if output.is_dir():
        raise InvalidInput("output", f"{output} is a folder, expected the name of a file such as {output / 'report.html'}")
    part = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(page, encoding="utf-8")
        part.replace(output)
    except OSError as error:
        raise ResourceExhausted(f"cannot write {output}: {error.strerror}. Choose another place") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def render(bundle: Bundle, quality: Quality) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    found = {floor: quality.found(floor.measure) for floor in floors(quality.quant)}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        manifest=bundle.manifest,
        quality=quality,
        shortfalls=quality.shortfalls(quality.quant),
        floors=[(floor, min(figures.values())) for floor, figures in found.items() if figures],
        least=next((floor for floor in found if floor.measure == "submodel_snr_db"), None),
        drawn=[(one, _three(bundle, one)) for one in quality.pictures],
        answers=[(one, _data(_picture(bundle, one.picture)) if one.picture else None) for one in quality.answers],
        cap=CAP_DB,
        gain=GAIN,
        titles=TITLES,
        units=UNITS,
    )


def _three(bundle: Bundle, one: PictureQuality) -> tuple[str, str, str]:
    """The reference's picture, the quantized one's and their amplified difference, as data URIs."""
    reference, quantized = _picture(bundle, one.reference), _picture(bundle, one.quantized)
    if reference.shape != quantized.shape:
        raise BundleError(f"{one.reference} and {one.quantized} of bundle {bundle.root} differ in size. Build the bundle again")
    return _data(reference), _data(quantized), _data(difference(reference, quantized))


def difference(one: Picture, other: Picture) -> Picture:
    """|one - other| in each channel, `GAIN` times amplified: uint8 RGB [height, width, 3]."""
    return np.asarray((np.abs(one.astype(np.int32) - other) * GAIN).clip(0, 255), np.uint8)


def _picture(bundle: Bundle, path: str) -> Picture:
    """A picture of the bundle, decoded: what is shown is what was decoded, whatever else the file holds."""
    file = bundle.root / path
    if not file.is_file():
        raise BundleError(f"{file} is missing, which the quality report shows. Build the bundle again")
    try:
        return decode_image(file.read_bytes(), path)
    except InvalidInput as error:
        raise BundleError(f"{file} cannot be shown: {error}. Build the bundle again") from None


def _data(picture: Picture) -> str:
    """A picture as a data URI of its PNG file."""
    return f"data:image/png;base64,{base64.b64encode(encode_image(picture)).decode()}"
