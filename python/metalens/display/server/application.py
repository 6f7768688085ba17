"""The web application: one page, four jobs, and a guard before all of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from secrets import compare_digest
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metalens.display.server.jobs import BusyError, Job, ModelThread, Work
from metalens.display.server.requests import LARGEST_BODY, Limits, compare_request, follow_request, read_request
from metalens.display.server.work import Session
from metalens.utils.errors import InvalidValueError
from metalens.viewer.page import document, page, policy

HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
JSON_LINES = "application/x-ndjson"


class TooLargeError(InvalidValueError):
    """A request has too many bytes."""


def application(model: ModelThread[Session], title: str, lenses: list[str], limits: Limits, hosts: list[str], key: str) -> ASGIApp:
    """Return the application.

    Args:
        model: the thread with the model.
        title: name of the model, as the page shows it.
        lenses: names of the lenses.
        limits: what a request may ask for.
        hosts: the names and ports, as 'localhost:8000', under which the server may be asked.
        key: the first part of every path. Who does not know it gets no answer.
    """
    shown = page(document([], title, live={"lenses": lenses, "max_tokens": limits.max_tokens, "max_new_tokens": limits.max_new_tokens}))
    headers = {"Content-Security-Policy": f"{policy(live=True)}; frame-ancestors 'none'"}

    async def index(_: Request) -> Response:
        return HTMLResponse(shown, headers=headers)

    def job(parse: Callable[[bytes], Work[Session]]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return PlainTextResponse("Send JSON, with the header Content-Type: application/json.", 415)
            try:
                work = parse(await _body(request))
                return await _stream(await model.start(work))
            except TooLargeError as error:
                return PlainTextResponse(str(error), 413)
            except InvalidValueError as error:
                return PlainTextResponse(str(error), 422)
            except BusyError as error:
                return PlainTextResponse(str(error), 409)
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it

        return answer

    def read(body: bytes) -> Work[Session]:
        asked = read_request(body, limits, generates=False)
        return lambda session: session.read(asked)

    def generate(body: bytes) -> Work[Session]:
        asked = read_request(body, limits, generates=True)
        return lambda session: session.generate(asked)

    def follow(body: bytes) -> Work[Session]:
        asked = follow_request(body)
        return lambda session: session.follow(asked)

    def compare(body: bytes) -> Work[Session]:
        asked = compare_request(body)
        return lambda session: session.compare(asked)

    jobs = {"read": read, "generate": generate, "follow": follow, "compare": compare}
    routes = [Route("/", index), *(Route(f"/api/{name}", job(parse), methods=["POST"]) for name, parse in jobs.items())]
    return Guard(Starlette(routes=[Mount(f"/{key}", routes=routes)]), hosts, key)


async def _body(request: Request) -> bytes:
    """Return the body of a request (TooLargeError before more than LARGEST_BODY bytes are in memory)."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST_BODY:
            raise TooLargeError(f"The request has more than {LARGEST_BODY // 2**20} MiB. Shorten the text.")
        parts.append(part)
    return b"".join(parts)


async def _stream(job: Job[Session]) -> Response:
    """Return the lines of a job as they come. A job that fails at once is an error of the request."""
    lines = job.lines()
    first = await anext(lines)
    if first["type"] == "error":
        await lines.aclose()  # type: ignore[attr-defined]
        return PlainTextResponse(first["message"], 422)

    async def text() -> AsyncIterator[str]:
        try:
            yield _line(first)
            async for line in lines:
                yield _line(line)
        finally:
            job.cancelled.set()

    return StreamingResponse(text(), media_type=JSON_LINES)


def _line(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=True, allow_nan=False, separators=(",", ":")) + "\n"


class Guard:
    """Answers only the browser of this machine, only for its own page, and only who knows its key.

    A page from elsewhere can make a browser send requests here, also under a name that it has pointed at 127.0.0.1. The header Host then has that
    name, and Origin that page. Other users of this machine can send any header, but do not know the key. There is no cookie: a browser would send it
    for every page.

    Args:
        app: the application behind it.
        hosts, key: as in `application`.
    """

    def __init__(self, app: ASGIApp, hosts: list[str], key: str) -> None:
        self.app, self.hosts, self.key = app, frozenset(hosts), key.encode()
        self.origins = frozenset(f"http://{host}" for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on and add the headers that all answers have."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a WebSocket: none is served, and none may come past the key
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((name.lower().encode(), value.encode()) for name, value in HEADERS.items())]
            await send(message)

        refused = self._why_not(Request(scope))
        await (PlainTextResponse(refused, 403) if refused else self.app)(scope, receive, send_with_headers)

    def _why_not(self, request: Request) -> str:
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return f"This server answers at {' and '.join(sorted(self.hosts))} only. Open that address."
        origin = request.headers.get("origin")
        if origin is not None and origin not in self.origins:
            return "This server answers only its own page, and no page from elsewhere."
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and request.method != "GET":
            return "This server answers only its own page, and no page from elsewhere."
        given = request.scope["path"].removeprefix("/").partition("/")[0]
        if not compare_digest(given.encode("utf-8", "replace"), self.key):  # takes as long for a wrong key, whatever of it is right
            return "This address lacks the key of this server. Open the address that `metalens view` printed when it started."
        return ""
