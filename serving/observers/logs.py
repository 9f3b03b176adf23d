"""The log of a server: lines of text or of JSON, with the id of the request that each belongs to, and one line for each
request when it ends. No text and no picture of a request is logged.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Final

from runtime.errors import InvalidInput, did_you_mean
from serving.host.observing import OK, Observer, Record, current

log = logging.getLogger("enginecast.requests")

FIELDS: Final = "fields"
"""The attribute of a log record with the further fields of its JSON line."""
FAULTS: Final = ("INTERNAL", "UNKNOWN")
"""Codes that are no fault of the client or of the load."""


class TextFormat(logging.Formatter):
    """A line for people. The id of the request comes in brackets."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s%(id)s")

    def format(self, record: logging.LogRecord) -> str:
        call = current()
        record.id = f" [{call.id}]" if call else ""
        return super().format(record)


class JsonFormat(logging.Formatter):
    """A JSON object a line, with `time` in UTC, `level`, `logger`, `message`, `request_id` and further fields."""

    def format(self, record: logging.LogRecord) -> str:
        call = current()
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if call:
            line["request_id"] = call.id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, FIELDS, {}), ensure_ascii=False, allow_nan=False)


FORMATS: Final[dict[str, type[logging.Formatter]]] = {"text": TextFormat, "json": JsonFormat}


def configure(name: str) -> None:
    """Log to standard error in a format of FORMATS, from level INFO. Raises InvalidInput."""
    if name not in FORMATS:
        raise InvalidInput("log_format", f"'{name}' is not known: {did_you_mean(name, FORMATS)}")
    handler = logging.StreamHandler()
    handler.setFormatter(FORMATS[name]())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class RequestLog(Observer):
    """A line for each call of a client when it ends. Successful calls that concern no model, such as checks of health,
    have the level DEBUG.
    """

    def ended(self, record: Record) -> None:
        level = logging.ERROR if record.code in FAULTS else logging.INFO
        if record.code == OK and not record.model:
            level = logging.DEBUG
        if log.isEnabledFor(level):
            log.log(level, "%s", _summary(record), extra={FIELDS: _fields(record)})


def _summary(record: Record) -> str:
    what = " ".join(filter(None, (record.method, record.model)))
    return f"{what} {record.code} in {record.ended or 0:.3f} s"


def _fields(record: Record) -> dict[str, Any]:
    """What a record says, without what it does not say."""
    fields: dict[str, Any] = {
        "method": record.method,
        "client": record.client,
        "model": record.model,
        "task": record.task,
        "code": record.code,
        "error": record.error,
        "seconds": record.ended,
        "queue_seconds": record.waited,
        "first_output_seconds": record.first_output,
        **record.counts,
    }
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in fields.items() if value}
