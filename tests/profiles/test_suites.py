"""Suites: what they measure, in which order, and how they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from profiles import cli, rows, starts, suites
from profiles.bench import BenchPlan
from profiles.serving.bench import LoadPlan
from profiles.suites import Subject
from profiles.task import Suite, profile_tasks
from profiles.worker import Job
from runtime.bundle.manifest import Bundle
from runtime.errors import InvalidInput

SUITE = Suite(
    repeat=9, budget=2.5, batches=(1, 2), clients=(1, 6), starts=2, settings={"prompt_tokens": 64, "new_tokens": 8}
)


class FakeWorker:
    """A worker that says how long it loaded."""

    loads = iter([4.0, 1.0, 6.0, 2.0])

    def __init__(self, job: Job, environment: dict[str, str]) -> None:
        self.folder = Path(environment["ENGINECAST_CACHE"])
        assert job.purpose == "start" and self.folder.is_dir()

    def __enter__(self) -> FakeWorker:
        warm = [*self.folder.iterdir()]
        (self.folder / "compiled").touch()
        self.hello: dict[str, Any] = {"program": "p", "target": "t", "threads": 1, "versions": {}, "metrics": {}}
        self.hello |= {"load": next(self.loads), "device": str(len(warm))}
        return self

    def __exit__(self, *error: object) -> None: ...


def test_starts_are_cold_with_an_empty_cache_and_warm_after(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "worker_of", FakeWorker)
    cold, warm = starts.starts(Job(bundle=bundle.root, target="t"), 2, lambda line: None)
    assert (cold.metric, cold.values, cold.device) == ("load_cold", (4.0, 6.0), "0")
    assert (warm.metric, warm.values, warm.device) == ("load_warm", (1.0, 2.0), "1")
    assert cold.run == warm.run


def test_what_a_suite_measures(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(suites, "starts", lambda job, repeat, say: asked.append(("starts", job.target, repeat)) or [])
    monkeypatch.setattr(suites.bench, "bundle_worker", lambda job: job)
    monkeypatch.setattr(suites.serving, "server_worker", lambda job: job)
    for module, name in ((suites.bench, "bench"), (suites.serving, "bench")):
        monkeypatch.setattr(
            module, name, lambda of, jobs, plan, say, name=module.__name__: asked.append((name, [*jobs], plan)) or []
        )
    monkeypatch.setattr(
        suites, "roofline", lambda names, threads, say: asked.append(("roofline", [*names], threads)) or []
    )
    assert suites.measure(Subject(bundle, ("a", "b"), 3, {"new_tokens": 4}), SUITE) == []
    sizes = {"prompt_tokens": 64, "new_tokens": 4}  # those of the command line count
    assert asked[:2] == [("starts", "a", 2), ("starts", "b", 2)]
    assert asked[2] == (
        "profiles.bench",
        [Job(bundle=bundle.root, target=name, threads=3, settings=sizes, batches=(1, 2)) for name in "ab"],
        BenchPlan(9, budget=2.5),
    )
    assert asked[3] == ("roofline", ["a", "b"], 3)
    name, jobs, plan = asked[4]
    assert name == "profiles.serving.bench" and [(job.target, job.parallel) for job in jobs] == [("a", 6), ("b", 6)]
    assert isinstance(plan, LoadPlan) and plan.repeat == 3
    assert [str(load) for load in plan.loads] == ["closed 1 2", "closed 6 12"]


def test_every_task_that_is_served_has_both_suites() -> None:
    for name in ("image", "chat", "embed"):
        task = profile_tasks()[name]
        assert list(task.suites) == ["quick", "full"] and task.batched is not None
        assert all(suite.batches[0] == 1 and suite.starts for suite in task.suites.values())


def test_how_a_suite_is_asked_for(bundle: Bundle) -> None:
    def bench(*words: str) -> None:
        CliRunner().invoke(cli.app, ["bench", str(bundle.root), *words], catch_exceptions=False)

    with pytest.raises(InvalidInput, match="suite: 'quik' is none of task image: did you mean 'quick'"):
        bench("--suite", "quik")
    for words in (("--repeat", "3"), ("--metric", "unet"), ("--beside", "x"), ("--serve",)):
        with pytest.raises(InvalidInput, match=f"{words[0][2:]}: and --suite exclude each other"):
            bench("--suite", "quick", *words)


@pytest.mark.full
def test_a_quick_suite(tiny_bundle: Path, tmp_path: Path) -> None:
    stored = tmp_path / "rows.jsonl"
    words = ["--suite", "quick", "--target", "onnxruntime", "--prompt-tokens", "40", "--new-tokens", "6", "--store"]
    ended = CliRunner().invoke(cli.app, ["bench", str(tiny_bundle), *words, "--rows", str(stored)])
    assert ended.exit_code == 0, ended.output
    found = {row.metric for row in rows.read(stored)}
    assert found >= {"load_cold", "load_warm", "decode", "follow_up", "batched", "served_throughput", "size", "memory"}
