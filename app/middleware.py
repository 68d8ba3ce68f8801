"""Around every request: its id, its line in the log and its count, its path's prefix, its body's time, and bad luck."""

import asyncio
import logging
import random
import re
import time

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.bodies import HeldBody
from app.errors import DrainingError, SlowBodyError, problem, status_and_code
from app.logs import FIELDS, request_id
from app.metrics import record_request

REQUEST_ID_HEADER = "X-Request-ID"
_HEADER = REQUEST_ID_HEADER.lower().encode()
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
EXPLANATION_HEADERS = tuple(f"X-Interflow-{name}" for name in ("Class", "Versus", "Sum", "Limit"))
"""Of the pictures of /explain."""
NO_ROUTE = "none"
"""Route, in log and metrics, of requests that none took, and of static files."""

logger = logging.getLogger(__name__)
access = logging.getLogger("app.access")


class AccessMiddleware:
    """Counts and logs every request by its route, and sends clients elsewhere while the server drains.

    Expects `gauges` and `draining` in the application's state.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope; all but HTTP passes through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        state = scope["app"].state
        status = 0

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if state.draining:  # a client that keeps its connection would send the next request into the end
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        state.gauges.in_flight += 1
        try:
            await self.app(scope, receive, send_and_see)
        finally:
            state.gauges.in_flight -= 1
            seconds = time.perf_counter() - started
            route = _route(scope)
            record_request(scope["method"], route, status, seconds)
            if access.isEnabledFor(logging.INFO):
                _log(scope, route, status, 1e3 * seconds)


def _route(scope: Scope) -> str:
    """The template of the route that took the request: the label that a million different paths cannot multiply."""
    route = scope.get("route")
    return getattr(route, "path", None) or NO_ROUTE


def _log(scope: Scope, route: str, status: int, ms: float) -> None:
    method, model = scope["method"], scope["state"].get("model")
    fields = {"method": method, "route": route, "status": status, "ms": round(ms, 3)}
    if model:
        fields["model"] = model
    access.info("%s %s %d %.1f ms %s", method, route, status, ms, model or "-", extra={FIELDS: fields})


class RequestIdMiddleware:
    """Takes the client's X-Request-ID if it is sane, or makes one; the answer's header and log lines repeat it.

    Sane: 1 to 128 of letters, digits and `._:/+=@-`, so that an id can forge neither header nor log line.
    Also the last resort for errors that nobody expected.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope; all but HTTP passes through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        identity = sane_id(scope)
        scope.setdefault("state", {})["request_id"] = identity
        request_id.set(identity)  # uvicorn gives every request a context of its own
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"].append((_HEADER, identity.encode()))
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            if started or not scope["app"].state.draining:
                raise
            # the time that the end gives is over, and uvicorn cancels what is left
            detail = "the server ends, and this would have taken longer than it may. Ask another one."
            await problem(Request(scope), *status_and_code(DrainingError()), detail)(scope, receive, send_with_id)
        except Exception:
            if started:  # too late for another answer: the server closes the connection
                raise
            logger.exception("request %s failed", identity)
            detail = "the server failed; its log has the reason under the request id."
            await problem(Request(scope), 500, "internal_error", detail)(scope, receive, send_with_id)


def sane_id(scope: Scope) -> str:
    """The client's request id if it is sane, or a new one."""
    given = next((value for name, value in scope["headers"] if name == _HEADER), b"").decode("latin-1")
    # unique, but no secret: asking the kernel for one took 4 % of the event loop's time
    return given if _SANE_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


class RootPathMiddleware:
    """Serves under INTERFLOW_ROOT_PATH, whether the proxy in front cuts that prefix off or leaves it on."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope; all but HTTP passes through."""
        if scope["type"] == "http" and (prefix := scope["app"].state.settings.root_path):
            scope["root_path"] = prefix
            if scope["path"] == prefix:  # the page's addresses are relative to the slash
                await RedirectResponse(f"{prefix}/")(scope, receive, send)
                return
            if not scope["path"].startswith(f"{prefix}/"):
                scope["path"] = prefix + scope["path"]  # ASGI's form
        await self.app(scope, receive, send)


class CorsMiddleware:
    """Starlette's, by INTERFLOW_CORS_ORIGINS, which is read only when the server starts."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._cors: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope; all but HTTP passes through."""
        if self._cors is None and scope["type"] == "http":
            origins = [origin.strip() for origin in scope["app"].state.settings.cors_origins.split(",")]
            self._cors = (
                self.app
                if origins == [""]
                else CORSMiddleware(
                    self.app,
                    allow_origins=origins,
                    allow_methods=["GET", "POST"],
                    allow_headers=["*"],
                    expose_headers=[REQUEST_ID_HEADER, "Retry-After", *EXPLANATION_HEADERS],
                )
            )
        await (self._cors or self.app)(scope, receive, send)


class BodyMiddleware:
    """Gives up on a body that has not arrived after INTERFLOW_BODY_TIMEOUT_S: a slow sender must not hold a place.

    It looks whenever a piece of the body comes; where none does, `app.server.Protocol` hands over an empty one then. A
    timer for each request would cost more than the rest of this.

    Counts what came, too, until the request has ended in whatever way; `request.state.held_body` is the count. Expects
    `bodies` in the application's state.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope; all but HTTP passes through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope["app"].state
        limit_s = state.settings.body_timeout_s
        deadline = time.monotonic() + limit_s
        held = scope["state"]["held_body"] = HeldBody(state.bodies)

        async def receive_in_time() -> Message:
            message = await receive()
            held.grow(len(message.get("body", b"")))
            if message.get("more_body") and time.monotonic() > deadline:
                raise SlowBodyError(
                    f"the request's body did not arrive within {limit_s:g} seconds. Send it faster, or raise "
                    "INTERFLOW_BODY_TIMEOUT_S."
                )
            return message

        try:
            await self.app(scope, receive_in_time, send)
        finally:
            held.release()


class HeadMiddleware:
    """Answers HEAD as GET without the body: load balancers and monitors ask `/healthz` so."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope; all but HEAD passes through."""
        if scope.get("method") != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_no_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        as_get = {**scope, "method": "GET"}
        try:
            await self.app(as_get, receive, send_no_body)
        finally:
            scope["route"] = as_get.get("route")  # for log and metrics, which keep the method that was asked
