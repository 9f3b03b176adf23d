"""Control groups written out as the kernel does, in both versions; and whatever else may stand there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.placing.containers import Allowance, allowance

CPUS = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)


def machine(folder: Path, cgroup: str, mountinfo: str, files: dict[str, str]) -> Path:
    """A /proc whose process is in these groups. `{}` in the texts is the folder where they are mounted."""
    for name, text in files.items():
        path = folder / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    process = folder / "proc" / "self"
    process.mkdir(parents=True)
    (process / "cgroup").write_text(cgroup)
    (process / "mountinfo").write_text(mountinfo.replace("{}", str(folder / "sys")))
    return folder / "proc"


V2 = "31 23 0:28 / {} rw,nosuid - cgroup2 cgroup rw,nsdelegate\n"


def test_version_2(tmp_path: Path) -> None:
    """The tightest group on the way to the root counts; pages of files not used lately are as good as free."""
    proc = machine(
        tmp_path, "0::/pod/container\n", V2,
        {
            "pod/container/memory.max": "max\n", "pod/container/cpu.max": "max 100000\n",
            "pod/memory.max": "4294967296\n", "pod/memory.current": "3221225472\n",
            "pod/memory.stat": "anon 1\ninactive_file 1073741824\n", "pod/cpu.max": "50000 100000\n",
            "memory.max": "8589934592\n", "memory.current": "0\n",
        },
    )  # fmt: skip
    assert allowance(proc) == Allowance(0.5, 4 << 30, 2 << 30)
    assert allowance(proc).threads == 1


def test_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    proc = machine(tmp_path, "0::/\n", V2, {"memory.max": "1000", "memory.current": "300"})
    assert allowance(proc) == Allowance(CPUS, 1000, 700)


def test_version_1(tmp_path: Path) -> None:
    """Each controller has a hierarchy of its own. A container sees its own group mounted as the root, and its path from
    outside.
    """
    proc = machine(
        tmp_path, "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n",
        "35 31 0:32 /docker/abc {}/memory rw - cgroup cgroup rw,memory\n32 31 0:29 /docker/abc {}/cpu rw - cgroup "
        "cgroup rw,cpu,cpuacct\n",
        {
            "memory/memory.limit_in_bytes": "2147483648\n", "memory/memory.usage_in_bytes": "1073741824\n",
            "memory/memory.stat": "total_inactive_file 0\n", "cpu/cpu.cfs_quota_us": "25000\n",
            "cpu/cpu.cfs_period_us": "100000\n",
        },
    )  # fmt: skip
    assert allowance(proc) == Allowance(0.25, 2 << 30, 1 << 30)


@pytest.mark.parametrize("limit", ["9223372036854771712", "max", "-1", "", "much"])
def test_no_limit(tmp_path: Path, limit: str) -> None:
    mounts = "35 31 0:32 / {}/memory rw - cgroup cgroup rw,memory\n"
    proc = machine(tmp_path, "4:memory:/\n", mounts, {"memory/memory.limit_in_bytes": limit})
    assert allowance(proc) == Allowance(CPUS)


def test_no_control_groups(tmp_path: Path) -> None:
    assert allowance(tmp_path / "nowhere") == Allowance(CPUS)


def test_this_process() -> None:
    found = allowance()
    assert 0 < found.cpus <= CPUS and (found.free is None or found.memory is None or 0 <= found.free <= found.memory)


@settings(max_examples=25)
@given(cgroup=st.text(), mountinfo=st.text(), words=st.text(alphabet="0123456789 max-\n", max_size=30))
def test_nothing_that_stands_there_is_an_error(
    tmp_path_factory: pytest.TempPathFactory, cgroup: str, mountinfo: str, words: str
) -> None:
    encodable = [text.encode("utf-8", "replace").decode() for text in (cgroup, V2 + mountinfo)]
    files = dict.fromkeys(("memory.max", "memory.current", "cpu.max", "memory.stat"), words)
    found = allowance(machine(tmp_path_factory.mktemp("machine"), f"0::/\n{encodable[0]}", encodable[1], files))
    assert found.cpus > 0
