"""Batches across requests: whatever waits when a lane comes free is run together."""

import asyncio
import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from app.cpus import be_nice
from app.errors import DeadlineError, InferenceError, QueueFullError
from app.inference import Inferred, Network

BUSY_WAIT_S = 0.025
"""While other images take all CPUs to be decoded, a batch fills up first, but no longer than this: for so long eight
photographs of a megapixel are decoded by two CPUs that also run them."""

OnBatch = Callable[[int, float], None]
"""Told images and seconds of every batch that succeeded, by the thread that ran it."""


class Batcher:
    """An `Inference` of several lanes: threads that each take what waits, run it and take again.

    An idle lane takes a single image at once. While all are busy the queue grows, and with it the next batch, so that
    batches follow the load by themselves; `wait_us` makes a lane wait for company, which costs the first who came.
    Where lanes share the CPUs with decoders that lag behind, a nice one waits for what they will bring: it would get
    little of a CPU, and use it badly. With 32 clients' photographs of a megapixel on 2 CPUs, batches of 8 rather than 4
    gave 5 to 10 % more requests a second, and the slowest sooner.

    Asked from one event loop. One that nobody refers to any more ends by itself, as `close` would end it.

    Args:
        network: run by several threads at a time.
        lanes: how many.
        helpers: lanes beside these that take only full batches, of `max_batch` images: where so much waits, one lane
            leaves CPUs idle between two batches.
        max_batch: images in one batch; requests of more run as several, side by side.
        small_batch: images that a lane takes where fewer than `max_batch` wait, or one request of more; none: all that
            wait. The rest is there when it comes back, and the event loop has answers to write meanwhile.
        max_queue: images that may wait. A request of more than that is taken when nothing waits.
        wait_us: microseconds that images may wait for others to fill their batch.
        niceness: of the lanes, as `app.cpus.be_nice`.
        on_batch: for metrics.
    """

    def __init__(
        self,
        network: Network,
        *,
        lanes: int = 1,
        helpers: int = 0,
        max_batch: int = 32,
        small_batch: int | None = None,
        max_queue: int = 512,
        wait_us: int = 0,
        niceness: int = 0,
        on_batch: OnBatch | None = None,
    ) -> None:
        self._max_batch = max_batch
        self._max_queue = max_queue
        self._queue = _Queue(
            lanes + helpers, max_batch, small_batch or max_batch, wait_us / 1e6, BUSY_WAIT_S if niceness else 0
        )
        # daemons: a start that fails after this ends the process without `close`
        self._lanes = [
            threading.Thread(
                target=_lane,
                args=(self._queue, network, niceness, on_batch, lane >= lanes),
                name=f"lane-{lane}",
                daemon=True,
            )
            for lane in range(lanes + helpers)
        ]
        weakref.finalize(self, self._queue.close)  # the lanes hold the queue, not this
        for lane in self._lanes:
            lane.start()

    async def infer(
        self,
        images: np.ndarray,
        names: Sequence[str],
        deadline: float | None = None,
        thresholds: Sequence[float] | None = None,
        *,
        more_to_come: bool = False,
    ) -> Inferred:
        """As `Inference.infer`; who is cancelled leaves the queue."""
        self.require_room(len(images))
        loop = asyncio.get_running_loop()
        asked = time.perf_counter()
        parts = [images[start : start + self._max_batch] for start in range(0, len(images), self._max_batch)]
        until = inf if deadline is None else deadline
        asks = [_Ask(part, names, thresholds, loop.create_future(), asked, until, more_to_come) for part in parts]
        timer = None if deadline is None else loop.call_later(deadline - asked, _expire, asks)
        self._queue.put(asks)
        try:
            if len(asks) == 1:
                return await asks[0].answer
            return _joined(await asyncio.gather(*(ask.answer for ask in asks)))
        finally:
            if timer is not None:
                timer.cancel()
            self._queue.withdraw(asks)

    def require_room(self, images: int = 1) -> None:
        """As `Inference.require_room`."""
        if self.queued and self.queued + images > self._max_queue:
            raise QueueFullError(
                f"{self.queued} images wait for the network, which with these {images} were more than the "
                f"{self._max_queue} that may. Come again in a second, or raise INTERFLOW_MAX_QUEUE."
            )

    @property
    def queued(self) -> int:
        """As `Inference.queued`."""
        return self._queue.images

    def close(self) -> None:
        """As `Inference.close`."""
        self._queue.close()
        for lane in self._lanes:
            lane.join()


@dataclass(slots=True, eq=False)
class _Ask:
    """Images that run in one batch: those of a request, or a part of them."""

    images: np.ndarray
    names: Sequence[str]
    thresholds: Sequence[float] | None
    answer: asyncio.Future[Inferred]
    asked: float
    deadline: float
    more_to_come: bool
    waits: bool = True
    alone: bool = False
    """Nothing waited or ran when it came; or it fills a batch of the only lane by itself, so that the event loop has
    little to do meanwhile, with few requests for many images (1 to 3 % more binary tensors)."""


class _Queue:
    """What waits, in the order of arrival; the event loop puts, lanes take."""

    def __init__(self, lanes: int, max_batch: int, small_batch: int, wait_s: float, busy_wait_s: float) -> None:
        self.images = 0
        self._lanes = self._busy_lanes = lanes
        self._asks: deque[_Ask] = deque()
        self._max_batch = max_batch
        self._small_batch = small_batch
        self._wait_s = wait_s
        self._busy_wait_s = max(wait_s, busy_wait_s)
        self._closed = False
        lock = threading.Lock()
        self._changed, self._full = threading.Condition(lock), threading.Condition(lock)

    def put(self, asks: Sequence[_Ask]) -> None:
        with self._changed:
            if self._closed:
                raise InferenceError("the network was closed.")
            idle = len(asks) == 1 and not (self._asks or self._busy_lanes)
            for ask in asks:
                full = self._lanes == 1 and len(ask.images) == self._max_batch > 1
                ask.alone = (idle or full) and not ask.more_to_come
            self._asks.extend(asks)
            self.images += sum(len(ask.images) for ask in asks)
            self._changed.notify(len(asks))
            if self.images >= self._max_batch:
                self._full.notify()

    def withdraw(self, asks: Sequence[_Ask]) -> None:
        """Take out those that still wait."""
        if any(ask.waits for ask in asks):
            with self._changed:
                for ask in asks:
                    if ask.waits:
                        self._asks.remove(ask)
                        self._leave(ask)

    def take(self, only_full: bool) -> list[_Ask]:
        """The next batch, as soon as there is one; empty once closed and worked off."""
        changed, least = (self._full, self._max_batch) if only_full else (self._changed, 1)
        with changed:
            while True:
                while self.images < least or not self._asks:
                    if self._closed:
                        return []
                    self._busy_lanes -= 1
                    changed.wait()
                    self._busy_lanes += 1
                self._wait_for_company()
                if batch := self._next_batch():
                    return batch

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._full.notify_all()

    def _wait_for_company(self) -> None:
        while self._asks and not self._closed:
            if self._asks[-1].more_to_come:
                wait_s, enough = self._busy_wait_s, self._small_batch
            else:
                wait_s, enough = self._wait_s, self._max_batch
            if self.images >= enough:
                return
            left_s = wait_s and self._asks[0].asked + wait_s - time.perf_counter()
            if left_s <= 0:
                return
            self._changed.wait(left_s)

    def _next_batch(self) -> list[_Ask]:
        batch: list[_Ask] = []
        images, now = 0, time.perf_counter()
        most = self._max_batch if self.images >= self._max_batch else self._small_batch
        while self._asks:
            ask = self._asks[0]
            if batch and (
                images + len(ask.images) > most
                or ask.images.shape[1:] != batch[0].images.shape[1:]  # of a wrong shape: let it fail alone
            ):
                break
            self._leave(self._asks.popleft())
            if not ask.answer.done() and now < ask.deadline:  # else its timer answers, or has answered
                batch.append(ask)
                images += len(ask.images)
        return batch

    def _leave(self, ask: _Ask) -> None:
        ask.waits = False
        self.images -= len(ask.images)


def _lane(queue: _Queue, network: Network, niceness: int, on_batch: OnBatch | None, only_full: bool) -> None:
    be_nice(niceness)
    while taken := queue.take(only_full):
        for batch in _alike(taken):
            try:
                result: list[Inferred] | Exception = _run(batch, network, on_batch)
            except Exception as error:  # whatever it is, it is this batch's, and the lane goes on
                result = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                batch[0].answer.get_loop().call_soon_threadsafe(_settle, batch, result)
        del taken, batch, result  # or the last images would stay in memory until the next came


def _alike(batch: Sequence[_Ask]) -> Iterator[list[_Ask]]:
    """Those that may not stop early, for which the network runs whole, and those that may, for which in pieces."""
    for adaptive in (False, True):
        if alike := [ask for ask in batch if (ask.thresholds is not None) is adaptive]:
            yield alike


def _run(batch: Sequence[_Ask], network: Network, on_batch: OnBatch | None) -> list[Inferred]:
    """One forward pass for all, of all outputs that any of them wants; then to each its own."""
    images = batch[0].images if len(batch) == 1 else np.concatenate([ask.images for ask in batch])
    names = list(dict.fromkeys(name for ask in batch for name in ask.names))
    started = time.perf_counter()
    outputs = network.run(images, names, _thresholds(batch), alone=len(batch) == 1 and batch[0].alone)
    seconds = time.perf_counter() - started
    if on_batch is not None:
        on_batch(len(images), seconds)
    answers = []
    start = 0
    for ask in batch:
        end = start + len(ask.images)
        own = {name: outputs[name][start:end] for name in ask.names}
        answers.append(Inferred(own, 1e3 * (started - ask.asked), 1e3 * seconds, len(images)))
        start = end
    return answers


def _thresholds(batch: Sequence[_Ask]) -> np.ndarray | None:
    """Of each image of a batch, (N, B - 1)."""
    of_images = [[ask.thresholds] * len(ask.images) for ask in batch if ask.thresholds is not None]
    return np.concatenate(of_images) if of_images else None


def _settle(batch: Sequence[_Ask], result: Sequence[Inferred] | Exception) -> None:
    """In the event loop: wake those who wait."""
    for index, ask in enumerate(batch):
        if ask.answer.done():  # cancelled or expired while it ran
            continue
        if isinstance(result, Exception):
            ask.answer.set_exception(result)
        else:
            ask.answer.set_result(result[index])


def _expire(asks: Sequence[_Ask]) -> None:
    for ask in asks:
        if not ask.answer.done():
            ask.answer.set_exception(DeadlineError())


def _joined(parts: Sequence[Inferred]) -> Inferred:
    """The answer to a request that was run in parts: what was not the longest inference of them, it waited."""
    inference_ms = max(part.inference_ms for part in parts)
    return Inferred(
        {name: np.concatenate([part.outputs[name] for part in parts]) for name in parts[0].outputs},
        max(part.queue_ms + part.inference_ms for part in parts) - inference_ms,
        inference_ms,
        max(part.batch for part in parts),
    )
