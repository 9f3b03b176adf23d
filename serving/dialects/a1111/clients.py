"""Who a call is from, so that a client sees and stops its own jobs only, and what it has set.

Clients of the web UI name no user. Where the server has tokens, a client is the token of its calls. Elsewhere it is a
cookie, which every response sets for clients that send none: browsers and sessions of Python's requests send it back.
Calls without both are of nobody.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import Depends
from starlette.requests import HTTPConnection
from starlette.responses import Response

from runtime import limits
from runtime.errors import InvalidInput
from serving.dialects.a1111.fields import Options
from serving.host.observing import current_client

COOKIE: Final = "enginecast"
BYTES: Final = 16


@dataclass(frozen=True)
class Client:
    """Who a call is from: the name of its `token`, or its `cookie`; each is empty where there is none. `new` is whether
    the cookie is one that the response only sets.
    """

    token: str
    cookie: str = ""
    new: bool = False

    @property
    def known(self) -> bool:
        """Whether other calls can be told to be of this client."""
        return bool(self.token or self.cookie) and not self.new

    @property
    def key(self) -> tuple[str, str]:
        """What is equal in all calls of this client from now on."""
        return self.token, self.cookie


def sender(connection: HTTPConnection) -> Client:
    """Who an HTTP request or a WebSocket is from."""
    if connection.app.state.gate.closed:
        return Client(current_client())
    cookie = connection.cookies.get(COOKIE, "")[: limits.JOB_ID.most]
    return Client("", cookie) if cookie else Client("", secrets.token_urlsafe(BYTES), new=True)


def _sender(connection: HTTPConnection, response: Response) -> Client:
    client = sender(connection)
    if client.new:
        response.set_cookie(COOKIE, client.cookie, httponly=True, samesite="lax")
    return client


Sender = Annotated[Client, Depends(_sender)]
"""A parameter of an endpoint: who calls. The response sets the cookie."""


class Settings:
    """What clients have set, of the last ones that did."""

    def __init__(self) -> None:
        self._options: OrderedDict[tuple[str, str], Options] = OrderedDict()

    def of(self, client: Client) -> Options:
        """The options of a client."""
        return self._options.get(client.key, Options())

    def change(self, client: Client, options: Options) -> None:
        """Set those options that are given. Raises InvalidInput for a client that cannot be told from others."""
        if not client.known:
            raise InvalidInput(
                "options", "are kept for each client, and this one sent no cookie and no token: send back the cookie "
                "of an earlier response, or send override_settings with each request"
            )  # fmt: skip
        self._options[client.key] = merged(self.of(client), options)
        self._options.move_to_end(client.key)
        while len(self._options) > limits.SESSIONS.most:
            self._options.popitem(last=False)


def merged(options: Options, over: Options) -> Options:
    """Options with those over them that are given."""
    return options.model_copy(update={name: getattr(over, name) for name in over.model_fields_set})
