"""Peers whose workers are small scripts, and checkpoints that are a few bytes: nothing is installed or downloaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from profiles.peers import declared
from profiles.peers.declared import Environment, Export, Peer
from profiles.peers.environments import TRAVELS, Workplace

WORKER = """
import time
from profiles.peers.inside import Job, work

def load(job):
    if job.options.get("broken") == "load":
        raise MemoryError("no room for it")
    def unet():
        if job.options.get("broken") == "unet":
            return 1 / 0
        return job.options["seconds"]
    metric = {"unit": "s", "settings": {"sample": "x".join(map(str, job.sizes.values()))}}
    return {job.options["metric"]: metric}, {job.options["metric"]: unet}

work(("pip",), load, "toy")
"""
EXPORT = """
import sys, pathlib
checkpoint, output = map(pathlib.Path, sys.argv[1:])
assert not (output / "weights").exists()
print("reading", checkpoint.name)
if (checkpoint / "refused").exists():
    (output / "half").write_text("half")
    sys.exit("this checkpoint is refused")
(output / "weights").write_bytes(bytes(1000))
"""


@pytest.fixture
def environment() -> Environment:
    return Environment("toy", ("nothing==1",))


@pytest.fixture
def workplace(tmp_path: Path, environment: Environment) -> Workplace:
    """A folder with an environment whose Python is this one."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    python = tmp_path / "work" / "environments" / environment.name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return Workplace(tmp_path / "work", checkpoint, "key")


@pytest.fixture
def toys(tmp_path: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Peer]:
    """Makes peers whose worker and export are the scripts above."""
    root = tmp_path / "package"
    for name, text in (("workers/toy.py", WORKER), ("exports/toy.py", EXPORT)):
        (root / "peers" / name).parent.mkdir(parents=True)
        (root / "peers" / name).write_text(text)
    from profiles.peers import environments

    for name in TRAVELS:
        if not (root / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(environments.ROOT / name)
    monkeypatch.setattr(environments, "ROOT", root)
    export = Export("toy", environment, ("-m", "profiles.peers.exports.toy", "{checkpoint}", "{output}"))
    made: list[Peer] = []

    def make(
        name: str,
        task: str = "image",
        metrics: tuple[str, ...] = ("unet",),
        named: tuple[str, ...] = (),
        **options: object,
    ) -> Peer:
        given = {"metric": [*named, *metrics][0], **options}
        made.append(Peer(name, task, environment, "toy", export, metrics, given, "int4", named=named))
        monkeypatch.setattr(declared, "PEERS", tuple(made))
        return made[-1]

    return make
