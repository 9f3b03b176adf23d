"""What a build adds to a checkpoint: control networks, adapters, and whatever else `KINDS` lists."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runtime.errors import InvalidInput, NotFound, did_you_mean, quoted

METAVAR: Final = "[NAME=]PATH"
NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*")
NUMBER: Final = re.compile(r"-?(\d+(\.\d*)?|\.\d+)")
LARGEST: Final = 100.0
"""Of a scale, with either sign: what is larger is a mistake."""


@dataclass(frozen=True)
class Kind:
    """A kind of addition: the help of its option, whether a build scales it, and whether it decides what is traced,
    rather than weights alone.
    """

    help: str
    scaled: bool = False
    traced: bool = True

    @property
    def metavar(self) -> str:
        """How one is written."""
        return METAVAR + ("[:SCALE]" if self.scaled else "")


KINDS: Final[Mapping[str, Kind]] = {
    "lora": Kind("A LoRA (.safetensors) whose products are added to the weights.", scaled=True, traced=False),
    "adapter": Kind("A LoRA (.safetensors) that requests choose by its name."),
    "embedding": Kind("A learned token (textual inversion, .safetensors), named as in prompts.", traced=False),
    "ip_adapter": Kind("An image adapter (.safetensors beside its folder image_encoder), which requests name."),
    "controlnet": Kind(
        "A control network (folder of a ControlNetModel, or its .safetensors file), which requests name.", traced=False
    ),
    "vae": Kind(
        "An autoencoder (folder of an AutoencoderTiny or AutoencoderKL) in place of the checkpoint's.", traced=False
    ),
    "draft": Kind(
        "A draft of a language model (.safetensors), which guesses tokens of answers where requests say so.",
        traced=False,
    ),
}
"""Every kind that a family takes, by the name of its option."""


@dataclass(frozen=True)
class Addition:
    """One thing that a build adds: its kind, its file or folder, its name and, where the kind is scaled, its weight.

    The name is that of the folder, or of the file without its ending, where none is given: letters, digits and "._-".
    Raises InvalidInput for what no addition can be. Whether `path` exists is checked by `check`.
    """

    kind: str
    path: Path
    name: str = ""
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidInput("additions", f"there is no kind '{self.kind}': {did_you_mean(self.kind, KINDS)}")
        object.__setattr__(self, "path", Path(self.path))
        name = self.name or (self.path.stem if self.path.is_file() else self.path.absolute().name)
        if not NAME.fullmatch(name):
            raise InvalidInput(
                self.kind,
                f"{self.path} cannot be named {quoted(name)}: give a name of letters, digits and '._-', as in "
                f"NAME={self.path}",
            )
        object.__setattr__(self, "name", name)
        if self.scale != 1 and not KINDS[self.kind].scaled:
            raise InvalidInput(
                self.kind, f"'{name}' has the scale {self.scale:g}: a build does not scale one, leave it"
            )
        if not abs(self.scale) <= LARGEST:
            raise InvalidInput(
                self.kind, f"'{name}' has the scale {self.scale:g}, expected {-LARGEST:g} to {LARGEST:g}"
            )

    @classmethod
    def parse(cls, kind: str, text: str) -> Addition:
        """From `[name=]PATH[:scale]`. What stands before "=" is a name if it can be one; what stands behind the last
        colon is a scale if it is a number, unless there is a file or folder of that whole name.
        """
        name, equals, path = text.partition("=")
        if not equals or not NAME.fullmatch(name):
            name, path = "", text
        before, colon, last = path.rpartition(":")
        scaled = bool(before and colon and NUMBER.fullmatch(last)) and not _path(path).exists()
        path = before if scaled else path
        if not path:
            raise InvalidInput(kind, f"is {quoted(text)}, expected {METAVAR}, a file or folder")
        return cls(kind, _path(path), name, float(last) if scaled else 1.0)

    def check(self) -> None:
        """Raises NotFound where there is no such file or folder."""
        if not self.path.exists():
            raise NotFound(f"{self.kind} {self.path} does not exist: expected {KINDS[self.kind].metavar}")


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # noqa: PTH111 -- Path.expanduser raises where there is no such user


def parse_all(texts: Mapping[str, Iterable[str] | None]) -> tuple[Addition, ...]:
    """The additions of each kind. Raises InvalidInput."""
    return tuple(Addition.parse(kind, text) for kind, several in texts.items() for text in several or ())


def check_additions(additions: Iterable[Addition]) -> None:
    """Raises InvalidInput where two of a kind have one name."""
    seen = set[tuple[str, str]]()
    for one in additions:
        if (one.kind, one.name) in seen:
            raise InvalidInput(one.kind, f"two are named '{one.name}': give one of them another name, NAME={one.path}")
        seen.add((one.kind, one.name))
