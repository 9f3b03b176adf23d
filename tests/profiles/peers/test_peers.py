from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from profiles.peers import declared, environments, table
from profiles.peers.declared import PEERS, Environment, Peer
from profiles.peers.environments import Workplace, inside
from profiles.peers.limits import Limits
from profiles.peers.measuring import Party, Plan, measured
from profiles.process import Worker
from runtime.bundle.manifest import Bundle
from runtime.errors import EngineError, InvalidInput
from runtime.task import tasks

OURS = """
import itertools
from profiles.protocol import Channel, Hello, Metric
values = itertools.cycle([2.0, 2.2])
metrics = {"unet": Metric(unit="s"), "decode": Metric(unit="tokens/s", bytes=1e6)}
Channel().serve(
    Hello(program="ours 1", target="t", device="d", threads=1, versions={}, load=0.5, metrics=metrics, quant="int8"),
    {"unet": lambda: next(values), "decode": lambda: 1.0},
)
"""


def silent(line: str) -> None:
    pass


def ours() -> Party:
    return Party("ours", Worker([sys.executable, "-c", OURS]), 2_000_000_000, {"unet": "int8"})


def test_ours_and_peers_are_one_table(
    bundle: Bundle, workplace: Workplace, toys: Callable[..., Peer], tmp_path: Path
) -> None:
    """The one that is faster, one that cannot load, one that fails at work, one that could not be prepared."""
    peers = [
        toys("quick", seconds=1.05),
        toys("full", broken="load"),
        toys("faulty", broken="unet", seconds=1.0),
        toys("unprepared"),
    ]
    workplace.make_export(peers[0].export, silent)  # type: ignore[arg-type]
    reasons = {"unprepared": "pip | found\nnothing"}
    with inside() as variables:
        theirs = [workplace.party(peer, {"width": 64}, variables, reasons.get(peer.name, "")) for peer in peers]
        rows = measured(
            bundle,
            [ours(), *theirs],
            Plan(("unet", "missing"), 6, Limits({"unet": 4.0}, {"int8": 2.0, "int4": 8.0})),
            silent,
        )
    assert {row.run for row in rows} == {rows[0].run} and rows[0].run
    named = {(row.program.split()[0], row.metric): row for row in rows}
    assert named["ours", "unet"].values == (2.2, 2.0) * 3  # after one that does not count
    assert named["ours", "size"].spread.median == 2 and named["pip", "size"].spread.median == 1e-6
    quick = named["pip", "unet"]
    assert named["ours", "unet"].bound == 2 and quick.bound == 0.5
    assert quick.values == (1.05,) * 6 and quick.target == "toy" and quick.settings == {"sample": "64"}
    assert 0.001 < named["pip", "memory.unet"].spread.median < named["pip", "resident.unet"].spread.median < 1
    assert named["pip", "memory"].spread.median >= named["pip", "memory.unet"].spread.median
    assert table.failures(theirs) == [
        "full: full: MemoryError: no room for it",
        "faulty: unet: faulty: ZeroDivisionError: division by zero",
        "unprepared: pip | found nothing",
    ]
    first, second = table.lines([ours_with(rows, "ours"), theirs[0]], ("unet",))
    assert first[2:5] == ("2.1 s", "2..2.2", "6") and first[7] == "1"
    assert second[1].startswith("pip ") and second[7:10] == ("0.500", "0.477..0.525", "slower")
    page = table.markdown("model", ["a | b"], [first, second], theirs)
    assert page.startswith("# model\n\n- a | b\n\n| metric | who |") and "\n- faulty: unet" in page
    logged = (workplace.folder / "logs" / "quick.log").read_text()
    assert logged == ""


def ours_with(rows: list, program: str) -> Party:  # type: ignore[type-arg]
    party = ours()
    party.found = {row.metric: row for row in rows if row.program.startswith(program)}
    return party


def test_few_repetitions_show_nothing_and_limits_are_printed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibration.ground.machine.read_bandwidth", lambda: 2e6)
    parties = [ours(), ours()]
    measured(bundle, parties, Plan(("decode",), 2), silent)
    first, second = table.lines(parties, ("decode",))
    assert first[5:8] == ("2", "50%", "1") and second[7:10] == ("1.000", "", "too few to say")
    assert "too few" in str(table.shown([first, second]).columns[9]._cells)


def test_exports_are_whole_or_not_there(workplace: Workplace, toys: Callable[..., Peer]) -> None:
    peer, said = toys("one"), list[str]()
    assert peer.export is not None
    (workplace.checkpoint / "refused").touch()
    with pytest.raises(EngineError, match=r"ended with exit code 1: reading checkpoint \| this checkpoint is refused"):
        workplace.make_export(peer.export, said.append)
    made = workplace.folder / "exports" / "checkpoint-key"
    assert list(made.iterdir()) == [] and said == []
    (workplace.checkpoint / "refused").unlink()
    workplace.make_export(peer.export, said.append)
    assert [path.name for path in (made / "toy").iterdir()] == ["weights"]
    workplace.make_export(peer.export, said.append)  # which would fail: there are weights
    assert said[0].startswith("export toy: ") and "GB anonymous" in said[0] and said[1] == f"export toy: {made / 'toy'}"


def test_environments_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With commands that only say what they would do."""
    done: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], variables: dict[str, str]) -> None:
        done.append((command, variables))
        if command[2] == "venv":
            (Path(command[3]) / "bin").mkdir()
            (Path(command[3]) / "bin" / "python").touch()
        elif "refused" in command:
            raise EngineError("pip ended with exit code 1")

    monkeypatch.setattr(environments, "_run", run)
    workplace, said = Workplace(tmp_path, tmp_path, "key"), list[str]()
    with pytest.raises(EngineError, match="pip ended"):
        workplace.make_environment(Environment("bad", ("refused",)), said.append)
    assert list((tmp_path / "environments").iterdir()) == []
    built = Environment("good", ("some==1",), ("other",), {"CFLAGS": "-O3"})
    done.clear()
    workplace.make_environment(built, said.append)
    venv, install, remove = done
    assert venv[0][:3] == [sys.executable, "-m", "venv"]
    assert install[0][-3:] == ["--quiet", "--no-cache-dir", "some==1"] and install[1] == {"CFLAGS": "-O3"}
    assert remove[0][-1] == "other" and workplace.python(built).exists()
    done.clear()
    workplace.make_environment(built, said.append)
    assert done == [] and said[-1] == f"environment good: {tmp_path / 'environments' / 'good'}"


def test_what_runs_in_an_environment_needs_nothing_of_ours() -> None:
    """Every worker and export is imported in a Python without this program and its libraries."""
    names = [
        f"profiles.peers.{folder}.{file.stem}"
        for folder in ("workers", "exports")
        for file in (environments.ROOT / "peers" / folder).glob("*.py")
    ]
    assert {f"profiles.peers.workers.{peer.worker}" for peer in PEERS} <= set(names)
    modules = {word for peer in PEERS if peer.export for word in peer.export.command if word.startswith("profiles.")}
    assert modules and modules <= set(names)
    code = f"import {', '.join(names)}, sys; assert 'runtime' not in sys.modules and 'numpy' not in sys.modules"
    with inside() as variables:
        ended = subprocess.run(
            [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({variables['PYTHONPATH']!r}); {code}"]
        )
    assert ended.returncode == 0


def test_peers_are_chosen_by_task_and_name() -> None:
    assert {peer.task for peer in PEERS} <= set(tasks()) and len({peer.name for peer in PEERS}) == len(PEERS)
    assert [peer.name for peer in declared.peers("chat", ())] == ["openvino-genai", "llama.cpp"]
    assert [peer.name for peer in declared.peers("image", ["diffusers"])] == ["diffusers"]
    with pytest.raises(InvalidInput, match=r"only: 'lama.cpp' is no peer of this checkpoint: did you mean 'llama.cpp'"):
        declared.peers("chat", ["lama.cpp"])
    with pytest.raises(InvalidInput, match="CHECKPOINT: is a model of the task embed"):
        declared.peers("embed", ())


def test_a_job_is_one_argument() -> None:
    from profiles.peers.inside import Job, fitting_words

    job = Job("model", {"width": 8}, {"static": True})
    assert Job(**json.loads(job.line)) == job
    assert fitting_words(lambda words: 10 + 2 * words, 17) == 3
    with pytest.raises(ValueError, match="a prompt of one word has 12 tokens, expected at most 5"):
        fitting_words(lambda words: 10 + 2 * words, 5)
