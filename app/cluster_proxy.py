"""What stands before the application on a cluster: a middleware of Ray Serve's HTTP proxies, one on each node.

Ray loads it where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH is `app.cluster_proxy:middlewares` when a node is started;
`serve run app.cluster:app` sees to it by itself. A proxy of Ray's alone hands a request to a replica (a process of the
application) as soon as its head is there, and answers 500 when that replica dies over it. This one

- takes the body first, within INTERFLOW_BODY_TIMEOUT_S and INTERFLOW_MAX_TOTAL_BYTES, so that a slow client holds no
  place at a replica;
- asks another replica when one died before it answered: every route may be asked twice;
- puts what the proxy itself has to say (no replica, too many requests) in the form of all our errors, and names one
  request id in it, in the answer and in the replica's log.

It takes every application of the cluster for ours. Behind HAProxy it stands in each replica, and HAProxy asks another.

What remains otherwise than with `python -m app`, whose own HTTP protocol is not here: heads are limited neither in
bytes nor in time, nor is a client cut off that does not read its answer; `Expect: 100-continue` is answered with 100
even where the body is refused in the end; the time that a request waits in the proxy does not count for its deadline.
"""

import asyncio
import logging

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.bodies import BodyBudget, HeldBody
from app.errors import BodyBudgetError, SlowBodyError, problem, problem_of
from app.middleware import REQUEST_ID_HEADER, sane_id
from app.settings import Settings, load_settings
from app.upload import FRAMING_BYTES

TRIES = 3
"""Of one request: one that kills every replica it meets must not meet all of them."""
PAUSE_S = 0.1
"""Before another try: the proxy may not know yet which replica is gone."""

_ID = REQUEST_ID_HEADER.lower().encode()
_OWN = {
    404: (404, "not_found", "no application of this cluster serves this path; /-/routes lists those there are."),
    408: (504, "deadline_passed", "the request took longer than `request_timeout_s` of the HTTP options allows."),
    429: (429, "queue_full", "all replicas are busy, and as many requests wait as may. Come again in a second."),
    503: (503, "not_ready", "no replica of the application can take requests now. Come again in a second."),
}
"""For the statuses that Ray's proxy answers with by itself, as text; ours of these statuses never are text."""

logger = logging.getLogger(__name__)


def middlewares() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH.

    Raises:
        SettingsError: a bad INTERFLOW_* variable in the environment that the node was started in.
    """
    return [Middleware(InFront, settings=load_settings())]


class InFront:
    """Takes a request whole, hands it on until a replica has answered it, and says what the proxy says in our form.

    Args:
        app: Ray's proxy.
        settings: limits on bodies; of the node's environment, since the application's own are not known here.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._limit_s = settings.body_timeout_s
        self._bodies = BodyBudget(settings.max_total_bytes)
        # the largest that any route takes; whatever is larger goes through as it comes, and is refused there
        self._most = FRAMING_BYTES + max(settings.max_bytes, settings.max_batch_bytes, settings.max_tensor_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI scope; all but HTTP, and Ray's own routes, pass through."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self.app(scope, receive, send)
            return
        identity = sane_id(scope)
        headers = [(name, value) for name, value in scope["headers"] if name != _ID]
        scope = {**scope, "headers": [*headers, (_ID, identity.encode())]}
        request = Request({**scope, "state": {"request_id": identity}})
        held = HeldBody(self._bodies)
        client = _Client(receive)
        try:
            whole = await self._take(request, client, held)
            if not client.gone:
                await self._ask(scope, request, client, send, tries=TRIES if whole else 1)
        except (SlowBodyError, BodyBudgetError) as error:
            said = problem_of(request, error)
            answer = problem(
                request, said.status, said.code, said.detail, {**error.headers, REQUEST_ID_HEADER: identity}
            )
            await answer(scope, receive, send)
        finally:
            held.release()

    async def _take(self, request: Request, client: "_Client", held: HeldBody) -> bool:
        """Take the request's body, unless it is larger than any route takes; whether it is here as a whole.

        Raises:
            SlowBodyError, BodyBudgetError: as their names say.
        """
        declared = request.headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > self._most:
            return False
        pieces: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self._limit_s):
                while more and size <= self._most:
                    message = await client.receive()
                    pieces.append(message.get("body", b""))
                    size, more = size + len(pieces[-1]), message.get("more_body", False)
                    held.grow(len(pieces[-1]))
        except TimeoutError:
            raise SlowBodyError(
                f"the request's body did not arrive within {self._limit_s:g} seconds. Send it faster, or raise "
                "INTERFLOW_BODY_TIMEOUT_S."
            ) from None
        client.taken = {"type": "http.request", "body": b"".join(pieces), "more_body": more}
        return not more

    async def _ask(self, scope: Scope, request: Request, client: "_Client", send: Send, *, tries: int) -> None:
        for attempt in range(tries):
            if attempt:
                logger.warning("request %s: its replica died; asking another.", request.state.request_id)
                await asyncio.sleep(PAUSE_S)
            answer = _Answer(scope, request, send)
            # Ray changes the headers, and pickles the scope: one of its own for each attempt
            await self.app({**scope, "headers": list(scope["headers"])}, client.replay(), answer)
            if answer.begun or client.gone:
                return
        detail = "the replica that was to answer died. Come again in a second."
        headers = {"Retry-After": "1", REQUEST_ID_HEADER: request.state.request_id}
        await problem(request, 503, "replica_lost", detail, headers)(scope, client.receive, send)


class _Client:
    """What comes from the client."""

    def __init__(self, receive: Receive) -> None:
        self.taken: Message | None = None
        """The body, or its beginning, for every attempt."""
        self.gone = False
        """It waits for no answer."""
        self._receive = receive

    async def receive(self) -> Message:
        """The next that comes."""
        message = await self._receive()
        self.gone = self.gone or message["type"] == "http.disconnect"
        return message

    def replay(self) -> Receive:
        """What was taken, and then what comes."""
        taken = [] if self.taken is None else [self.taken]

        async def receive() -> Message:
            return taken.pop() if taken else await self.receive()

        return receive


class _Answer:
    """The `send` of one attempt: holds the head back until the body begins, for a replica may die between them."""

    def __init__(self, scope: Scope, request: Request, send: Send) -> None:
        self.begun = False
        """The client has a part of an answer."""
        self._scope = scope
        self._request = request
        self._send = send
        self._head: Message | None = None
        self._replaced = False

    async def __call__(self, message: Message) -> None:
        """Send one message of the proxy, or what stands for it."""
        if message["type"] == "http.response.start":
            message["headers"] = _with_one_id(message["headers"])
            self._head = message
            return
        if self._replaced:
            return
        if self._head is not None and not self.begun:
            self.begun = True
            own = _OWN.get(self._head["status"]) if _is_text(self._head) else None
            if own is not None:
                self._replaced = True
                kept = {
                    name.decode(): value.decode()
                    for name, value in self._head["headers"]
                    if name in (_ID, b"retry-after")
                }
                answer = problem(self._request, *own, kept)
                await answer(self._scope, _nothing, self._send)
                return
            await self._send(self._head)
        await self._send(message)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _is_text(head: Message) -> bool:
    return any(name.lower() == b"content-type" and value.startswith(b"text/plain") for name, value in head["headers"])


def _with_one_id(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The proxy puts its own request id beside the application's."""
    first = next(((name, value) for name, value in headers if name.lower() == _ID), None)
    others = [(name, value) for name, value in headers if name.lower() != _ID]
    return others if first is None else [*others, first]
