"""The lines that say how a request goes, as HTML."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from html import escape
from math import exp
from typing import Final

from runtime.errors import Cancelled, EnginecastError, InvalidInput
from runtime.language.logprobs import TokenLogprob
from runtime.pipeline import Progress
from serving.dialects.grpc.status import UNEXPECTED
from serving.host.job import Done, Queued
from serving.host.shown import shortened

log = logging.getLogger(__name__)

TOKENS: Final = 300
"""The most tokens of a table."""


def line(text: str, kind: str = "") -> str:
    """A line of text. `kind` is the name of its style."""
    role = "alert" if kind == "failed" else "status"
    return f'<p class="line {kind}" role="{role}">{escape(text)}</p>'


def queued(event: Queued, place: str = "") -> str:
    """How many requests are before this one; `place` is what stands before that."""
    if not event.position:
        return line(f"{place}starting")
    expected = "" if event.eta_seconds is None else f", about {event.eta_seconds:.0f} s"
    return line(f"{place}waiting: {event.position} before this one{expected}")


def progress(event: Progress, place: str = "") -> str:
    """The steps that are done, with a bar; `place` is what stands before that."""
    bar = f'<progress max="{event.total}" value="{event.step}"></progress>'
    return f'<p class="line" role="status">{bar} {escape(place)}step {event.step} of {event.total}</p>'


def likely(tokens: Sequence[tuple[int, TokenLogprob]]) -> str:
    """A table of tokens with the numbers of their answers, their probabilities, and what else was likely."""
    rows = [
        f"<tr><td>{number + 1}</td><td>{_token(one)}</td><td>{exp(one.logprob):.1%}</td>"
        f"<td>{', '.join(f'{_token(other)} {exp(other.logprob):.1%}' for other in one.top)}</td></tr>"
        for number, one in tokens[:TOKENS]
    ]
    rest = f"<p>and {len(tokens) - TOKENS} more</p>" if len(tokens) > TOKENS else ""
    head = "<tr><th>answer</th><th>token</th><th>probability</th><th>likeliest in its place</th></tr>"
    return f'<table class="states">{head}{"".join(rows)}</table>{rest}'


def _token(one: TokenLogprob) -> str:
    return f"<code>{escape(one.text)}</code>"


def done(event: Done, made: str) -> str:
    """What was made, and how long it took."""
    engines = sorted({use.target for use in event.engines})
    return line(f"{made} in {event.run_seconds:.1f} s, on {' and '.join(engines)}", "done")


def failed(error: Exception) -> str:
    """An error as one line. What is no error of ours is a fault, and in the log."""
    if isinstance(error, Cancelled):
        return line("stopped")
    if isinstance(error, InvalidInput):
        return line(f"{error.field.replace('_', ' ')}: {shortened(error.reason)}", "failed")
    if isinstance(error, EnginecastError):
        return line(shortened(str(error)), "failed")
    log.error("the page failed unexpectedly", exc_info=error)
    return line(UNEXPECTED, "failed")
