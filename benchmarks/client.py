"""A client that asks over many connections and holds every answer against what it must be.

For load alone there is wrk; this one is for the questions that wrk cannot answer: whether each answer is right, and
whether each request that a server accepted was answered.
"""

import asyncio
import http.client
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.servers import HOST
from benchmarks.wrk import BOUNDARY

ANSWER_S = 60
FORM = f"Content-Type: multipart/form-data; boundary={BOUNDARY}"
Check = Callable[[int, bytes], str | None]
"""Of an image's number and an answer's body: what is wrong with it."""


@dataclass
class Tally:
    """What came of the requests so far.

    Attributes:
        statuses: answers by status.
        latencies_ms: of the answers with status 200.
        lost: why a request that was sent had no answer, and why a connection could not be had, one entry each.
        wrong: what was wrong with answers of status 200, one entry each.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def answered(self) -> int:
        """Answers of any status."""
        return self.statuses.total()


class Client:
    """Posts bodies in turn to one path, until it is told to stop.

    Args:
        port: of the server.
        path: that is asked.
        bodies: forms with one image each, unless the headers say otherwise.
        check: holds an answer of status 200 against its image.
        headers: lines that describe the bodies.
    """

    def __init__(
        self, port: int, path: str, bodies: Sequence[bytes], check: Check, headers: Sequence[str] = (FORM,)
    ) -> None:
        self.tally = Tally()
        self.stopping = False
        """Set it to let every connection end after the answer that it waits for."""
        self.may_be_refused = False
        """Set it where the server is told to end: a connection that cannot be had then counts as no loss."""
        self._port = port
        self._requests = [_request(port, path, body, headers) for body in bodies]
        self._check = check
        self._turn = 0

    async def keep_asking(self, connections: int, pause_s: float = 0) -> None:
        """Ask over so many connections at a time, each again `pause_s` after it had its answer."""
        await asyncio.gather(*(self._keep_connected(pause_s) for _ in range(connections)))

    async def _keep_connected(self, pause_s: float) -> None:
        while not self.stopping:
            try:
                reader, writer = await asyncio.open_connection(HOST, self._port)
            except OSError as error:
                if not self.may_be_refused:
                    self.tally.lost.append(f"no connection: {error}")
                return
            try:
                while not self.stopping and await self._ask(reader, writer):
                    await asyncio.sleep(pause_s)
            finally:
                writer.close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Send a request and wait for its answer; whether the connection can be used again."""
        number = self._turn = (self._turn + 1) % len(self._requests)
        asked = time.perf_counter()
        try:
            writer.write(self._requests[number])
            async with asyncio.timeout(ANSWER_S):
                head = await reader.readuntil(b"\r\n\r\n")
                headers = head.lower()
                body = await reader.readexactly(int(headers.partition(b"\r\ncontent-length:")[2].split(b"\r\n", 1)[0]))
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            self.tally.lost.append(f"no answer: {type(error).__name__} {error}".strip())
            return False
        status = int(head[9:12])
        self.tally.statuses[status] += 1
        if status == http.client.OK:
            self.tally.latencies_ms.append(1e3 * (time.perf_counter() - asked))
            if (problem := self._check(number, body)) is not None:
                self.tally.wrong.append(problem)
        return b"connection: close" not in headers


def _request(port: int, path: str, body: bytes, headers: Sequence[str]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {HOST}:{port}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body
