"""The bundle: a folder that holds one model ready to run. Its manifest is the only contract between build and device.

<name>/
  manifest.json            this file's `Manifest`
  manifest.sig             of a signed bundle: the signature of that file, see runtime/bundle/signing.py
  onnx/<submodel>/         model.onnx and weights.safetensors: the canonical graph, loadable by any ONNX tool
  engines/<target>/        what a target compiled, if it stores anything; what was added later, in a folder there
  quality/                 of a quantized bundle: figures and pictures beside those of the float model
  search.json              of a searched one: the assignments tried
  tokenizer/ tokenizer_2/ scheduler/ preprocessor/   the model's own files, as published
  adapters/                LoRA files that requests choose by name, see runtime/diffusion/adapters.py
  tensors/                 tensors of the checkpoint that the pipeline reads itself, see runtime/bundle/tensors.py
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from runtime.bundle import older
from runtime.bundle.external import locations
from runtime.bundle.precision import Compute, Precision
from runtime.bundle.signature import Signature
from runtime.errors import BundleError, InvalidInput, NotFound, did_you_mean, quoted
from runtime.files import open_regular, read_regular, strict_json

SCHEMA: Final = 3
OLDEST_SCHEMA: Final = 1
"""Bundles of this schema and later ones are read. See decision 24."""
MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "manifest.sig"
CHUNK: Final = 1 << 22
HASHERS: Final = 4
"""So many files of a bundle are hashed at once."""
LARGEST_MANIFEST: Final = 1 << 24
"""Bytes. Those of Stable Diffusion XL with every layer's figures have less than a million."""
LARGEST_GRAPH: Final = 1 << 31
"""Bytes of an ONNX graph: protocol buffers hold no more."""
LONGEST_NAME: Final = 200
LONGEST_LINE: Final = 4096
LONGEST_PART: Final = 255
"""Bytes of a file's name, as file systems have it."""
MODEL_FILES: Final = ("tokenizer", "tokenizer_2", "scheduler", "preprocessor", "tensors", "adapters")
"""Folders of the model's own files. Pipelines read whatever of a known name lies there."""


def printable(text: str) -> str:
    """The same text, if it is one line that can be shown: no control characters, none that change the direction, no
    half surrogates.
    """
    if not text.isprintable() or len(text) > LONGEST_LINE:
        raise ValueError(
            f"{quoted(text)} cannot be shown: expected one line of at most {LONGEST_LINE} printable characters"
        )
    return text


def check_name(field: str, name: str) -> str:
    """The same name, if a model may have it. Raises InvalidInput for `field`."""
    try:
        return _name(name)
    except ValueError as error:
        raise InvalidInput(field, str(error)) from None


def _name(name: str) -> str:
    if not name or len(name) > LONGEST_NAME or not name.isprintable() or name.strip() != name:
        raise ValueError(
            f"{quoted(name)} is no name: expected 1 to {LONGEST_NAME} printable characters that begin and end with no "
            "space"
        )
    return name


def _inside(path: str) -> str:
    """A path that cannot leave the folder it is relative to, in its only spelling: a bundle may come from anywhere."""
    parts = PurePosixPath(path)
    if not parts.parts or str(parts) != path or parts.is_absolute() or {"..", "."} & set(parts.parts) or "\\" in path:
        raise ValueError(f"{quoted(path)} is no path inside the bundle")
    if any(len(part.encode("utf-8", "replace")) > LONGEST_PART for part in parts.parts):
        raise ValueError(f"{quoted(path)} is too long")
    return printable(path)


def _part(path: str) -> str:
    if "/" in path:
        raise ValueError(f"{quoted(path)} is no name of a file")
    return _inside(path)


def is_file_name(text: str) -> bool:
    """Whether a file can have this name, in the folder that it is looked for in."""
    try:
        return bool(_part(text))
    except ValueError:
        return False


def _inside_or_empty(path: str) -> str:
    return _inside(path) if path else path


Inside = Annotated[str, AfterValidator(_inside)]
Folder = Annotated[str, AfterValidator(_inside_or_empty)]
"""Of a folder inside another: empty where it is that one itself."""
FileName = Annotated[str, AfterValidator(_part)]
"""Of a file in a known folder, or of what files are named by."""
Name = Annotated[str, AfterValidator(_name)]
Line = Annotated[str, AfterValidator(printable)]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Parity(Frozen):
    """How near a submodel's graph is to the torch module it was made from, on derived sample inputs.

    `method` is "full" (all weights), or "twin" (same code and config, fewer layers). Errors are relative: max |a-b| /
    max |b|.
    """

    method: Line
    tensor: Line
    error: float
    floor: float
    snr_db: float


class Agreement(Frozen):
    """How near what a target compiled is to the canonical graph: the worst output, on derived inputs. `device` is what
    computed it.
    """

    tensor: Line
    snr_db: float
    device: Line


class Artifact(Frozen):
    """What one target made of one submodel. `key` must match on the machine that loads it, else it is compiled again
    there.

    `files` lie in `engines/<target>/<folder>`. `settings` are those it was compiled with and would be again, on
    whatever machine. `agreement` is what was found of it when it was built; `unchecked` says why nothing was.
    """

    target: FileName
    submodel: FileName
    files: tuple[Inside, ...] = ()
    folder: Folder = ""
    key: Mapping[Line, Line] = Field(default_factory=dict)
    settings: Mapping[Line, Line] = Field(default_factory=dict)
    seconds: float = 0.0
    agreement: Agreement | None = None
    unchecked: str = ""


class Weights(Frozen):
    """The weights of a submodel that are stored in one form, such as "int8": how many numbers, in how many bytes,
    scales included.

    `reason` says why they are not in the form that was requested; it is empty where they are.
    """

    form: str
    elements: int
    nbytes: int
    reason: str = ""


class Submodel(Frozen):
    """One network of the model: its signature, where its graph lies, in which number formats it is stored and
    computed.

    The graph computes in float32, and so do the nodes named in `keep` on targets that compute in another type
    (`Precision.compute`). `dynamic` allows a target to round the inputs of layers with quantized weights to 8 bits
    while it runs. `bfloat16` names nodes that may compute in bfloat16: measured to add nothing to the error of
    quantization. `activation_ranges` are the lowest and highest value of inputs, by the name of the QuantizeLinear
    node, for targets whose 8-bit inputs have zero points (`runtime.targets.lowering.activation_ranges`); others use the
    symmetric ranges of the graph. `weights` says what the weights of a quantized
    submodel became.
    """

    name: FileName
    signature: Signature
    graph: Inside
    precision: Precision
    nbytes: int = Field(ge=0)
    parity: Parity | None = None
    keep: tuple[str, ...] = ()
    dynamic: bool = False
    bfloat16: tuple[str, ...] = ()
    activation_ranges: Mapping[str, tuple[float, float]] = Field(default_factory=dict)
    weights: tuple[Weights, ...] = ()

    def computing(self, compute: Compute, keep: tuple[str, ...] = ()) -> Submodel:
        """The same submodel, computed in another type but for the nodes named in `keep`."""
        return self.model_copy(
            update={"precision": self.precision.model_copy(update={"compute": compute}), "keep": keep}
        )


class Verdict(Frozen):
    """What was found of a quantized bundle, in short: quality/quality.json has it all.

    `shortfalls` is what is below its floor, or was not measured, and was allowed.
    """

    figures: Mapping[str, float]
    shortfalls: tuple[str, ...] = ()


class Addition(Frozen):
    """What a build added to the weights: its kind, such as "controlnet", its name and, where one was given, its scale.
    `fingerprint` is as in `Source`.
    """

    kind: Line
    name: Line
    scale: float
    fingerprint: Line


class Source(Frozen):
    """Where the weights came from. `fingerprint` is a sha256 over the configs, weight headers and samples of every
    tensor, and over the additions.
    """

    name: Line
    family: Line
    architecture: Line
    fingerprint: Line
    additions: tuple[Addition, ...] = ()


class Manifest(Frozen):
    """Everything the device side knows of a bundle.

    `task` names what it does (`runtime.task`) and `pipeline` the algorithm that does it (`runtime.pipeline`); `config`
    is the algorithm's settings.

    `key` identifies source, settings and versions: a build with the same key would write the same bundle. `notes` are
    sentences on what of the checkpoint is served otherwise than published, such as a replaced noise schedule: every
    answer carries them.
    """

    schema_version: int = SCHEMA
    name: Name
    key: Line
    pipeline: Line
    task: Line
    quant: Line
    source: Source
    submodels: tuple[Submodel, ...]
    artifacts: tuple[Artifact, ...]
    config: Mapping[str, Any]
    versions: Mapping[Line, Line]
    quality: Verdict | None = None
    notes: tuple[str, ...] = ()
    files: Mapping[Inside, str]
    """sha256 of every other file, by path relative to the bundle."""

    @model_validator(mode="after")
    def _fits_together(self) -> Manifest:
        names = [submodel.name for submodel in self.submodels]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"submodel {quoted(twice[0])} is listed twice")
        if other := [artifact.submodel for artifact in self.artifacts if artifact.submodel not in names]:
            raise ValueError(
                f"an artifact is of the submodel {quoted(other[0])}, which is not among {', '.join(names)}"
            )
        if reserved := {MANIFEST, SIGNATURE} & set(self.files):
            raise ValueError(f"{min(reserved)} cannot be among the files that it lists itself")
        return self


Identity = tuple[int, int, int, int, int]
"""What changes when a file does: device, number, size, times of the last change of content and of state, in ns."""


class Bundle:
    """A bundle on disk, opened: its manifest and its root. Opening reads only the manifest; `verify` reads everything.

    Raises NotFound when there is no such folder, BundleError when it is no bundle or its manifest cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content = _read_manifest(root)
        """The manifest as it stood on disk: what a signature is of."""
        self.manifest = _parse(root / MANIFEST, self.content)
        self._matched: dict[str, Identity] = {}

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
        """The targets the bundle was built for, in the order in which they were requested."""
        return tuple(dict.fromkeys(artifact.target for artifact in self.manifest.artifacts))

    def artifacts(self, target: str, submodel: str) -> tuple[Artifact, ...]:
        """What the target made of the submodel, the newest last: for several kinds of machine, one each."""
        return tuple(one for one in self.manifest.artifacts if (one.target, one.submodel) == (target, submodel))

    def graph_files(self, submodel: Submodel) -> tuple[str, ...]:
        """The submodel's canonical graph and its weights, relative to the bundle; none where they were left out."""
        folder = PurePosixPath(submodel.graph).parent
        return tuple(path for path in self.manifest.files if PurePosixPath(path).parent == folder)

    def engine_folder(self, artifact: Artifact) -> PurePosixPath:
        """Where the artifact's files lie, relative to the bundle."""
        return PurePosixPath("engines", artifact.target, artifact.folder)

    def unknown_files(self) -> list[str]:
        """What lies in the bundle's folder and is not in the manifest, relative to it, sorted. Links are never
        followed.
        """
        present = set[str]()
        for folder, folders, files in os.walk(self.root, onerror=_raise):
            here = Path(folder)
            names = files + [name for name in folders if (here / name).is_symlink()]
            present |= {(here / name).relative_to(self.root).as_posix() for name in names}
        return sorted(present - {MANIFEST, SIGNATURE} - set(self.manifest.files))

    def verify(self, unknown: bool = True) -> None:
        """Compare every file with its hash. Raises BundleError naming each that is missing, altered or no regular file.

        Also named is what loading would open though no hash of it is listed; with `unknown`, whatever is not listed.
        Files whose names lead out of the bundle, graphs whose weights do, and another manifest than the one that was
        opened are refused.
        """
        self._matched.clear()
        with ThreadPoolExecutor(HASHERS) as threads:  # hashing takes as long as reading, and no lock of Python
            self._verify(unknown, threads.map)

    def verify_again(self) -> None:
        """`verify`, but files are hashed only where they changed since they were last found as listed: a matter of
        milliseconds.

        To be called before files are opened again, and after native code has opened them by name. Raises BundleError.
        """
        self._verify(unknown=False, over=map)

    def _verify(self, unknown: bool, over: Callable[..., Iterator[list[str]]]) -> None:
        if _read_manifest(self.root) != self.content:
            raise BundleError(
                f"{self.root} holds another bundle than the one that was opened: its {MANIFEST} has changed. Start the "
                "program anew"
            )
        inside, files = Path(os.path.realpath(self.root)), self.manifest.files
        faults = [fault for found in over(partial(self._faults, inside), files, files.values()) for fault in found]
        try:
            faults += [
                f"{relative} is not in the manifest"
                for relative in (self.unknown_files() if unknown else self._readable_unknown())
            ]
        except OSError as error:
            faults.append(f"{error.filename} cannot be read ({error.strerror})")
        faults += [
            f"{relative}, which is read when it is loaded, is not in the manifest" for relative in self._unlisted()
        ]
        if faults:
            raise BundleError(f"bundle {self.root} is damaged: {'; '.join(faults)}. Copy or build it again")

    def _faults(self, inside: Path, relative: str, expected: str) -> list[str]:
        """What is wrong with a listed file."""
        path = self.root / relative
        try:
            if not Path(os.path.realpath(path)).is_relative_to(inside):
                return [f"{relative} is a link that leads out of the bundle"]
            if self._matched.get(relative) == _identity(path.stat()):
                return []
            self._matched.pop(relative, None)
            return self._compare(relative, expected)
        except (FileNotFoundError, NotADirectoryError):
            return [f"{relative} is missing"]
        except OSError as error:
            return [f"{relative} cannot be read ({error.strerror})"]

    def _compare(self, relative: str, expected: str) -> list[str]:
        """What is wrong with a listed file, whose identity is kept if nothing is. Raises OSError."""
        with open_regular(self.root / relative) as file:
            identity = _identity(os.fstat(file.fileno()))
            if _digest(file) != expected:
                return [f"{relative} was altered"]
        faults = list(self._outside(relative)) if relative.endswith(".onnx") else []
        if not faults:
            self._matched[relative] = identity
        return faults

    def _outside(self, relative: str) -> Iterator[str]:
        """What an ONNX graph would read that is not listed. Weights lie beside it, or beside the canonical graph it was
        made of.
        """
        folders = [
            PurePosixPath(relative).parent,
            *(PurePosixPath(part.graph).parent for part in self.manifest.submodels),
        ]
        try:
            found = locations(read_regular(self.root / relative, LARGEST_GRAPH))
        except ValueError as error:
            yield f"{relative} cannot be read ({error})"
            return
        for location in found:
            try:
                listed = any(str(folder / _inside(location)) in self.manifest.files for folder in folders)
            except ValueError:
                listed = False
            if not listed:
                yield f"{relative} has weights in {quoted(location)}, which is not in the manifest"

    def _unlisted(self) -> list[str]:
        """Files that loading would open by name, but no hash of them is listed."""
        needed = [
            str(self.engine_folder(artifact) / file) for artifact in self.manifest.artifacts for file in artifact.files
        ]
        needed += [submodel.graph for submodel in self.manifest.submodels if self.graph_files(submodel)]
        return sorted(set(needed) - set(self.manifest.files))

    def _readable_unknown(self) -> list[str]:
        """What is not listed and lies where loading reads: beside graphs, compiled files and the model's own files."""
        manifest, read = self.manifest, set(map(PurePosixPath, MODEL_FILES))
        read |= {PurePosixPath(submodel.graph).parent for submodel in manifest.submodels}
        for artifact in manifest.artifacts:
            folder = self.engine_folder(artifact)
            read |= {folder, *((folder / file).parent for file in artifact.files)}
        found = []
        for folder in read:
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root / folder) as entries:
                found += [str(folder / entry.name) for entry in entries if not entry.is_dir(follow_symlinks=False)]
        return sorted(set(found) - {MANIFEST, SIGNATURE} - set(manifest.files))


def _raise(error: OSError) -> None:
    raise error


def _identity(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read_manifest(root: Path) -> bytes:
    path = root / MANIFEST
    try:
        if not root.is_dir():
            raise NotFound(f"bundle {root} does not exist: expected a folder made by `enginecast build`")
        return read_regular(path, LARGEST_MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{root} is no bundle: it has no {MANIFEST}. Build one with `enginecast build SOURCE --output {root}`"
        ) from None
    except OSError as error:
        raise BundleError(
            f"{path} cannot be read: {error.strerror}. Let this user read it, or copy the bundle again"
        ) from None


def _parse(path: Path, content: bytes) -> Manifest:
    try:
        data = strict_json(content)
        version = data.get("schema_version") if isinstance(data, dict) else None
        if type(version) is not int or not OLDEST_SCHEMA <= version <= SCHEMA:
            raise BundleError(
                f"{path} has schema version {quoted(str(version))[1:-1]}, this program reads {OLDEST_SCHEMA} to "
                f"{SCHEMA}: {_other_schema(data)}"
            )
        if version < SCHEMA:
            content = json.dumps(older.present(data)).encode()
        return Manifest.model_validate_json(content, strict=True)
    except ValidationError as error:
        raise BundleError(f"{path} cannot be read: {_faults(error)}. Build the bundle again") from None
    except ValueError as error:
        raise BundleError(f"{path} cannot be read: {error}. Build the bundle again") from None


def _faults(error: ValidationError) -> str:
    """What is wrong with a manifest, in one line: where, and why."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    shown = [
        f"{'.'.join(quoted(str(part))[1:-1] for part in one['loc'])}: {one['msg'].removeprefix('Value error, ')}"
        for one in found[:3]
    ]
    return "; ".join(shown) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def _other_schema(data: Any) -> str:
    """What to do about a manifest of another schema: a newer one names the program that wrote it."""
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int or version < SCHEMA:
        return "build the bundle again"
    versions = data.get("versions")
    writer = versions.get("enginecast") if isinstance(versions, dict) else None
    wanted = f"the enginecast that built it, {quoted(writer)[1:-1]}," if isinstance(writer, str) else "its enginecast"
    return (
        f"it was built by a newer enginecast. Install {wanted} or a later one, or build the bundle again with this one"
    )


def sha256(path: Path) -> str:
    """Hex sha256 of a regular file, read in chunks. Raises OSError."""
    with open_regular(path) as file:
        return _digest(file)


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
