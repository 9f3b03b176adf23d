"""A server that may write to its cache and the temporary folder alone, without any capability, as in a container."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import enginecast

SCRIPT = """
set -e
cache=$1 temporary=$2; shift 2
mount --make-rprivate /
for folder in "$cache" "$temporary"; do mount --bind "$folder" "$folder"; done
for mounted in $(cut -d ' ' -f 2 /proc/mounts); do
    case $mounted in
        "$cache" | "$temporary" | /proc* | /sys* | /dev*) ;;
        *) mount -o remount,bind,ro "$mounted" 2> /dev/null || true ;;
    esac
done
! touch "$cache/../probe" 2> /dev/null
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""
"""Makes a name space of mounts read-only, but for two folders, and runs a command in it."""


def can_mount() -> bool:
    if not all(map(shutil.which, ("unshare", "setpriv", "mount"))) or os.geteuid() != 0:
        return False
    probe = "mount --make-rprivate / && mount --bind /tmp /tmp && mount -o remount,bind,ro /"
    return subprocess.run(["unshare", "-m", "sh", "-c", probe], capture_output=True, check=False).returncode == 0


@pytest.mark.full
@pytest.mark.skipif(not can_mount(), reason="mounting needs root and CAP_SYS_ADMIN")
def test_a_read_only_root_file_system_suffices(vlm_bundle: Path, tmp_path: Path) -> None:
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    cache.mkdir()
    temporary.mkdir()
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH")}
    environment = kept | {"ENGINECAST_CACHE": str(cache), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    server = [sys.executable, "-m", "serving.cli.commands", "serve", f"talk={vlm_bundle}", "--address", "127.0.0.1:0"]
    command = ["unshare", "-m", "sh", "-c", SCRIPT, "sh", str(cache), str(temporary), *server]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            said = [process.stdout.readline() for _ in range(2)]
            assert "ready" in said[-1], (said, process.stderr.read() if process.poll() else "")
            with enginecast.Client(said[0].split()[-1], "talk", timeout=120) as client:
                assert client.chat("what color is the circle?", max_tokens=4).text
        finally:
            process.terminate()
            assert process.wait(60) == 0
    assert not (tmp_path / "probe").exists()
