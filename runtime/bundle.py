"""The bundle: a folder that holds one model ready to run. Its manifest is the only contract between build and device.

<name>/
  manifest.json            this file's `Manifest`
  manifest.sig             of a signed bundle: the signature of that file, see runtime/signing.py
  onnx/<submodel>/         model.onnx and weights.safetensors: the canonical graph, loadable by any ONNX tool
  engines/<target>/        what a target compiled, if it stores anything; what was added later, in a folder of its own there
  quality/                 of a quantized bundle: figures and pictures beside those of the float model
  search.json              of a searched one: the assignments tried
  tokenizer/ tokenizer_2/ scheduler/ preprocessor/   the model's own files, as published
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from runtime.errors import BundleError, NotFound, did_you_mean
from runtime.signature import Signature

SCHEMA: Final = 1
MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "manifest.sig"
CHUNK: Final = 1 << 22


def _inside(path: str) -> str:
    """A path that cannot leave the folder it is relative to: a bundle may come from anywhere."""
    parts = PurePosixPath(path)
    if not path or parts.is_absolute() or ".." in parts.parts or "\\" in path:
        raise ValueError(f"'{path}' is no path inside the bundle")
    return path


def _inside_or_empty(path: str) -> str:
    return _inside(path) if path else path


Inside = Annotated[str, AfterValidator(_inside)]
Folder = Annotated[str, AfterValidator(_inside_or_empty)]
"""Of a folder inside another: empty where it is that one itself."""


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Parity(Frozen):
    """How near a submodel's graph is to the torch module it was made from, on derived sample inputs.

    `method` is "full" (all weights), or "twin" (same code and config, fewer layers). Errors are relative: max |a-b| / max |b|.
    """

    method: str
    tensor: str
    error: float
    floor: float
    snr_db: float


class Agreement(Frozen):
    """How near what a target compiled is to the canonical graph: the worst output, on derived inputs. `device` is what computed it."""

    tensor: str
    snr_db: float
    device: str


class Artifact(Frozen):
    """What one target made of one submodel. `key` must match on the machine that loads it, else it is compiled again there.

    `files` lie in `engines/<target>/<folder>`. `settings` are those it was compiled with and would be again, on whatever machine.
    `agreement` is what was found of it when it was built; `unchecked` says why nothing was.
    """

    target: str
    submodel: str
    files: tuple[Inside, ...] = ()
    folder: Folder = ""
    key: Mapping[str, str] = Field(default_factory=dict)
    settings: Mapping[str, str] = Field(default_factory=dict)
    seconds: float = 0.0
    agreement: Agreement | None = None
    unchecked: str = ""


class Weights(Frozen):
    """The weights of a submodel that are stored in one form, such as "int8": how many numbers, in how many bytes, scales included.

    `reason` says why they are not in the form that was requested; it is empty where they are.
    """

    form: str
    elements: int
    nbytes: int
    reason: str = ""


class Submodel(Frozen):
    """One network of the model: its signature, where its graph lies, what precision its weights have.

    The graph computes in float32. `compute` is what a target that has it shall compute in instead, but for the nodes named in `keep`;
    `dynamic` allows a target to round the inputs of layers with quantized weights to 8 bits as it goes, where it is faster so.
    `bfloat16` names nodes that were measured to lose nothing beside what quantization takes when they compute in bfloat16 all the same, and
    `spans` what targets with zero points shall let the 8 bits of QuantizeLinear nodes span instead, from low to high (`runtime.spans`).
    `weights` says what the weights of a quantized submodel became.
    """

    name: Inside
    signature: Signature
    graph: Inside
    precision: str
    nbytes: int
    parity: Parity | None = None
    compute: Literal["float32", "float16", "bfloat16"] = "float32"
    keep: tuple[str, ...] = ()
    dynamic: bool = False
    bfloat16: tuple[str, ...] = ()
    spans: Mapping[str, tuple[float, float]] = Field(default_factory=dict)
    weights: tuple[Weights, ...] = ()


class Verdict(Frozen):
    """What was found of a quantized bundle, in short: quality/quality.json has it all.

    `shortfalls` is what is below its floor, or was not measured, and was allowed.
    """

    figures: Mapping[str, float]
    shortfalls: tuple[str, ...] = ()


class Source(Frozen):
    """Where the weights came from. `fingerprint` is a sha256 over the configs, weight headers and samples of every tensor."""

    name: str
    family: str
    architecture: str
    fingerprint: str


class Manifest(Frozen):
    """Everything the device side knows of a bundle. `pipeline` names the generator that runs it; `config` is its settings.

    `key` identifies source, settings and versions: a build with the same key would write the same bundle. `notes` are sentences on what of
    the checkpoint is served otherwise than published, such as a replaced noise schedule: every answer carries them.
    """

    schema_version: int = SCHEMA
    name: str
    key: str
    pipeline: str
    quant: str
    source: Source
    submodels: tuple[Submodel, ...]
    artifacts: tuple[Artifact, ...]
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    quality: Verdict | None = None
    notes: tuple[str, ...] = ()
    files: Mapping[Inside, str]
    """sha256 of every other file, by path relative to the bundle."""


class Bundle:
    """A bundle on disk, opened: its manifest and its root. Opening reads only the manifest; `verify` reads everything."""

    def __init__(self, root: Path) -> None:
        self.root = root
        path = root / MANIFEST
        if not root.is_dir():
            raise NotFound(f"bundle {root} does not exist: expected a folder made by `enginecast build`")
        if not path.is_file():
            raise BundleError(f"{root} is no bundle: it has no {MANIFEST}. Build one with `enginecast build SOURCE --output {root}`")
        try:
            self.content = path.read_bytes()
            """The manifest as it stands on disk: what a signature is of."""
            data = json.loads(self.content)
            version = data.get("schema_version") if isinstance(data, dict) else None
            if version != SCHEMA:
                raise BundleError(f"{path} has schema version {version}, this program reads {SCHEMA}: {_other_schema(data)}")
            self.manifest = Manifest.model_validate(data)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}. Let this user read it") from None
        except (ValueError, RecursionError, ValidationError) as error:
            raise BundleError(f"{path} cannot be read: {error}. Build the bundle again") from None

    @property
    def name(self) -> str:
        return self.manifest.name

    def submodel(self, name: str) -> Submodel:
        """The submodel of that name. Raises NotFound with the nearest name."""
        found = {submodel.name: submodel for submodel in self.manifest.submodels}
        if name not in found:
            raise NotFound(f"bundle {self.name} has no submodel '{name}': {did_you_mean(name, found)}")
        return found[name]

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets the bundle was built for, in the order it was asked for them."""
        return tuple(dict.fromkeys(artifact.target for artifact in self.manifest.artifacts))

    def artifacts(self, target: str, submodel: str) -> tuple[Artifact, ...]:
        """What the target made of the submodel, the newest last: for several kinds of machine, one each."""
        return tuple(one for one in self.manifest.artifacts if (one.target, one.submodel) == (target, submodel))

    def graph_files(self, submodel: Submodel) -> tuple[str, ...]:
        """The submodel's canonical graph and its weights, relative to the bundle; none where they were left out."""
        folder = PurePosixPath(submodel.graph).parent
        return tuple(path for path in self.manifest.files if PurePosixPath(path).parent == folder)

    def strangers(self) -> list[str]:
        """What lies in the bundle's folder and is not in the manifest, relative to it, sorted."""
        present = {path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if not path.is_dir()}
        return sorted(present - {MANIFEST, SIGNATURE} - set(self.manifest.files))

    def verify(self, strangers: bool = True) -> None:
        """Compare every file with its hash. Raises BundleError naming each that is missing, altered or, with `strangers`, unknown."""
        faults = []
        for relative, expected in self.manifest.files.items():
            try:
                if sha256(self.root / relative) != expected:
                    faults.append(f"{relative} was altered")
            except (FileNotFoundError, NotADirectoryError):
                faults.append(f"{relative} is missing")
            except OSError as error:
                faults.append(f"{relative} cannot be read ({error.strerror})")
        if strangers:
            faults += [f"{relative} is not in the manifest" for relative in self.strangers()]
        if faults:
            raise BundleError(f"bundle {self.root} is damaged: {'; '.join(faults)}. Copy or build it again")


def _other_schema(data: Any) -> str:
    """What to do about a manifest of another schema: a newer one names the program that wrote it."""
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or version < SCHEMA:
        return "build the bundle again"
    versions = data.get("versions")
    writer = versions.get("enginecast") if isinstance(versions, dict) else None
    wanted = f"enginecast {writer} or later" if isinstance(writer, str) else "a later enginecast"
    return f"install {wanted}, or build the bundle again with this one"


def sha256(path: Path) -> str:
    """Hex sha256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
