"""Which code decides what is built: what a build kept is reused only by the same code.

Everything in the packages below decides, in however deep a folder, but for the rooms and files listed, which only
report, serve or choose devices. A new file therefore counts until it is listed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Final

from runtime.files import key_of

OTHERS: Final[Mapping[str, tuple[str, ...]]] = {
    "export": ("cli", "finished", "report", "tasks", "__main__.py", "demo.py", "task.py"),
    "calibration": ("ground",),
    "runtime": ("placing", "command.py", "limits.py", "silence.py", "stopping.py", "timing.py"),
}
"""Of each package, by the first part of their paths, what decides nothing of a bundle."""


@cache
def code() -> str:
    """Identifies the code that decides what is built."""
    return code_of({name: Path(str(importlib.import_module(name).__file__)).parent for name in OTHERS})


def code_of(packages: Mapping[str, Path]) -> str:
    """The same of packages that lie in these folders."""
    return key_of(
        {
            f"{name}/{path}": (root / path).read_text()
            for name, root in packages.items()
            for path in deciding(name, root)
        }
    )


def deciding(package: str, root: Path) -> Iterator[str]:
    """The files of a package that decide what is built, relative to it, in a fixed order."""
    for file in sorted(root.rglob("*")):
        path = file.relative_to(root)
        if file.suffix in (".py", ".txt") and path.parts[0] not in OTHERS[package]:
            yield path.as_posix()
