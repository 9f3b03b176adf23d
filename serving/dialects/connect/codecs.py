"""Reads and writes messages as bytes or JSON, within the limits of messages.

JSON is protobuf's own (https://protobuf.dev/programming-guides/json/): names in lowerCamelCase, of which the proto's
own spelling is accepted, too; bytes in base64.
"""

from __future__ import annotations

import zlib
from typing import Any, Final, Protocol

from connectrpc.compression.gzip import GzipCompression
from google.protobuf.json_format import MessageToJson, Parse, ParseError
from google.protobuf.message import Message

from runtime import limits
from runtime.errors import EnginecastError, InvalidInput, ResourceExhausted
from serving.dialects.connect.errors import Refused
from serving.dialects.grpc.intake import REQUEST, parse
from serving.dialects.http.values import check_values
from serving.host.shown import shortened


class _Parser(Protocol):
    def __call__(self, data: bytes, kind: type[Message], /) -> Message: ...


class Codec:
    """Messages in one form. Errors of requests are those that the server reports everywhere."""

    def __init__(self, name: str, write: Any, read: _Parser) -> None:
        self._name, self._write, self._read = name, write, read

    def name(self) -> str:
        """The form's name in content types."""
        return self._name

    def encode(self, message: Message) -> bytes:
        """The bytes of a message."""
        encoded: bytes = self._write(message)
        return encoded

    def decode(self, data: bytes | bytearray, message_class: type[Any]) -> Any:
        """The message of these bytes. Raises ConnectError."""
        try:
            return self._read(bytes(data), message_class)
        except EnginecastError as error:
            raise Refused(error) from None


def _write_json(message: Message) -> bytes:
    return MessageToJson(message, indent=None).encode()


def _read_binary(data: bytes, kind: type[Message]) -> Message:
    read: Message = parse(data, kind.FromString)
    return read


def _read_json(data: bytes, kind: type[Message]) -> Message:
    check_values(data, REQUEST)
    try:
        return Parse(data, kind())
    except (ParseError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidInput(
            REQUEST, f"is no {kind.DESCRIPTOR.full_name} in JSON: {shortened(str(error), 300)}"
        ) from None


CODECS: Final = (
    Codec("proto", lambda message: message.SerializeToString(), _read_binary),
    Codec("json", _write_json, _read_json),
)


class Gzip(GzipCompression):
    """gzip of one member. The library reads any number of them, and copies the rest of a message for each."""

    def decompress(self, data: bytes | bytearray | memoryview, read_max_bytes: int | None = None) -> bytes:
        """The content. Raises ConnectError."""
        most = read_max_bytes or limits.MESSAGE.most
        reading = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        try:
            content = reading.decompress(data, most + 1) if data else b""
        except zlib.error:
            raise Refused(InvalidInput(REQUEST, "is no gzip: send it uncompressed, or as gzip")) from None
        if len(content) > most:
            raise Refused(ResourceExhausted(f"the message has more than {most:,} bytes: send less"))
        if data and (not reading.eof or reading.unused_data):
            raise Refused(InvalidInput(REQUEST, "is incomplete, or more than one piece of gzip: send one piece"))
        return content


GZIP: Final = Gzip(level=1)
"""Quick: pictures, which are most of what is sent, hardly become smaller."""
