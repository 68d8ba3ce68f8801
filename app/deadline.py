"""How long a request may take: by the server's limit, or less by its own header."""

import time

from fastapi import Request

from app.errors import HeaderError

TIMEOUT_HEADER = "X-Request-Timeout-Ms"


def deadline_of(request: Request) -> float | None:
    """Moment of `time.perf_counter` until when a request that came just now is worth answering; None: any.

    `request.state.deadline` is the same from then on.

    Raises:
        HeaderError: its header is no positive whole number.
    """
    limit_ms = request.app.state.settings.timeout_ms
    given = request.headers.get(TIMEOUT_HEADER)
    if given is not None:
        if not (given.isascii() and given.isdecimal() and len(given) < 10 and int(given) > 0):
            raise HeaderError(
                f"the header {TIMEOUT_HEADER} is {given[:50]!r}; expected milliseconds, as a whole number above 0."
            )
        limit_ms = min(limit_ms or int(given), int(given))
    request.state.deadline = time.perf_counter() + limit_ms / 1e3 if limit_ms else None
    return request.state.deadline
