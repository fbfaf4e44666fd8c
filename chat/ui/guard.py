"""Who may ask: only this page's own origin, only this machine's own names, and each person only for themselves."""

import secrets
from collections.abc import Sequence
from typing import Any, Literal

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse

Mode = Literal["desktop", "shared", "space"]
VISITOR = "chat-visitor"
LOCAL = ("localhost", "127.0.0.1", "[::1]")
CSP = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors {frames}"
)


def user_of(request: Request) -> str | None:
    """The name that Gradio's own sign-in gave this browser."""
    app = request.app
    tokens = (request.cookies.get(f"access-token{kind}-{app.cookie_id}") for kind in ("", "-unsecure"))
    return next((app.tokens[token] for token in tokens if token in app.tokens), None)


class Guard:
    """Around everything the server says: only this page's own origin, only this machine's own names, a cookie per visitor."""

    def __init__(self, app: Any, mode: Mode, local: bool, visitors: bool, names: Sequence[str] = ()) -> None:
        """`names` are this server's own beyond the one it is asked by: a Space stands behind a proxy."""
        self._app, self._local, self._visitors, self._names = app, local, visitors, names
        kind = "; Secure; SameSite=None; Partitioned" if mode == "space" else "; SameSite=Lax; Max-Age=31536000"
        self._cookie = f"; Path=/; HttpOnly{kind}"
        frames = "'self' https://huggingface.co https://*.hf.space" if mode == "space" else "'self'"
        self._headers = {
            "content-security-policy": CSP.format(frames=frames),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        host = request.headers.get("host", "")
        origin = request.headers.get("origin")
        if self._local and host.rpartition(":")[0] not in LOCAL and host not in LOCAL:
            await PlainTextResponse("This address is not the program's own.", 421)(scope, receive, send)
            return
        if origin and scope["path"].startswith("/chat/") and origin.partition("://")[2] not in (host, *self._names):
            await PlainTextResponse("Other pages may not ask.", 403)(scope, receive, send)
            return

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers[name] = value
                is_page = "text/html" in headers.get("content-type", "")
                if self._visitors and is_page and VISITOR not in request.cookies:
                    headers.append("set-cookie", f"{VISITOR}={secrets.token_urlsafe(24)}{self._cookie}")
            await send(message)

        await self._app(scope, receive, sending)
