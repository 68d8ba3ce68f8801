"""The bodies of requests: read while they stream in, within one request's limit, and counted together with all others.

`app.middleware.BodyMiddleware` counts whatever a request receives, and gives it back when the request has ended.
"""

from fastapi import Request
from starlette.requests import ClientDisconnect

from app.errors import BodyBudgetError, TooManyBytesError

FREE_BYTES = 64 * 1024
"""Of every body, not counted: so much its connection alone may hold, and small images always get through."""


class BodyBudget:
    """How many bytes the bodies of all requests may hold together.

    Args:
        most: bytes.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        """Bytes that count now."""


class HeldBody:
    """What one request holds of a budget: the pieces that came, and then their whole, until the request has ended."""

    __slots__ = ("_budget", "_bytes", "_counted")

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._bytes = self._counted = 0

    def grow(self, count: int) -> None:
        """Hold so many bytes more, or fewer.

        Raises:
            BodyBudgetError: all together would hold too many; what this one held is given back, and must be dropped.
        """
        self._bytes += count
        counted = max(0, self._bytes - FREE_BYTES)
        held = self._budget.held - self._counted + counted
        if held > self._budget.most:
            self.release()
            raise BodyBudgetError(
                f"the bodies of all requests together would hold more than {self._budget.most} bytes, the limit. Come "
                "again in a second, or raise INTERFLOW_MAX_TOTAL_BYTES."
            )
        self._budget.held, self._counted = held, counted

    def release(self) -> None:
        """Hold nothing any more."""
        self._budget.held -= self._counted
        self._bytes = self._counted = 0


async def read_body(request: Request, limit: int, too_many: TooManyBytesError) -> bytes:
    """The whole body of a request.

    Args:
        request: its body not read yet.
        limit: bytes allowed.
        too_many: raised by the Content-Length, or as soon as the bytes that came exceed the limit.

    Raises:
        ClientDisconnect: the client went away before the end.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_many
    body = bytearray()
    try:
        while True:  # `request.stream` costs a request of one piece ten times as much
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            piece: bytes = message.get("body", b"")
            if len(body) + len(piece) > limit:
                raise too_many
            more = message.get("more_body", False)
            if not more and not body:
                return piece
            body += piece
            if not more:
                return bytes(body)
    finally:
        body.clear()  # an error holds on to this frame for as long as it is answered
