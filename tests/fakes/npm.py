"""Packages of npm, installed once per machine, outside the repository."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def installed(package: bytes) -> Path:
    """A folder with the node_modules of a package.json. Skips the test where they cannot be had."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    folder = Path(tempfile.gettempdir()) / f"enginecast-node-{os.getuid()}-{hashlib.sha256(package).hexdigest()[:12]}"
    if not (folder / "complete").exists():
        folder.mkdir(exist_ok=True)
        (folder / "package.json").write_bytes(package)
        command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode != 0:
            pytest.skip(f"npm install failed, which needs the registry: {done.stderr.strip()[-200:]}")
        (folder / "complete").touch()
    return folder
