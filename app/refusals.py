"""Refusals keep a pace: clients that ask again at once must not take the CPU from those who are answered."""

import asyncio

PER_S = 500
"""Refusals a second; one costs a sixth of a millisecond here, and as much again in the kernel and at the client."""
LONGEST_S = 1.0
"""A refusal is never held back for longer: what Retry-After asks for in any case."""


class Pace:
    """Lets so many through in a second, one after the other, and whoever waited for long enough."""

    def __init__(self) -> None:
        self._next = 0.0

    async def keep(self) -> None:
        """Wait for one's turn: not at all, unless many others came just before."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        turn = max(now, min(self._next, now + LONGEST_S))
        self._next = turn + 1 / PER_S
        if turn > now:
            await asyncio.sleep(turn - now)
