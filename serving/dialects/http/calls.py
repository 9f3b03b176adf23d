"""The record of a call of a dialect, and its admission: the same for requests and for WebSockets, and as over gRPC."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from starlette.datastructures import Headers

from serving.dialects.grpc.intake import AUTHORIZATION
from serving.dialects.grpc.recording import TRACE_KEY, take_over
from serving.dialects.grpc.status import ID_KEY
from serving.dialects.http.dialect import dialect_of
from serving.host.observing import Record
from serving.security.gate import Gate

CANCELLED: Final = "CANCELLED"
"""The code of a call whose client left."""


def record_of(scope: Any, verb: str, path: str) -> Record:
    """The record of a call of an endpoint, whose `path` has parameters in braces. Its method is such as
    "ollama/POST /api/chat".
    """
    dialect = dialect_of(path)
    peer = "{}:{}".format(*scope["client"]) if scope.get("client") else ""
    method = f"{dialect.name if dialect else 'http'}/{verb} {path}"
    return Record(method=method, client=peer, peer=peer, traceparent=Headers(scope=scope).get(TRACE_KEY, ""))


@contextmanager
def admitted(record: Record, gate: Gate, scope: Any) -> Iterator[None]:
    """Admit a call while the block runs, under the id that the client sent. Raises InvalidInput for such an id, and the
    errors of `Gate.admitted`.
    """
    headers = Headers(scope=scope)
    take_over(record, headers.get(ID_KEY, ""))
    with gate.admitted(record, headers.get(AUTHORIZATION)):
        yield
