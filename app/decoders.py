"""Threads that decode images, a bounded number at a time with a bounded number waiting."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar, TypeVarTuple, Unpack

import numpy as np

from app.errors import DeadlineError, QueueFullError
from model.contract import InputSpec
from model.images import read_input, read_small_input

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

INLINE_BYTES, INLINE_PIXELS = 16 * 1024, 128 * 128
"""Up to these an image is decoded in the event loop: in less than half a millisecond, and handing it over would cost
more."""


class _Tiny(NamedTuple):
    """An image that is decoded in the event loop."""

    source: bytes
    spec: InputSpec
    pixels: asyncio.Future[np.ndarray | None]
    """None: it has more pixels than its bytes promised, and is left to the pool."""


class Decoders:
    """A pool of decoding threads; tiny images are decoded without it, in the event loop. Asked from one event loop.

    Args:
        workers: images decoded at a time.
        max_queue: images that may wait for that.
        max_pixels: allowed in one image.
    """

    def __init__(self, workers: int, max_queue: int, max_pixels: int) -> None:
        # not nice, as the lanes are: while images are decoded, those that are wait for each other and run as one batch.
        # With 32 clients' photographs of a megapixel on 2 CPUs that gave 10 to 19 % more requests a second
        self._pool = ThreadPoolExecutor(workers, "decode")
        self._workers = workers
        self._max_queue = max_queue
        self._inside = 0
        self._max_pixels = max_pixels
        self._tiny: list[_Tiny] = []

    async def decode(
        self, source: bytes, spec: InputSpec, deadline: float | None = None, *, inline: bool = True
    ) -> np.ndarray:
        """An encoded image as uint8 (height, width, channels).

        Args:
            source: the image's bytes.
            spec: the network's input.
            deadline: moment of `time.perf_counter`; an image that still waits then is never decoded.
            inline: decode it in the event loop where it is tiny.

        Raises:
            ImageError, ImageTooLargeError: as `model.images.read_input`.
            DeadlineError: as its name says.
        """
        if inline and len(source) <= INLINE_BYTES:
            pixels = await self._decode_soon(source, spec)
            if pixels is not None:
                return pixels
        return await self.run(read_input, source, spec, self._max_pixels, deadline=deadline)

    def _decode_soon(self, source: bytes, spec: InputSpec) -> asyncio.Future[np.ndarray | None]:
        loop = asyncio.get_running_loop()
        if not self._tiny:
            loop.call_soon(self._decode_tiny)
        pixels: asyncio.Future[np.ndarray | None] = loop.create_future()
        self._tiny.append(_Tiny(source, spec, pixels))
        return pixels

    def _decode_tiny(self) -> None:
        """All that came in this round of the event loop, one after the other: among the rest of a request, each would
        have to bring the decoder back into the CPU's caches, which with 32 clients took a tenth of the loop's time."""
        images, self._tiny = self._tiny, []
        for source, spec, pixels in images:
            if pixels.done():  # cancelled
                continue
            try:
                pixels.set_result(read_small_input(source, spec, INLINE_PIXELS, self._max_pixels))
            except Exception as error:  # whatever it is, it is this image's, and the others are decoded
                pixels.set_exception(error)
        del images, source, pixels  # an error holds on to this frame for as long as it is answered

    async def run(
        self,
        function: Callable[[Unpack[Arguments]], Result],
        *arguments: *Arguments,
        deadline: float | None = None,
    ) -> Result:
        """Call a function in the pool; where it still waits at the deadline, it is never called.

        Raises:
            DeadlineError: it did not end in time.
        """
        left_s = None if deadline is None else deadline - time.perf_counter()
        if left_s is not None and left_s <= 0:
            raise DeadlineError
        self._inside += 1
        job = [arguments]  # the pool holds who gave up until a thread comes by, but not the image any more
        del arguments

        def call() -> Result:
            return function(*job.pop())

        try:
            async with asyncio.timeout(left_s):
                return await asyncio.get_running_loop().run_in_executor(self._pool, call)
        except TimeoutError as error:
            raise DeadlineError from error
        finally:
            self._inside -= 1
            job.clear()

    def require_room(self, images: int = 1) -> None:
        """To be asked before so many are decoded; a batch larger than the queue is taken when nothing waits.

        Raises:
            QueueFullError: too many wait already.
        """
        waiting = max(0, self._inside - self._workers)
        if waiting and waiting + images > self._max_queue:
            raise QueueFullError(
                f"{waiting} images wait to be decoded, which with these {images} were more than the {self._max_queue} "
                "that may. Come again in a second, or raise INTERFLOW_MAX_QUEUE."
            )

    @property
    def behind(self) -> bool:
        """Images wait for a thread: all are busy."""
        return self._inside > self._workers

    def close(self) -> None:
        """Finish what was accepted and free the threads; blocks."""
        self._pool.shutdown()
