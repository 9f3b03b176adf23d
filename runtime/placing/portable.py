"""Something compiled that fits this machine: what the bundle holds, else what was compiled here before, else what is
compiled here now.

Compiled here, it is kept in the user's cache folder, never in the bundle:

<cache>/engines/<key>/entry.json   what was compiled, and the sha256 of each of its files, which lie beside it
<cache>/engines/.lock              held while something is compiled: one at a time, since kernels are chosen by timing
                                   them

The key is a hash of everything that the result depends on: the canonical graph, the submodel, target, settings,
versions, this machine.
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal

from filelock import FileLock, Timeout
from pydantic import ValidationError

from runtime.bundle.manifest import LARGEST_MANIFEST, Artifact, Bundle, Frozen, Inside, Submodel, sha256
from runtime.engine import Compiled, CompileOptions, Engine, targets
from runtime.errors import EngineError, EngineUnavailable, ResourceExhausted
from runtime.files import FULL, cache_folder, key_of, read_regular, vanishing
from runtime.placing.devices import processor_features

ENTRY: Final = "entry.json"
LOCK: Final = ".lock"
UNFINISHED: Final = ".compiling-"
SECONDS_BETWEEN_TRIES: Final = 0.5
Progress = Callable[[float, str], None]
"""Hears of the share done, from 0 to 1, and of what. What it raises stops the compilation and is raised again."""


@dataclass(frozen=True)
class Fitted:
    """What to load, for `Options.compiled`, and what had to be done for it; `note` is empty where the bundle's own
    fits.
    """

    compiled: Compiled
    note: str = ""


class Entry(Frozen):
    """What an entry of the cache holds: the artifact, and the sha256 of its files by name."""

    artifact: Artifact
    files: Mapping[Inside, str]


@dataclass(frozen=True)
class Prospect:
    """What loading will do with an artifact of a bundle on this machine: in a word, and why where it is not loaded as
    it is.
    """

    word: Literal["yes", "compiled anew", "no"]
    why: str = ""


def prospect(bundle: Bundle, artifact: Artifact) -> Prospect:
    """What `fitting`, and before it `runtime.placing.placement`, will make of an artifact here. Nothing is loaded or
    compiled.
    """
    if artifact.target not in targets():
        return Prospect("no", "not known to this program")
    engine = targets()[artifact.target]
    found = engine.available()
    if not found.usable:
        return Prospect("no", f"does not run here: {found.reason}")
    misfit = engine.misfit(artifact)
    if not misfit:
        return Prospect("yes")
    compilable = bool(bundle.graph_files(bundle.submodel(artifact.submodel)))
    return Prospect("compiled anew" if compilable else "no", misfit)


def fitting(
    bundle: Bundle,
    submodel: Submodel,
    engine: type[Engine],
    progress: Progress = lambda share, phase: None,
    settings: Mapping[str, str] | None = None,
) -> Fitted:
    """What the target shall load of a submodel on this machine. The bundle's files are taken as verified.

    `settings` are the target's own for compiling here, besides those the bundle was built with. Raises
    EngineUnavailable when nothing fits and the canonical graph was left out of the bundle, EngineError when it cannot
    be compiled, ResourceExhausted when the cache cannot be written or is full. Two processes that ask for the same get
    the same: the second waits for the first.
    """
    held = bundle.artifacts(engine.target, submodel.name)
    misfits = []
    for artifact in held:
        reason = engine.misfit(artifact)
        if not reason:
            return Fitted(Compiled.of(bundle.root, artifact))
        misfits.append(reason)
    why = "; ".join(f"one {reason}" for reason in misfits) or f"bundle {bundle.name} holds none"
    if not bundle.graph_files(submodel):
        raise EngineUnavailable(
            f"no {engine.target} engine of {submodel.name} fits here ({why}), and none can be compiled: bundle "
            f"{bundle.name} was made with "
            f"--strip-canonical. Build it with --target {engine.target} for this machine, or without --strip-canonical"
        )
    wanted = dict(held[-1].settings if held else {}) | dict(settings or {})
    key = _key(bundle, submodel, engine, wanted)
    folder = cache_folder() / "engines" / key
    found, damage = _kept(folder, engine)
    if found is None:
        with _alone(folder.parent, progress):
            found, damage = _kept(folder, engine)
            if found is None:
                start = time.perf_counter()
                found = _compile(bundle, submodel, engine, CompileOptions(wanted, progress), folder)
                again = f", again, since {damage}" if damage else ""
                done = f"compiled here in {time.perf_counter() - start:.1f} s and kept in {folder}{again}"
                return Fitted(Compiled(found, folder), _note(engine, submodel, why, done))
    return Fitted(Compiled(found, folder), _note(engine, submodel, why, f"compiled here before, taken from {folder}"))


def _note(engine: type[Engine], submodel: Submodel, why: str, done: str) -> str:
    return f"{engine.target} engine of {submodel.name}: {why}; {done}"


def _key(bundle: Bundle, submodel: Submodel, engine: type[Engine], settings: Mapping[str, str]) -> str:
    found = engine.available()
    graph = {path: bundle.manifest.files[path] for path in bundle.graph_files(submodel)}
    told = submodel.model_dump(mode="json", exclude={"parity"})
    machine = [platform.system(), platform.machine(), processor_features(), found.version, found.devices]
    return key_of(engine.target, graph, told, settings, _code(), machine)


@cache
def _code() -> str:
    """Identifies what lowers and compiles: a later program must not load what an older one made of the same graph."""
    root = Path(__file__).parents[1]
    return key_of([path.read_text() for room in ("bundle", "targets") for path in sorted((root / room).rglob("*.py"))])


def _kept(folder: Path, engine: type[Engine]) -> tuple[Artifact | None, str]:
    """What was compiled into the folder before, if it is whole; else why not, empty where there is nothing.

    Raises EngineError when another user could have put it there: it is native code.
    """
    if not folder.exists():
        return None, ""
    _require_own(folder)
    try:
        entry = Entry.model_validate_json(read_regular(folder / ENTRY, LARGEST_MANIFEST))
        altered = [name for name, expected in entry.files.items() if sha256(folder / name) != expected]
    except (OSError, ValidationError):
        return None, f"what was kept in {folder} could not be read"
    if altered or not set(entry.artifact.files) <= set(entry.files):
        return None, f"what was kept in {folder} was damaged ({', '.join(altered or [ENTRY])})"
    reason = engine.misfit(entry.artifact)
    return (None, f"what was kept {reason}") if reason else (entry.artifact, "")


def _require_own(folder: Path) -> None:
    """Raise EngineError when a folder of the cache is not this user's alone to write."""
    if os.name != "posix":
        return
    for one in (folder.parent, folder):
        found = one.lstat()
        if (
            not stat.S_ISDIR(found.st_mode)
            or found.st_uid != os.geteuid()
            or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        ):
            raise EngineError(
                f"{one} may have been written by others, and engines are native code: remove it, or set "
                "ENGINECAST_CACHE to a folder "
                "that only this user writes"
            )


@contextmanager
def _alone(engines: Path, progress: Progress) -> Iterator[None]:
    """While no other process compiles into this folder, which is made where it is not there. Raises
    ResourceExhausted.
    """
    try:
        engines.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(engines)
        lock = FileLock(engines / LOCK)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=SECONDS_BETWEEN_TRIES)
            except Timeout:
                progress(0.0, "Waiting for another process that compiles")
    except (OSError, NotImplementedError) as error:  # the latter where the file system has no locks
        raise _unwritable(engines, error) from None
    try:
        for left in engines.glob(f"{UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)  # of a machine that lost its power
        yield
    finally:
        lock.release()


def _compile(
    bundle: Bundle, submodel: Submodel, engine: type[Engine], options: CompileOptions, folder: Path
) -> Artifact:
    """Compile into the folder, which appears when everything is in it, in the place of what was there."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(vanishing(folder.parent, UNFINISHED))
        except OSError as error:
            raise _unwritable(folder.parent, error) from None
        try:
            artifact = engine.compile_with(options, submodel, bundle.root / submodel.graph, made)
            hashes = {
                path.relative_to(made).as_posix(): sha256(path) for path in sorted(made.rglob("*")) if path.is_file()
            }
            (made / ENTRY).write_text(Entry(artifact=artifact, files=hashes).model_dump_json())
        except OSError as error:
            if error.errno in FULL:
                raise _unwritable(folder.parent, error) from None
            raise EngineError(f"could not compile {submodel.name} for {engine.target}: {error}") from None
        reason = engine.misfit(artifact)
        if reason:
            raise EngineError(
                f"the {engine.target} engine of {submodel.name} does not fit where it was compiled: it {reason}"
            )
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return artifact


def _unwritable(folder: Path, error: OSError | NotImplementedError) -> ResourceExhausted:
    if isinstance(error, OSError) and error.errno in FULL:
        return ResourceExhausted(
            f"the disk of {folder} is full: free some space there, or set ENGINECAST_CACHE to another folder"
        )
    reason = error.strerror if isinstance(error, OSError) else error
    return ResourceExhausted(
        f"cannot write {folder}, where what is compiled here is kept: {reason}. Set ENGINECAST_CACHE to another"
    )
