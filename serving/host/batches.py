"""Runs the calls that requests wait for, alone or several in one run of an engine.

The next positions of all answers of a decoder are one run (`Engine.run_many`), joined by pieces of prompts, so that a
long prompt does not hold up the answers of others (Yu et al. 2022, Orca; Agrawal et al. 2023, arXiv 2308.16369).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Final

from runtime.engine import Engine, Slot, SlotCall, run_alone
from runtime.pipeline import Outputs, prepare, run_call
from runtime.stacking import Rows
from serving.host.run import Run

CHUNK: Final = 128
"""Positions of prompts that are read in one run beside the next positions of other answers."""
ALONE: Final = 512
"""Positions of a prompt that are read in one run where no other request waits for the decoder."""


@dataclass(frozen=True)
class Piece:
    """The next positions of a decoder's call, up to position `stop` of it; `final` if the call has no more. The slot
    held `past` positions before.
    """

    run: Run
    call: SlotCall
    slot: Slot
    past: int
    stop: int
    final: bool


@dataclass(frozen=True)
class Ran:
    """An engine ran once, for calls of these requests together."""

    submodel: str
    runs: Sequence[Run]
    seconds: float


def stateful(run: Run) -> bool:
    """Whether the request waits for a submodel that keeps states."""
    return run.call is not None and run.call.slot is not None


def alone(run: Run) -> Ran:
    """Make the call of one request and continue it."""
    call = run.call
    assert call is not None, "it waits for a call"
    seconds, outputs = _timed(run, lambda: run_call(run.job.engines, call))
    if outputs is not None:
        run.advance(outputs)
    return Ran(call.submodel, (run,), seconds)


def together(engine: Engine, runs: Sequence[Run]) -> Ran | None:
    """Make the stackable calls of several requests as one, and continue them. None where the engine cannot: then
    nothing was done.
    """
    rows, calls = Rows.of(engine.submodel.signature), [run.call.inputs for run in runs if run.call is not None]
    assert rows is not None, "stackable calls have rows"
    began = perf_counter()
    try:
        outputs = engine.run(rows.stack(calls))
    except Exception:  # it takes fewer rows; if a call is at fault, that shows when each is made by itself
        return None
    ran = Ran(engine.submodel.name, runs, perf_counter() - began)
    for run, found in zip(runs, rows.unstack(outputs, calls), strict=True):
        run.advance(found)
    return ran


def decode(engine: Engine, runs: Sequence[Run]) -> list[Ran]:
    """The next positions of every request that waits for this decoder."""
    if engine.submodel.signature.port is None:
        return [alone(run) for run in runs]
    pieces = [piece for piece in _pieces(engine, runs) if _prepared(engine, piece)]
    joined = _joined(engine, pieces) if len(pieces) > 1 else None
    return [joined] if joined else [_feed(engine, piece) for piece in pieces]


def _joined(engine: Engine, pieces: Sequence[Piece]) -> Ran | None:
    """Run pieces together. None where one of them is at fault, which shows when each is run by itself."""
    began = perf_counter()
    try:
        outputs = engine.run_many([piece.call for piece in pieces])
    except Exception:
        for piece in pieces:
            engine.trim(piece.slot, piece.past)
        return None
    ran = Ran(engine.submodel.name, [piece.run for piece in pieces], perf_counter() - began)
    for piece, found in zip(pieces, outputs, strict=True):
        _continue(piece, found)
    return ran


def _pieces(engine: Engine, runs: Sequence[Run]) -> list[Piece]:
    """Of answers all that they wait for, then of prompts what there is room for, in the order of the requests."""
    left = {run: _left(engine, run) for run in runs}
    room, pieces = CHUNK if len(runs) > 1 else ALONE, list[Piece]()
    prompts = {run for run in runs if left[run] > 1 and not _verifies(run)}
    for run in sorted(runs, key=lambda run: run in prompts):
        count = min(left[run], room) if run in prompts else left[run]
        if count:
            pieces.append(_piece(engine, run, count))
        room -= count if run in prompts else 0
    return pieces


def _verifies(run: Run) -> bool:
    """Whether the call is for outputs of several positions, such as a token with guesses of the next ones."""
    return run.call is not None and run.call.last > 1


def _left(engine: Engine, run: Run) -> int:
    """Positions of a decoder's call that were not run yet."""
    assert run.call is not None, "it waits for a call"
    signature = engine.submodel.signature
    return signature.lengths(run.call.inputs)[signature.decoder.sequence] - run.fed


def _piece(engine: Engine, run: Run, count: int) -> Piece:
    assert run.call is not None and run.call.slot is not None, "a decoder's call has a slot"
    signature, inputs = engine.submodel.signature, run.call.inputs
    lengths = signature.lengths(inputs)
    sequence, stop = lengths[signature.decoder.sequence], run.fed + count
    part = inputs if count == sequence else signature.cut(inputs, run.fed, stop)
    past = lengths[signature.decoder.total] - sequence + run.fed
    final = stop == sequence
    call = SlotCall(part, run.call.slot, run.call.last if final else 1)
    return Piece(run, call, run.call.slot, past, stop, final)


def _prepared(engine: Engine, piece: Piece) -> bool:
    """Bring the slot to what a call continues, before the first positions of it. A failure ends the request."""
    call = piece.run.call
    assert call is not None, "it waits for a call"
    try:
        if not piece.run.fed:
            prepare(engine, call)
    except Exception as error:
        piece.run.end(error)
        return False
    return True


def _feed(engine: Engine, piece: Piece) -> Ran:
    """Run one piece by itself."""
    seconds, outputs = _timed(piece.run, lambda: run_alone(engine, piece.call))
    if outputs is not None:
        _continue(piece, outputs)
    return Ran(engine.submodel.name, (piece.run,), seconds)


def _continue(piece: Piece, outputs: Outputs) -> None:
    if piece.final:
        piece.run.advance(outputs)
    else:
        piece.run.fed = piece.stop


def _timed(run: Run, execute: Callable[[], Outputs]) -> tuple[float, Outputs | None]:
    """The seconds that a call took and its outputs: None if it failed, which ends the request."""
    began, outputs = perf_counter(), None
    try:
        outputs = execute()
    except Exception as error:
        run.end(error)
    return perf_counter() - began, outputs
