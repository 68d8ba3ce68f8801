"""Refusals keep a pace: clients that ask again at once must not take the CPU from those who are answered."""

import asyncio
import math
import time

PER_S = 250
"""Refusals a second. Beside inference one costs nearly as much as an answer without it."""
LONGEST_S = 2.0
"""A refusal is never held back for longer, but for a tick."""
TICK_S = 0.05
"""Those that wait go together, this often: one at a time, each would wake the server for itself, and cost half as much
again."""


class Pace:
    """Lets so many through in a second, in the order they came, and whoever waited for long enough."""

    def __init__(self) -> None:
        self._next = 0.0

    async def keep(self, deadline: float | None = None) -> None:
        """Wait for one's turn: not at all, unless many others came just before.

        Args:
            deadline: moment of `time.perf_counter` from when on no one listens; one goes a tick before.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        turn = max(now, min(self._next, now + LONGEST_S))
        self._next = turn + 1 / PER_S
        if turn > now:
            wait = math.ceil(turn / TICK_S) * TICK_S - now
            if deadline is not None:
                wait = min(wait, max(0.0, deadline - time.perf_counter() - TICK_S))
            await asyncio.sleep(wait)
