"""Settings given as texts, as a command line has them, checked by a model of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from runtime.errors import InvalidInput

T = TypeVar("T", bound="Texts")


class Texts(BaseModel):
    """Settings given as texts, as a command line has them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls: type[T], settings: Mapping[str, str]) -> T:
        """Settings from texts. Raises InvalidInput naming the one that is wrong."""
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            found = error.errors()[0]
            name = str(found["loc"][0])
            known = f" (known: {', '.join(sorted(cls.model_fields))})" if found["type"] == "extra_forbidden" else ""
            raise InvalidInput(name, f"{found['msg'].removeprefix('Value error, ')}{known}") from None
