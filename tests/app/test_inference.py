"""The direct inference runs one request after the other, off the event loop, and measures its queue."""

import asyncio
import threading

import numpy as np
import pytest

from app.errors import InferenceError
from app.inference import DirectInference, Outputs

IMAGES = np.zeros((1, 4, 4, 3), np.uint8)


class GatedNetwork:
    """Waits at a gate, and remembers whom it ran."""

    def __init__(self):
        self.gate = threading.Event()
        self.ran = []

    def run(self, images):
        assert self.gate.wait(30)
        self.ran.append(int(images[0, 0, 0, 0]))
        empty = np.zeros((len(images), 1, 2), np.float32)
        return Outputs(empty[:, 0] + self.ran[-1], empty, empty)


def test_the_event_loop_runs_on_and_answers_are_not_mixed():
    network = GatedNetwork()
    inference = DirectInference(network)

    async def scenario():
        tasks = [asyncio.create_task(inference.infer(IMAGES + i)) for i in range(5)]
        await asyncio.sleep(0)  # the loop is free while the network waits
        network.gate.set()
        return await asyncio.gather(*tasks)

    answers = asyncio.run(scenario())
    inference.close()
    assert network.ran == [0, 1, 2, 3, 4]
    assert [answer.outputs.logits[0, 0] for answer in answers] == [0, 1, 2, 3, 4]


def test_waiting_counts_as_queue_and_running_as_inference(monkeypatch):
    """On a clock of our own: two ask at 0 s, the gate opens at 5 s, and every run takes 2 s from there."""
    clock = 0.0
    entered = threading.Event()

    class TimedNetwork(GatedNetwork):
        def run(self, images):
            nonlocal clock
            entered.set()
            outputs = super().run(images)
            clock += 2
            return outputs

    monkeypatch.setattr("app.inference.time.perf_counter", lambda: clock)
    network = TimedNetwork()
    inference = DirectInference(network)

    async def scenario():
        nonlocal clock
        tasks = [asyncio.create_task(inference.infer(IMAGES)) for _ in range(2)]
        await asyncio.sleep(0)
        assert entered.wait(30)
        clock = 5
        network.gate.set()
        return await asyncio.gather(*tasks)

    first, second = asyncio.run(scenario())
    inference.close()
    assert (first.queue_ms, first.inference_ms) == (0, 7000)
    assert (second.queue_ms, second.inference_ms) == (7000, 2000)


def test_who_is_cancelled_while_waiting_is_never_run():
    network = GatedNetwork()
    inference = DirectInference(network)

    async def scenario():
        first, second, third = (asyncio.create_task(inference.infer(IMAGES + i)) for i in range(3))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        network.gate.set()
        await asyncio.gather(first, third)

    asyncio.run(scenario())
    inference.close()
    assert network.ran == [0, 2]


def test_a_failure_reaches_the_one_who_asked():
    class BrokenNetwork:
        def run(self, images):
            raise InferenceError("broken")

    inference = DirectInference(BrokenNetwork())
    with pytest.raises(InferenceError, match="broken"):
        asyncio.run(inference.infer(IMAGES))
    inference.close()
