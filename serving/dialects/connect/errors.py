"""Converts errors of `runtime.errors` to those of Connect. gRPC-Web has the same codes and the same details."""

from __future__ import annotations

from typing import Final

import grpc
from connectrpc.code import Code
from connectrpc.errors import ConnectError, ErrorDetail
from protobuf.wkt import Any as Packed

from runtime.errors import EnginecastError
from serving.dialects.grpc.status import code, details, fitting

CODES: Final[dict[grpc.StatusCode, Code]] = {
    status: Code.CANCELED if status is grpc.StatusCode.CANCELLED else Code[status.name]
    for status in grpc.StatusCode
    if status is not grpc.StatusCode.OK
}
"""Connect's name of each gRPC status."""
TYPES: Final = "type.googleapis.com/"
STATUSES: Final[dict[Code, grpc.StatusCode]] = {code: status for status, code in CODES.items()}


class Refused(ConnectError):
    """An `error` as Connect reports it."""

    def __init__(self, error: EnginecastError) -> None:
        packed = [
            ErrorDetail(Packed(type_url=f"{TYPES}{one.DESCRIPTOR.full_name}", value=one.SerializeToString()))
            for one in details(error)
        ]
        super().__init__(CODES[code(error)], fitting(str(error)), packed)
        self.error = error
