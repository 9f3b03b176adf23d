"""Bearer tokens. A token is 256 random bits; a TOML file has its name, its SHA-256, its scopes and its limits.

    [[token]]
    name = "alice"
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    scopes = ["infer"]
    requests_per_minute = 60
    concurrent = 4

The hash of a random token cannot be reversed by trying passwords, so it needs no salt and no slow function.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import stat
import tomllib
from collections import Counter
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.errors import InvalidInput, NotFound, did_you_mean, quoted
from runtime.files import append, file_error, written
from serving.security.scopes import Scope
from serving.security.watched import content

PREFIX: Final = "ec_"
"""Tokens begin with it, so that scanners of repositories can find a lost one."""
LARGEST: Final = 1 << 22
"""Bytes of a file of tokens."""
MODE: Final = 0o600
"""Permissions of a new file of tokens."""
PER_MINUTE: Final = 100_000
CONCURRENT: Final = 4_000
"""The largest limits of a token."""
PART: Final = re.compile(r"^(?=[ \t]*\[\[[ \t]*token[ \t]*\]\])", re.MULTILINE)
"""Where a token begins in a file."""


class Token(BaseModel):
    """One token, without its secret. None is no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    scopes: Annotated[frozenset[Scope], Field(min_length=1)]
    requests_per_minute: Annotated[int | None, Field(ge=1, le=PER_MINUTE)] = None
    concurrent: Annotated[int | None, Field(ge=1, le=CONCURRENT)] = None

    def toml(self) -> str:
        """The token as a part of the file."""
        given = self.model_dump(mode="json", exclude_none=True) | {"scopes": sorted(self.scopes)}
        return "".join(("[[token]]\n", *(f"{name} = {json.dumps(value)}\n" for name, value in given.items())))


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    token: tuple[Token, ...] = ()


def read(path: Path) -> tuple[Token, ...]:
    """The tokens of a file. Raises InvalidInput for a file that is damaged or has a name or a hash twice, NotFound."""
    try:
        tokens = _File.model_validate(tomllib.loads(content(path, LARGEST).decode())).token
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput("tokens", f"{path} is no TOML file: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidInput("tokens", f"{path} is no file of tokens: {where}: {first['msg']}") from None
    for one in ("name", "sha256"):
        value, count = Counter(getattr(token, one) for token in tokens).most_common(1)[0] if tokens else ("", 1)
        if count > 1:
            raise InvalidInput("tokens", f"{path} has the {one} {value} twice: remove one of the two")
    return tokens


def new(path: Path, name: str, scopes: frozenset[Scope], per_minute: int | None, concurrent: int | None) -> str:
    """Make a token, append its hash to a file, which is made if there is none, and return it.

    Raises InvalidInput for a name that is in the file already, or that cannot be one.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        made = Token(
            name=name, sha256=_hash(secret), scopes=scopes, requests_per_minute=per_minute, concurrent=concurrent
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(str(first["loc"][0]), f"is {first['input']!r}: {first['msg']}") from None
    if path.exists() and any(token.name == name for token in read(path)):
        raise InvalidInput("name", f"'{name}' is in {path} already: choose another, or remove that token first")
    try:
        append(path, "\n" + made.toml(), MODE)
    except OSError as error:
        raise file_error(error) from None
    return secret


def remove(path: Path, name: str) -> None:
    """Take a token out of a file; comments and all else stay. Raises NotFound, and InvalidInput for a file that has the
    token in another form than its part `[[token]]`.
    """
    held = read(path)
    if name not in (known := [token.name for token in held]):
        raise NotFound(f"{path} has no token {quoted(name)}: {did_you_mean(name, known)}")
    first, *parts = PART.split(content(path, LARGEST).decode())
    kept = first + "".join(_comments(part) if _named(part) == name else part for part in parts)
    if [token.name for token in _File.model_validate(tomllib.loads(kept)).token] != [
        one for one in known if one != name
    ]:
        raise InvalidInput("tokens", f"{path} has {name} not as a part [[token]]: remove it in an editor")
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        with written(path) as file:
            Path(file.name).chmod(mode)
            file.write(kept.encode())
    except OSError as error:
        raise file_error(error) from None


def _named(part: str) -> str:
    """The name in a part of a file that begins with [[token]]."""
    return str(tomllib.loads(part)["token"][0].get("name", ""))


def _comments(part: str) -> str:
    """The empty lines and comments of a part, which may belong to the next one."""
    return "".join(line for line in part.splitlines(keepends=True) if line.strip()[:1] in ("", "#"))


def find(tokens: tuple[Token, ...], secret: str) -> Token | None:
    """The token with this secret. Compares with every hash, each in constant time."""
    presented, found = _hash(secret), None
    for token in tokens:
        if hmac.compare_digest(token.sha256, presented):
            found = token
    return found


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
