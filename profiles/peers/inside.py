"""What workers of peers share. It needs nothing but Python: it runs in a peer's environment."""

from __future__ import annotations

import bisect
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from profiles.protocol import Channel, Hello, Metric


@dataclass(frozen=True)
class Job:
    """What a worker is told: the folder or file that it loads, the sizes of what is measured, and how to load it.

    `sizes` are those of `profiles.peers.declared`; `options` are the worker's own, declared there too.
    """

    model: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """As the worker's argument."""
        return json.dumps({"model": self.model, "sizes": dict(self.sizes), "options": dict(self.options)})


Loaded = tuple[dict[str, Metric], dict[str, Callable[[], float]]]
"""What a worker measures: its metrics, and how each is measured once."""


def work(packages: Iterable[str], load: Callable[[Job], Loaded], target: str, quant: str = "none") -> None:
    """Load a model of the first of `packages`, then measure it until the input ends; report a failure to load. The
    versions of all of them are stated. An option `target` of the job is added to the worker's own, and `quant` replaces
    it.
    """
    channel = Channel()
    start = time.perf_counter()
    job = Job(**json.loads(sys.argv[1]))
    try:
        metrics, probes = load(job)
        described = hello(tuple(packages), job, target, quant, time.perf_counter() - start, metrics)
    except Exception as error:  # the driver shows it
        channel.fail(error)
        sys.exit(1)
    channel.serve(described, probes)


def hello(
    packages: tuple[str, ...], job: Job, target: str, quant: str, load: float, metrics: dict[str, Metric]
) -> Hello:
    """The first message."""
    name, options = packages[0], job.options
    return Hello(
        program=f"{name} {version(name)}",
        target=" ".join(filter(None, (target, options.get("target")))),
        device="CPU",
        threads=threads(),
        versions={one: version(one) for one in packages},
        load=load,
        metrics=metrics,
        quant=options.get("quant", quant),
    )


def threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def timed(run: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def text_metrics(prompt_tokens: int, new_tokens: int) -> dict[str, Metric]:
    """The metrics of a prompt, in tokens read and in tokens written a second."""
    sizes: dict[str, int | float | str] = {"prompt_tokens": prompt_tokens}
    return {
        "prefill": Metric(unit="tokens/s", settings=sizes),
        "decode": Metric(unit="tokens/s", settings=sizes | {"new_tokens": new_tokens}),
    }


def call_metrics(name: str, **inputs: Any) -> dict[str, Metric]:
    """The metric of a submodel's call with arrays or tensors as inputs, in seconds."""
    return {name: Metric(unit="s", settings={one: "x".join(map(str, array.shape)) for one, array in inputs.items()})}


def fitting_words(length: Callable[[int], int], tokens: int) -> int:
    """The most words of a text whose prompt has at most so many tokens; `length` is that of so many words."""
    words = bisect.bisect_right(range(1, tokens + 1), tokens, key=length)
    if not words:
        raise ValueError(f"a prompt of one word has {length(1)} tokens, expected at most {tokens}")
    return words
