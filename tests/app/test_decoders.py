"""Images are decoded a bounded number at a time, tiny ones at once; who is late or gone is not decoded at all."""

import asyncio
import gc
import io
import threading
import time
import weakref

import numpy as np
import pytest
from PIL import Image

from app import decoders as module
from app.decoders import Decoders
from app.errors import DeadlineError, QueueFullError
from model.contract import InputSpec
from model.images import ImageError, ImageTooLargeError, read_input

SPEC = InputSpec(height=8, width=8, channels=3, mean=(0,) * 3, std=(1,) * 3, resize="crop")


def png(side):
    with io.BytesIO() as file:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(file, "PNG")
        return file.getvalue()


@pytest.fixture
def decoders():
    made = Decoders(workers=2, max_queue=3, max_pixels=1_000_000)
    yield made
    made.close()


class Gate:
    """Work that waits for the gate, and is counted."""

    def __init__(self):
        self.gate, self.began = threading.Event(), []

    def work(self, value):
        self.began.append(value)
        assert self.gate.wait(30)
        return value


async def settle():
    for _ in range(3):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("side", "inline", "threads"), [(20, True, "MainThread"), (20, False, "decode"), (300, True, "decode")]
)
def test_only_tiny_images_are_decoded_in_the_event_loop(decoders, monkeypatch, side, inline, threads):
    """And all of them to the same pixels."""
    content = png(side)
    expected = read_input(content, SPEC)
    ran = []
    load = Image.Image.load

    def look(self):
        ran.append(threading.current_thread().name)
        return load(self)

    monkeypatch.setattr(Image.Image, "load", look)
    pixels = asyncio.run(decoders.decode(content, SPEC, inline=inline))
    assert {name.partition("_")[0] for name in ran} == {threads}
    np.testing.assert_array_equal(pixels, expected)


def test_a_small_file_of_many_pixels_is_not_tiny(decoders, monkeypatch):
    with io.BytesIO() as file:
        Image.new("1", (900, 900)).save(file, "PNG")
        content = file.getvalue()
    assert len(content) < module.INLINE_BYTES
    threads = []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda self: threads.append(threading.current_thread().name) or load(self))
    assert asyncio.run(decoders.decode(content, SPEC)).shape == (8, 8, 3)
    assert {name.partition("_")[0] for name in threads} == {"decode"}


@pytest.mark.parametrize("inline", [True, False])
def test_the_pixel_limit_holds_wherever_it_is_decoded(inline):
    decoders = Decoders(1, 1, max_pixels=100)
    with pytest.raises(ImageTooLargeError):
        asyncio.run(decoders.decode(png(20), SPEC, inline=inline))
    decoders.close()


def test_tiny_images_that_come_together_are_decoded_together(decoders, monkeypatch):
    """In one round of the event loop; what is wrong with one, or who gave up, is nothing to the others."""
    rounds, decoded = [], []
    tiny_input = module.read_small_input
    monkeypatch.setattr(module, "read_small_input", lambda *image: decoded.append(rounds[-1]) or tiny_input(*image))

    async def count():
        while True:
            rounds.append(len(rounds))
            await asyncio.sleep(0)

    async def scenario():
        counting = asyncio.create_task(count())
        sources = [png(9), b"no image", png(10), png(11)]
        tasks = [asyncio.create_task(decoders.decode(source, SPEC)) for source in sources]
        await asyncio.sleep(0)
        tasks[2].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        again = await decoders.decode(png(10), SPEC)
        counting.cancel()
        return [*found, again]

    one, broken, cancelled, another, again = asyncio.run(scenario())
    assert isinstance(broken, ImageError)
    assert isinstance(cancelled, asyncio.CancelledError)
    for side, pixels in ((9, one), (11, another), (10, again)):
        np.testing.assert_array_equal(pixels, read_input(png(side), SPEC))
    assert len(decoded) == 4
    assert len(set(decoded[:3])) == 1


def test_an_image_that_cannot_be_read_is_not_kept(decoders):
    """By a reference cycle of its error, which the garbage collector would look for after thousands of requests."""

    async def scenario():
        try:
            await decoders.decode(b"no image", SPEC)
        except ImageError as error:
            return weakref.ref(error)

    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(scenario())() is None
    finally:
        gc.enable()


def test_no_more_at_a_time_than_workers_and_no_more_waiting_than_may(decoders):
    gate = Gate()

    async def scenario():
        tasks = [asyncio.create_task(decoders.run(gate.work, value)) for value in range(2)]
        await settle()
        decoders.require_room(100)  # nothing waits
        assert not decoders.behind
        tasks += [asyncio.create_task(decoders.run(gate.work, value)) for value in (2, 3)]
        await settle()
        decoders.require_room(1)
        assert decoders.behind
        with pytest.raises(QueueFullError, match="2 images wait to be decoded"):
            decoders.require_room(2)
        assert sorted(gate.began) == [0, 1]
        gate.gate.set()
        assert await asyncio.gather(*tasks) == [0, 1, 2, 3]
        decoders.require_room(100)

    asyncio.run(scenario())


def test_who_is_late_or_cancelled_is_never_decoded(decoders):
    gate = Gate()

    async def scenario():
        tasks = [asyncio.create_task(decoders.run(gate.work, value)) for value in range(2)]
        await settle()
        cancelled = asyncio.create_task(decoders.run(gate.work, "cancelled"))
        late = decoders.run(gate.work, "late", deadline=time.perf_counter() + 0.01)
        with pytest.raises(DeadlineError):  # while both workers still stand at the gate
            await late
        cancelled.cancel()
        await settle()
        gate.gate.set()
        await asyncio.gather(*tasks)
        with pytest.raises(DeadlineError):
            await decoders.run(gate.work, "past", deadline=time.perf_counter())

    asyncio.run(scenario())
    decoders.close()
    assert sorted(gate.began) == [0, 1]


def test_who_gave_up_leaves_no_image_in_the_queue(decoders):
    """The queue itself drains only as threads come free, and may hold hundreds."""

    class Image:
        pass

    async def scenario():
        gate = Gate()
        busy = [asyncio.create_task(decoders.run(gate.work, number)) for number in range(2)]
        image = Image()
        gone = weakref.ref(image)
        waiting = asyncio.create_task(decoders.run(gate.work, image))
        del image
        await settle()
        assert gone() is not None
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        del waiting
        gc.collect()
        assert gone() is None
        gate.gate.set()
        assert await asyncio.gather(*busy) == [0, 1]
        assert sorted(gate.began) == [0, 1]

    asyncio.run(scenario())
