"""coremltools is loaded without the frameworks it converts from, which others may then still load."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import importlib.util, sys
from runtime.targets.coreml.sdk import FRAMEWORKS, coremltools
version = coremltools().__version__
found = importlib.util.find_spec("torch") is not None
print(version, [name for name in FRAMEWORKS if name in sys.modules], found)
"""


def test_nothing_else_is_loaded_and_nothing_is_said() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    version, loaded, found = done.stdout.split()
    assert int(version.split(".")[0]) >= 9 and loaded == "[]" and found == "True"
