"""What a server adds to a chat and what it saves: a further turn on a new connection, gRPC beside this process, and how
soon the engines are idle after a client left.

    python -m profiles.serving.turns BUNDLE [--target openvino] [--repeat 5]

Prints medians and ranges, in seconds. The machine must do nothing else meanwhile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Annotated, Final

import numpy as np
import typer

from profiles.serving.worker import Job, ready, started
from runtime.timing import turns
from serving.dialects.python.client import Client
from serving.dialects.python.model import load
from serving.dialects.python.requests import Message
from serving.dialects.python.session import Session
from serving.host.job import Queued

TOKENS: Final = 48
EDGE: Final = 336
"""Pixels of the edge of a picture."""
POLL: Final = 0.001
WITHIN: Final = 0.2
"""Seconds after which an answer is cancelled."""

_numbers: Iterator[int] = itertools.count()


def main(
    bundle: Annotated[Path, typer.Argument(help="Folder of a chat model made by `enginecast build`.")],
    target: Annotated[str | None, typer.Option(help="Engine to run on.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Repetitions that count; one more is made first.")] = 5,
) -> None:
    """Measure a server of the bundle."""
    name = "model"
    with started(Job(bundle=bundle, target=target), name) as address:
        ready(address, name)

        def client() -> Client:
            return Client(address, name)

        firsts = turns([lambda: further_turn(client)], repeat)[0]
        show("first turn about a new picture: first token", [first for first, _ in firsts])
        show("further turn on a new connection: first token", [second for _, second in firsts])
        show("  of the first turn's", [second / first for first, second in firsts])
        show("from cancelling to idle", turns([lambda: idle(client)], repeat)[0])
        with client() as remote, load(bundle, target=target) as local:
            there, here = turns([lambda: whole(remote), lambda: whole(local)], repeat)
            show("answer of this process", here)
            show("answer over gRPC", there)
            show("  more than in this process", [one - other for one, other in zip(there, here, strict=True)])


def question() -> list[Message]:
    """A question about a picture that nobody has seen."""
    number = next(_numbers)
    picture = np.random.default_rng(number).integers(0, 256, (EDGE, EDGE, 3), np.uint8)
    return [Message("user", [picture, f"What is in picture {number}?"])]


def first_token(session: Session, messages: Sequence[Message]) -> float:
    """Seconds until an answer of one token."""
    began = perf_counter()
    session.chat(messages, max_tokens=1, temperature=0.0)
    return perf_counter() - began


def further_turn(client: Callable[[], Client]) -> tuple[float, float]:
    """Seconds to the first token of a first turn, and of the next one from another connection."""
    messages = question()
    with client() as connection:
        first = first_token(connection, messages)
    with client() as connection:
        further = [*messages, Message("assistant", "A shape."), Message("user", "And what is behind it?")]
        return first, first_token(connection, further)


def idle(client: Callable[[], Client]) -> float:
    """Seconds from cancelling an answer until no request runs."""
    with client() as connection, client() as watcher:

        def runs() -> bool:
            return any(model.running for model in watcher.models())

        stream = connection.chat_stream(f"Count from {next(_numbers)}.", max_tokens=TOKENS, temperature=0.0)
        for event in stream:
            if isinstance(event, Queued):
                break
        while not runs():
            sleep(POLL)
        sleep(WITHIN)
        began = perf_counter()
        stream.close()
        while runs():
            sleep(POLL)
        return perf_counter() - began


def whole(session: Session) -> float:
    """Seconds of an answer of TOKENS tokens to a text."""
    began = perf_counter()
    session.chat(f"Count from {next(_numbers)}.", max_tokens=TOKENS, temperature=0.0)
    return perf_counter() - began


def show(what: str, values: Sequence[float]) -> None:
    """Print the median and the range."""
    print(f"{what}: {median(values):.4g} ({min(values):.4g} to {max(values):.4g})", flush=True)


if __name__ == "__main__":
    typer.run(main)
