"""Load by several processes of Python: where wrk is not installed, and one process could not ask fast enough."""

import asyncio
import multiprocessing
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from benchmarks.client import FORM, Client

Measured = tuple[Counter[int], list[float], list[str], float]
"""Answers by status, latencies in milliseconds, what was lost, and the seconds that it took."""


@dataclass(frozen=True)
class Load:
    """What the processes measured together.

    Attributes:
        per_second: good answers.
        p50_ms, p99_ms: of these.
        statuses: answers by status.
        lost: requests without an answer.
    """

    per_second: float
    p50_ms: float
    p99_ms: float
    statuses: dict[int, int]
    lost: int


def load(
    port: int,
    path: str,
    bodies: Sequence[bytes],
    *,
    headers: Sequence[str] = (FORM,),
    processes: int,
    connections: int,
    seconds: float,
) -> Load:
    """Post bodies in turn from so many processes, each with its share of the connections; the answers are not read."""
    share = max(1, connections // processes)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        # each begins once all have been started and have imported what they need
        begin = time.time() + 1 + 0.2 * processes
        client = Client(port, path, bodies, _unread, headers)
        asked = [pool.submit(_ask, client, share, begin, seconds) for _ in range(processes)]
        found = [one.result() for one in asked]
    statuses = sum((one[0] for one in found), Counter())
    latencies = np.concatenate([one[1] for one in found] + [np.array([np.nan])])
    return Load(
        per_second=statuses[200] / max(one[3] for one in found),
        p50_ms=float(np.nanmedian(latencies)),
        p99_ms=float(np.nanpercentile(latencies, 99)),
        statuses=dict(statuses),
        lost=sum(len(one[2]) for one in found),
    )


def _ask(client: Client, connections: int, begin: float, seconds: float) -> Measured:
    return asyncio.run(_keep_asking(client, connections, begin, seconds))


async def _keep_asking(client: Client, connections: int, begin: float, seconds: float) -> Measured:
    await asyncio.sleep(max(0.0, begin - time.time()))
    started = time.perf_counter()
    asking = asyncio.create_task(client.keep_asking(connections))
    await asyncio.wait({asking}, timeout=seconds)
    client.stopping = True
    await asking
    tally = client.tally
    return tally.statuses, tally.latencies_ms, tally.lost, time.perf_counter() - started


def _unread(number: int, body: bytes) -> None:
    """The answers are held against the model's elsewhere."""
