"""Settings whose values are texts, as on a command line, checked by a pydantic model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from runtime.errors import InvalidInput

T = TypeVar("T", bound="Texts")


class Texts(BaseModel):
    """Base class of settings whose values are texts, as on a command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls: type[T], settings: Mapping[str, str]) -> T:
        """Parse settings. Raises InvalidInput that names the first invalid one."""
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            found = error.errors()[0]
            name = str(found["loc"][0])
            known = f" (known: {', '.join(sorted(cls.model_fields))})" if found["type"] == "extra_forbidden" else ""
            raise InvalidInput(name, f"{found['msg'].removeprefix('Value error, ')}{known}") from None
