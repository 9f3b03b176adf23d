"""The audit log: who changed what the server does, and with what result, a line of JSON for each such call."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from runtime.files import append, file_error
from serving.host.observing import Observer, Record
from serving.security.scopes import is_management

log = logging.getLogger(__name__)

MODE: Final = 0o640
"""Permissions of a new file."""


class Audit(Observer):
    """Appends a line to a file when a management call ends, refused ones included. The file is opened for each line, so
    that it may be moved away at any time. Raises InvalidInput where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            append(path, "", MODE)
        except OSError as error:
            raise file_error(error) from None

    def ended(self, record: Record) -> None:
        if is_management(record.method):
            line = json.dumps(entry(record), ensure_ascii=False)
            try:
                append(self._path, line + "\n", MODE)
            except OSError as error:
                log.error("the audit log cannot be written (%s): %s", error, line)


def entry(record: Record) -> dict[str, Any]:
    """What the audit log says of a call."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": record.id,
        "client": record.client,
        "peer": record.peer,
        "method": record.method,
        "request": record.request,
        "code": record.code,
        "error": record.error,
        "seconds": round(record.ended or 0, 3),
    }
