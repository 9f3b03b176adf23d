"""Calibration sets: captured inputs of a model's submodels in one safetensors file, to be looked at, kept, copied and
used again.

Tensors are named `submodel/call/input`, such as `unet/0003/sample`. Everything else is JSON under one key of the
header's metadata: one, because the library writes several in no fixed order. See docs/calibration.md.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from calibration.requests.task import task_requests
from runtime.bundle.signature import Array
from runtime.errors import InvalidInput, NotFound, ResourceExhausted, SourceError
from runtime.pipeline import pipelines

Kind = str
"""The pipeline of a model, as `Manifest.pipeline` names it."""
Samples = Mapping[str, Sequence[Mapping[str, Array]]]
"""Inputs by submodel: each of its calls maps an input's name to its array."""
METADATA: Final = "enginecast_calibration"
VERSION: Final = 1
ENOUGH: Final = 8
"""Requests below which a set is said to be small."""
NAMED: Final = 3
"""Skipped requests that a warning names."""


class Header(BaseModel):
    """What the file says besides its tensors. `counts` are the calls of each submodel, those without any included."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: int = VERSION
    kind: Kind = Field(pattern="^[a-z0-9_]+$")
    fingerprint: str
    settings: dict[str, JsonValue]
    counts: dict[str, NonNegativeInt] = Field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Inputs that the submodels of one model got while it worked.

    `fingerprint` is that of the checkpoint, as bundles have it. `settings` say how the set was made and can be written
    as JSON: `origin`, `count` and `seed` (what was requested), `requests` (how many were run), `skipped` (what was not,
    and why) and `positions` (for each submodel, how many of its calls are the first, second, ... of their request).
    """

    kind: Kind
    fingerprint: str
    settings: Mapping[str, Any]
    samples: Samples

    def save(self, path: Path) -> None:
        """Write the set; equal sets give equal bytes. The file appears whole or not at all. Raises InvalidInput,
        ResourceExhausted.
        """
        assert all("/" not in submodel and all(calls) for submodel, calls in self.samples.items()), (
            "calls have inputs, names no slash"
        )
        counts = {submodel: len(calls) for submodel, calls in self.samples.items()}
        header = Header(kind=self.kind, fingerprint=self.fingerprint, settings=dict(self.settings), counts=counts)
        text = json.dumps(header.model_dump(), sort_keys=True, allow_nan=False)
        tensors = {
            tensor_name(submodel, number, name): np.asarray(array, order="C")
            for submodel, calls in self.samples.items()
            for number, call in enumerate(calls)
            for name, array in call.items()
        }
        if path.is_dir():
            raise InvalidInput(
                "output", f"{path} is a folder, expected the name of a file such as {path / 'set.safetensors'}"
            )
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part, {METADATA: text})
            part.replace(path)
        except (OSError, SafetensorError) as error:  # the library wraps what the system says
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
            advice = "free some space or choose another place" if full else "choose another place"
            raise ResourceExhausted(f"cannot write the calibration set {path}: {error}. Please {advice}") from None
        finally:
            with suppress(OSError):
                part.unlink()

    @classmethod
    def load(cls, path: Path) -> CalibrationSet:
        """Read a set. Raises NotFound, InvalidInput for a file of another kind or version, SourceError for a damaged
        one.
        """
        if not path.is_file():
            what = "is no file" if path.exists() else "does not exist"
            raise NotFound(f"calibration set {path} {what}: expected a file that `enginecast calibrate` wrote")
        try:
            with safe_open(path, framework="numpy") as file:
                header = _header(path, file.metadata())
                return cls(header.kind, header.fingerprint, header.settings, _samples(path, file, header.counts))
        except (SafetensorError, OSError) as error:
            raise SourceError(
                f"{path} cannot be read as safetensors ({error}): it is damaged or something else. "
                "Make it again with `enginecast calibrate`"
            ) from None

    def check(self, fingerprint: str, name: str) -> None:
        """Raise InvalidInput unless the set was captured from the checkpoint of that fingerprint, which the caller
        knows as `name`.
        """
        if self.fingerprint != fingerprint:
            raise InvalidInput(
                "calibration",
                f"was captured from the checkpoint {self.fingerprint[:16]}, but {name} is {fingerprint[:16]}: "
                "capture a set from this very model with `enginecast calibrate`",
            )

    def warnings(self) -> list[str]:
        """What the set lacks to represent later requests, each in one sentence."""
        found = []
        requests, skipped = self.settings.get("requests", 0), self.settings.get("skipped", ())
        if requests < ENOUGH:
            found.append(f"{requests} requests are few: ranges seen in fewer than {ENOUGH} may be exceeded by others")
        if skipped:
            more = f" and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
            found.append(f"{len(skipped)} requests were skipped: {'; '.join(skipped[:NAMED])}{more}")
        for submodel, calls in self.samples.items():
            if not calls:
                found.append(f"{submodel} was never called: its activations cannot be calibrated with this set")
        algorithm = pipelines().get(self.kind)
        if algorithm is not None:
            found += task_requests()[algorithm.task].uncovered(self.settings.get("positions", {}))
        return found


def _header(path: Path, metadata: Mapping[str, str] | None) -> Header:
    text = (metadata or {}).get(METADATA)
    if text is None:
        raise InvalidInput(
            "calibration",
            f"{path} is a safetensors file without '{METADATA}' in its header, so it is no calibration set",
        )
    try:
        data = json.loads(text)
        version = data.get("version") if isinstance(data, dict) else None
        if version != VERSION:
            raise InvalidInput(
                "calibration", f"{path} has format version {version}, this program reads {VERSION}: capture it again"
            )
        return Header.model_validate(data)
    except (ValidationError, ValueError, RecursionError) as error:
        raise SourceError(
            f"{path} has a damaged header: {' '.join(str(error).split())}. Capture it again with `enginecast calibrate`"
        ) from None


def _samples(path: Path, file: Any, counts: Mapping[str, int]) -> dict[str, list[dict[str, Array]]]:
    """Every tensor in its place. Raises SourceError unless tensors and counts agree."""
    again = "it is damaged. Capture it again with `enginecast calibrate`"
    keys = list(file.keys())
    if sum(counts.values()) > len(keys):  # seen before anything of that size is made
        raise SourceError(f"{path} announces {sum(counts.values())} calls but has {len(keys)} tensors: {again}")
    samples: dict[str, list[dict[str, Array]]] = {
        submodel: [{} for _ in range(count)] for submodel, count in counts.items()
    }
    for key in keys:
        submodel, number, name = (*key.split("/", 2), "", "")[:3]
        calls = samples.get(submodel, [])
        if not number.isdecimal() or int(number) >= len(calls) or key != tensor_name(submodel, int(number), name):
            raise SourceError(f"{path} has a tensor '{key}' that its header does not announce: {again}")
        calls[int(number)][name] = file.get_tensor(key)
    for submodel, calls in samples.items():
        if not all(calls):
            raise SourceError(f"{path} has no tensors of call {calls.index({})} of {submodel}: {again}")
    return samples


def tensor_name(submodel: str, number: int, name: str) -> str:
    """What a tensor is called in the file: `number` is that of the call, from 0."""
    return f"{submodel}/{number:04d}/{name}"
