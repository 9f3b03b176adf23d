from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from profiles import memory
from runtime.errors import NotFound

pytestmark = pytest.mark.skipif(not memory.supported(), reason="needs Linux's /proc")
HOLD = "import time; held = bytearray(80_000_000); time.sleep(0.3)"
NESTED = f"""
import subprocess, sys
print("first", flush=True)
subprocess.run([sys.executable, "-c", {HOLD!r}])
print("held in a child", flush=True)
{HOLD}
print("held here", flush=True)
"""


def test_peak_of_a_process_tree_by_lines() -> None:
    told: list[memory.Stretch] = []
    measured = memory.measure([sys.executable, "-c", NESTED], told.append)
    assert measured.exit_code == 0 and tuple(told) == measured.stretches[:-1]
    assert [stretch.line for stretch in told] == ["first", "held in a child", "held here"]
    first, child, here, rest = (stretch.usage for stretch in measured.stretches)
    assert first.anonymous < 60e6 < 80e6 < child.anonymous < 140e6 and 80e6 < here.anonymous < 140e6
    assert child.resident > child.anonymous
    assert child.seconds > 0.3 and here.seconds > 0.3
    whole = measured.whole
    assert whole.anonymous == max(child.anonymous, here.anonymous, rest.anonymous)
    assert whole.seconds == pytest.approx(sum(stretch.usage.seconds for stretch in measured.stretches))


def test_before_and_matching() -> None:
    stretches = tuple(
        memory.Stretch(line, memory.Usage(seconds, anonymous, 9 * anonymous))
        for line, seconds, anonymous in [
            ("read", 1.0, 5),
            ("compile a", 2.0, 90),
            ("write", 4.0, 7),
            ("compile b", 8.0, 50),
            ("", 0.5, 1),
        ]
    )
    measured, pattern = memory.Measured(0, stretches), re.compile("^compile ")
    assert measured.whole == memory.Usage(15.5, 90, 810)
    assert measured.before(pattern) == memory.Usage(1.0, 5, 45)
    assert measured.matching(pattern) == memory.Usage(10.0, 90, 810)
    assert measured.before(re.compile("nothing")) is None


def test_a_grandchild_whose_parent_has_ended_counts() -> None:
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {HOLD!r}])"
    assert memory.measure([sys.executable, "-c", orphan]).whole.anonymous > 80e6


def test_an_error_ends_the_command() -> None:
    def refuse(stretch: memory.Stretch) -> None:
        raise KeyboardInterrupt

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        memory.measure([sys.executable, "-c", "import time; print('x', flush=True); time.sleep(30)"], refuse)
    assert time.perf_counter() - start < 10


def test_a_command_that_is_not_there() -> None:
    with pytest.raises(NotFound, match="'no-such-program' cannot be started"):
        memory.measure(["no-such-program"])


def test_command_line() -> None:
    command = [
        sys.executable,
        "-m",
        "profiles.memory",
        "--until",
        "^b",
        "--",
        sys.executable,
        "-c",
        "print('a'); print('b'); exit(3)",
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 3
    assert re.fullmatch(
        r" +0.00 GB  a\n +0.00 GB  b\nwhole: [\d.]+ s, peak [\d.]+ GB anonymous, [\d.]+ GB resident\n"
        r"before the first '\^b': .*\nsteps '\^b': .*\nwithout them: .* s\n",
        ended.stdout,
    )
    wrong = subprocess.run([*command[:3], "--until", "(", "--", "true"], capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.startswith("profiles.memory: until: is no regular expression")
