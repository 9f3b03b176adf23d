"""Who may open the page of a server that needs tokens: a form that takes a token, and a cookie that stands for it.

The cookie is a random number that only this server knows. It is kept from scripts (HttpOnly) and is sent by this site's
pages alone (SameSite=Strict). The token stays on the server, and is looked up anew for each request, so that one that
was taken out of the file of tokens is of no use at once.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from html import escape
from typing import Any, Final
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from runtime.errors import EnginecastError, InvalidInput, Unauthenticated
from serving.dialects.http.pages import App, Receive, Send, bounded
from serving.page.guard import whole
from serving.security.gate import Gate

COOKIE: Final = "enginecast_page"
AUTHORIZATION: Final = b"authorization"
SECONDS: Final = 12 * 3600
"""How long one stays logged in."""
MOST: Final = 1000
"""People who are logged in at once; then the oldest are forgotten."""
LONGEST: Final = 500
"""Characters of a token that are read."""
HEADERS: Final = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; "
    "frame-ancestors 'none'",
    "referrer-policy": "same-origin",
}
FORM_BYTES: Final = 4096
FORM: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>enginecast</title><link rel="icon" href="data:,"><style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif; }}
body {{ display: grid; place-items: center; min-height: 90vh; margin: 0; }}
form {{ display: grid; gap: 0.8rem; width: min(22rem, 85vw); }}
h1 {{ font-size: 1.3rem; margin: 0; }}
input, button {{ font: inherit; padding: 0.6rem; border-radius: 0.4rem; border: 1px solid #94a3b8; }}
button {{ background: #0d9488; color: white; border: none; }}
p {{ color: light-dark(#b91c1c, #fca5a5); margin: 0; }}
</style></head><body><form method="post" action="{action}"><h1>enginecast</h1>
<label for="token">Token of this server</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button>Open the page</button>{said}</form></body></html>
"""


class Login:
    """An ASGI application in front of the page at `prefix`: who is logged in passes with the token as a header, which
    no browser sends by itself; others get the form.
    """

    def __init__(self, app: App, prefix: str, gate: Gate) -> None:
        self._app, self._prefix, self._gate = app, prefix, gate
        self._known: OrderedDict[str, tuple[str, float]] = OrderedDict()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        path, post = scope["path"].removeprefix(self._prefix), scope.get("method") == "POST"
        if scope["type"] != "http":
            await self._app(scope, receive, send)  # which refuses it
        elif path == "/login":
            await (await self._login(scope, receive) if post else self._form(""))(scope, receive, send)
        elif path == "/logout" and post:
            self._known.pop(_cookie(scope), None)
            await self._with_cookie(self._to("/login"), "", 0, scope)(scope, receive, send)
        elif (authorization := self._authorization(scope)) is not None:
            others = [(name, value) for name, value in scope["headers"] if name != AUTHORIZATION]
            await self._app({**scope, "headers": [*others, (AUTHORIZATION, authorization.encode())]}, receive, send)
        else:
            text = "you are not logged in: open the page again"
            answer = self._to("/login") if path == "/" else JSONResponse({"detail": text, "error": text}, 401)
            await answer(scope, receive, send)

    def _authorization(self, scope: Any) -> str | None:
        """The header that stands for the cookie of a request, None without one that is good."""
        authorization, since = self._known.get(_cookie(scope), ("", 0.0))
        if time.monotonic() - since > SECONDS:
            return None
        try:
            self._gate.known(authorization)
        except Unauthenticated:
            return None
        return authorization

    async def _login(self, scope: Any, receive: Receive) -> Response:
        try:
            authorization = f"Bearer {_token(await whole(bounded(receive, FORM_BYTES)))}"
            self._gate.known(authorization)
        except EnginecastError as error:
            return self._form(str(error), 401 if isinstance(error, Unauthenticated) else 400)
        name = secrets.token_urlsafe(32)
        self._known[name] = authorization, time.monotonic()
        while len(self._known) > MOST:
            self._known.popitem(last=False)
        return self._with_cookie(self._to("/"), name, SECONDS, scope)

    def _form(self, said: str, status: int = 200) -> Response:
        line = f'<p role="alert">{escape(said)}</p>' if said else ""
        return HTMLResponse(FORM.format(action=f"{self._prefix}/login", said=line), status, HEADERS)

    def _with_cookie(self, response: Response, value: str, seconds: int, scope: Any) -> Response:
        secure = scope["scheme"] == "https"
        response.set_cookie(COOKIE, value, seconds, path=self._prefix, secure=secure, httponly=True, samesite="strict")
        return response

    def _to(self, path: str) -> Response:
        return RedirectResponse(f"{self._prefix}{path}", 303, HEADERS)


def _token(body: bytes) -> str:
    """The token of a form. Raises InvalidInput."""
    try:
        found = parse_qs(body.decode("ascii"), max_num_fields=5).get("token", [""])[0].strip()
    except ValueError:
        raise InvalidInput("token", "is no form: send one token") from None
    if not found.isascii() or not found.isprintable() or len(found) > LONGEST:
        raise InvalidInput("token", "is none: it has letters, digits, _ and - alone")
    return found


def _cookie(scope: Any) -> str:
    """The value of our cookie, "" without one. Cookies of other programs of this host may have any form: reading stops
    at none of them.
    """
    pairs = (pair.partition("=") for header in Headers(scope=scope).getlist("cookie") for pair in header.split(";"))
    return next((value.strip() for name, _, value in pairs if name.strip() == COOKIE), "")
