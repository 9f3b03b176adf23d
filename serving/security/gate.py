"""Admits calls by their tokens: who calls, whether the token allows it, how many calls it may make."""

from __future__ import annotations

import base64
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from runtime.errors import SOON, PermissionDenied, ResourceExhausted, Unauthenticated
from serving.host.observing import Record
from serving.security import tokens
from serving.security.scopes import Scope, required
from serving.security.tokens import Token
from serving.security.watched import Watched

MINUTE: Final = 60.0


class Usage:
    """The calls of one token: those that run, and when those of the last minute began."""

    def __init__(self) -> None:
        self._running = 0
        self._began: deque[float] = deque()

    @contextmanager
    def call(self, token: Token) -> Iterator[None]:
        """Count one call while the block runs. Raises ResourceExhausted."""
        self._check(token, time.monotonic())
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def _check(self, token: Token, now: float) -> None:
        if token.concurrent is not None and self._running >= token.concurrent:
            raise ResourceExhausted(
                f"token {token.name} may have {token.concurrent} calls at once, and has them: wait for one to end",
                SOON,
            )
        if token.requests_per_minute is None:
            return
        while self._began and self._began[0] <= now - MINUTE:
            self._began.popleft()
        if len(self._began) >= token.requests_per_minute:
            wait = self._began[0] + MINUTE - now
            raise ResourceExhausted(
                f"token {token.name} may make {token.requests_per_minute} requests a minute, and made them: try again "
                f"in {math.ceil(wait)} s",
                wait,
            )
        self._began.append(now)


class Gate:
    """Admits calls to a server. Without a file of `tokens`, everyone is admitted. The file is read again when it
    changes. Used on one event loop. Raises InvalidInput and NotFound for the file.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._tokens = None if file is None else Watched([file], partial(tokens.read, file))
        self._usages: dict[str, Usage] = {}

    @property
    def closed(self) -> bool:
        """Whether calls need a token."""
        return self._tokens is not None

    @contextmanager
    def admitted(self, record: Record, authorization: str | None) -> Iterator[None]:
        """Admit one call while the block runs. `authorization` is "Bearer TOKEN", or Basic with the token as
        the password. The token's name becomes the client of the call's record, also if the call is refused.

        Raises Unauthenticated, PermissionDenied, and ResourceExhausted with the time to wait.
        """
        scopes = required(record.method)
        if self._tokens is None or not scopes:
            yield
            return
        token = _found(self._tokens.current(), authorization)
        record.client = token.name
        _require(token, scopes)
        with self._usages.setdefault(token.name, Usage()).call(token):
            yield

    def known(self, authorization: str | None) -> None:
        """Raise Unauthenticated unless the token is one of the file."""
        if self._tokens is not None:
            _found(self._tokens.current(), authorization)

    def allows(self, method: str, authorization: str | None) -> None:
        """Raise Unauthenticated or PermissionDenied unless the token may call a method. Counts for no limit."""
        if self._tokens is not None and (scopes := required(method)):
            _require(_found(self._tokens.current(), authorization), scopes)

    def check(self, scope: Scope, authorization: str | None) -> None:
        """Raise Unauthenticated or PermissionDenied unless the token has a scope. May be called from any thread."""
        if self._tokens is not None:
            _require(_found(self._tokens.current(), authorization), frozenset({scope}))


def _require(token: Token, scopes: frozenset[Scope]) -> None:
    """Raise PermissionDenied unless a token has one of the scopes."""
    if not scopes & token.scopes:
        raise PermissionDenied(
            f"token {token.name} has the scopes {', '.join(sorted(token.scopes))}, and this call needs "
            f"{' or '.join(sorted(scopes))}: use a token that has it"
        )


def _secret(authorization: str) -> str:
    """The secret of a header: "Bearer TOKEN", or "Basic" with the token as the password (RFC 7617), which is all that
    some programs can send. Empty where there is none.
    """
    kind, _, rest = authorization.strip().partition(" ")
    if kind.lower() == "bearer":
        return rest.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
        except ValueError:  # no base64, or no UTF-8
            return ""
    return ""


def _found(known: tuple[Token, ...], authorization: str | None) -> Token:
    """The token of a call. Raises Unauthenticated."""
    secret = _secret(authorization or "")
    if not secret:
        raise Unauthenticated(
            "a token is required, as `authorization: Bearer TOKEN`: give it to the client (token, --token, "
            "ENGINECAST_TOKEN)"
        )
    token = tokens.find(known, secret)
    if token is None:
        raise Unauthenticated("the token is not known here: check it, or get a new one from who runs the server")
    return token
