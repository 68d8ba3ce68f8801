"""Batches across requests: each gets its own answer, whatever shares its batch fails, leaves, or is late."""

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from app import batcher as module
from app.answers import Interpreter, ReadNetwork
from app.batcher import Batcher
from app.errors import DeadlineError, InferenceError, QueueFullError
from app.main import create_app
from app.repository import LoadedModel, Repository
from app.session import Session
from app.settings import Settings
from model.images import read_input


def images(*levels):
    """One pixel each."""
    return np.array(levels, np.uint8)[:, None, None, None]


class Echo:
    """Tells the level of each image, and its double; waits at a gate, and remembers what it ran."""

    def __init__(self, gate_open=True):
        self.gate = threading.Event()
        self.batches = []
        self.names = []
        self.alone = []
        self.entered = threading.Semaphore(0)
        if gate_open:
            self.gate.set()

    def run(self, batch, names, thresholds=None, *, alone=False):
        levels = batch[:, 0, 0, 0].astype(np.float32)
        self.batches.append(levels.tolist())
        self.names.append(set(names))
        self.alone.append(alone)
        self.entered.release()
        assert self.gate.wait(30)
        outputs = {"level": levels, "double": 2 * levels}
        return {name: outputs[name] for name in names}


@pytest.fixture
def batcher():
    """Makes batchers, and closes them."""
    made = []

    def make(network, **options):
        made.append((network, Batcher(network, **options)))
        return made[-1][1]

    yield make
    for network, one in made:
        getattr(network, "gate", threading.Event()).set()
        one.close()


async def busy(network, one, lanes=1):
    """Asks until every lane stands at the gate."""
    tasks = []
    for _ in range(lanes):
        tasks.append(ask(one, 255))
        assert await asyncio.to_thread(network.entered.acquire, timeout=30)
    return tasks


def ask(one, *levels, names=("level",), deadline=None, **hint):
    return asyncio.create_task(one.infer(images(*levels), names, deadline, **hint))


async def settle():
    """Lets the tasks run until they wait."""
    for _ in range(3):
        await asyncio.sleep(0)


def test_who_waits_together_runs_together_and_gets_its_own(batcher):
    network = Echo(gate_open=False)
    one = batcher(network)

    async def scenario():
        first = await busy(network, one)
        tasks = [ask(one, 1), ask(one, 2, 3), ask(one, 4)]
        await settle()
        assert one.queued == 4
        network.gate.set()
        return await asyncio.gather(*first, *tasks)

    _, *answers = asyncio.run(scenario())
    assert network.batches == [[255], [1, 2, 3, 4]]
    assert [answer.outputs["level"].tolist() for answer in answers] == [[1], [2, 3], [4]]
    assert [answer.batch for answer in answers] == [4, 4, 4]
    assert one.queued == 0


def test_an_idle_lane_takes_one_image_at_once(batcher):
    network = Echo()
    one = batcher(network, lanes=2, max_batch=8)
    answers = [asyncio.run(one.infer(images(level), ["level"])) for level in range(5)]
    assert network.batches == [[0], [1], [2], [3], [4]]
    assert {answer.batch for answer in answers} == {1}


def test_lanes_run_side_by_side(batcher):
    network = Echo(gate_open=False)
    one = batcher(network, lanes=3)

    async def scenario():
        tasks = await busy(network, one, lanes=3)  # all three are inside at a time
        network.gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert network.batches == [[255]] * 3


def test_batches_are_bounded_by_images_in_the_order_of_arrival(batcher):
    network = Echo(gate_open=False)
    one = batcher(network, max_batch=4)

    async def scenario():
        first = await busy(network, one)
        tasks = [ask(one, 1, 2, 3), ask(one, 4, 5), ask(one, 6), ask(one, 7, 8)]
        await settle()
        network.gate.set()
        return await asyncio.gather(*first, *tasks)

    asyncio.run(scenario())
    assert network.batches == [[255], [1, 2, 3], [4, 5, 6], [7, 8]]


def test_a_request_of_more_images_than_a_batch_is_run_in_parts(batcher):
    network = Echo()
    answer = asyncio.run(batcher(network, max_batch=4).infer(images(*range(10)), ["double", "level"]))
    assert network.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert answer.outputs["level"].tolist() == list(range(10))
    assert answer.outputs["double"].tolist() == list(range(0, 20, 2))
    assert answer.batch == 4


def test_a_batch_runs_what_any_wants_and_each_gets_what_it_wanted(batcher):
    network = Echo(gate_open=False)
    one = batcher(network)

    async def scenario():
        first = await busy(network, one)
        tasks = [ask(one, 1, names=["level"]), ask(one, 2, names=["double"]), ask(one, 3, names=["double", "level"])]
        await settle()
        network.gate.set()
        return await asyncio.gather(*first, *tasks)

    _, *answers = asyncio.run(scenario())
    assert network.names == [{"level"}, {"level", "double"}]
    assert [{name: value.tolist() for name, value in answer.outputs.items()} for answer in answers] == [
        {"level": [1]},
        {"double": [4]},
        {"double": [6], "level": [3]},
    ]


def test_who_is_cancelled_leaves_the_queue_and_is_never_run(batcher):
    network = Echo(gate_open=False)
    one = batcher(network, max_batch=4)

    async def scenario():
        first = await busy(network, one)
        tasks = [ask(one, 1), ask(one, *range(10, 16)), ask(one, 2)]
        await settle()
        assert one.queued == 8
        tasks[1].cancel()
        await settle()
        assert one.queued == 2
        network.gate.set()
        return await asyncio.gather(*first, tasks[0], tasks[2])

    _, *answers = asyncio.run(scenario())
    assert network.batches == [[255], [1, 2]]
    assert [answer.outputs["level"].tolist() for answer in answers] == [[1], [2]]


def test_who_is_cancelled_while_running_harms_nobody(batcher):
    network = Echo(gate_open=False)
    one = batcher(network, wait_us=3_600_000_000, max_batch=3)

    async def scenario():
        tasks = [ask(one, 1), ask(one, 2), ask(one, 3)]
        assert await asyncio.to_thread(network.entered.acquire, timeout=30)
        tasks[0].cancel()
        network.gate.set()
        return await asyncio.gather(*tasks[1:])

    answers = asyncio.run(scenario())
    assert network.batches == [[1, 2, 3]]
    assert [answer.outputs["level"].tolist() for answer in answers] == [[2], [3]]


class Fussy(Echo):
    """Fails on a batch that holds level 13."""

    def run(self, batch, names, thresholds=None, *, alone=False):
        outputs = super().run(batch, names)
        if 13 in self.batches[-1]:
            raise InferenceError("thirteen")
        return outputs


def test_a_failure_is_that_batchs_alone(batcher):
    network = Fussy(gate_open=False)
    one = batcher(network, max_batch=2)

    async def scenario():
        first = await busy(network, one)
        tasks = [ask(one, 1, 2), ask(one, 13), ask(one, 3), ask(one, 4, 5)]
        await settle()
        network.gate.set()
        return await asyncio.gather(*first, *tasks, return_exceptions=True)

    _, first, second, third, fourth = asyncio.run(scenario())
    assert network.batches == [[255], [1, 2], [13, 3], [4, 5]]
    assert [type(second), type(third)] == [InferenceError, InferenceError]
    assert [first.outputs["level"].tolist(), fourth.outputs["level"].tolist()] == [[1, 2], [4, 5]]


def test_a_part_that_fails_fails_its_request_once_and_withdraws_the_rest(batcher, logs):
    class Closing(Fussy):
        def run(self, batch, names, thresholds=None, *, alone=False):
            try:
                return super().run(batch, names)
            finally:
                self.gate.clear()

    network = Closing()
    one = batcher(network, max_batch=1)

    async def scenario():
        with pytest.raises(InferenceError, match="thirteen"):
            await one.infer(images(13, 13, *range(50)), ["level"])
        assert one.queued == 0
        network.gate.set()  # the second part stood at it
        await asyncio.to_thread(one.close)

    asyncio.run(scenario())
    gc.collect()  # a failure that nobody took notice of would be logged now
    assert network.batches in ([[13]], [[13], [13]])  # the second may have been taken before it was withdrawn
    assert logs.records == []


def test_whatever_a_network_raises_the_lane_goes_on(batcher):
    class Broken(Echo):
        def run(self, batch, names, thresholds=None, *, alone=False):
            if batch[0, 0, 0, 0] == 0:
                raise ZeroDivisionError
            return super().run(batch, names)

    one = batcher(Broken())
    with pytest.raises(ZeroDivisionError):
        asyncio.run(one.infer(images(0), ["level"]))
    assert asyncio.run(one.infer(images(1), ["level"])).outputs["level"].tolist() == [1]


def test_images_of_another_shape_share_no_batch(batcher):
    network = Echo(gate_open=False)
    one = batcher(network)

    async def scenario():
        first = await busy(network, one)
        wide = asyncio.create_task(one.infer(np.full((1, 1, 2, 1), 9, np.uint8), ["level"]))
        tasks = [ask(one, 1), wide, ask(one, 2)]
        await settle()
        await settle()
        network.gate.set()
        return await asyncio.gather(*first, *tasks)

    asyncio.run(scenario())
    assert sorted(network.batches[1:]) in ([[1], [2], [9]], [[1, 2], [9]], [[1], [2, 9]], [[2], [9, 1]], [[9], [1, 2]])
    assert all(9 not in batch or len(batch) == 1 for batch in network.batches)


# A full queue, and deadlines


def test_a_full_queue_refuses_at_once_counted_in_images(batcher):
    network = Echo(gate_open=False)
    one = batcher(network, max_queue=5)

    async def scenario():
        tasks = await busy(network, one)
        tasks += [ask(one, 1, 2, 3)]
        await settle()
        with pytest.raises(QueueFullError, match=r"3 images wait .* these 3 .* the 5 that may.* INTERFLOW_MAX_QUEUE"):
            await one.infer(images(4, 5, 6), ["level"])
        with pytest.raises(QueueFullError):
            one.require_room(3)
        one.require_room(2)
        tasks += [ask(one, 4, 5)]
        await settle()
        with pytest.raises(QueueFullError):
            one.require_room()
        assert one.queued == 5
        network.gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert network.batches == [[255], [1, 2, 3, 4, 5]]


def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits(batcher):
    answer = asyncio.run(batcher(Echo(), max_queue=2, max_batch=4).infer(images(*range(9)), ["level"]))
    assert answer.outputs["level"].tolist() == list(range(9))


def test_a_deadline_that_passes_in_the_queue_ends_the_wait_and_costs_no_inference(batcher):
    network = Echo(gate_open=False)
    one = batcher(network)

    async def scenario():
        tasks = await busy(network, one)
        soon = time.perf_counter() + 0.01
        late = [ask(one, 1, deadline=soon), ask(one, *range(10, 50), deadline=soon)]
        tasks += [ask(one, 2, deadline=soon + 3600)]
        for task in late:  # while the lane still stands at the gate
            with pytest.raises(DeadlineError):
                await task
        assert one.queued == 1
        network.gate.set()
        return await asyncio.gather(*tasks)

    _, answer = asyncio.run(scenario())
    assert network.batches == [[255], [2]]
    assert answer.outputs["level"].tolist() == [2]


def test_a_deadline_that_passed_before_is_never_run(batcher):
    network = Echo()
    one = batcher(network)
    with pytest.raises(DeadlineError):
        asyncio.run(one.infer(images(1), ["level"], deadline=time.perf_counter()))
    with pytest.raises(DeadlineError):
        asyncio.run(one.infer(images(1), ["level"], deadline=0))
    assert network.batches == []


def test_a_deadline_that_passes_while_running_ends_the_wait(batcher):
    network = Echo(gate_open=False)
    one = batcher(network)

    async def scenario():
        with pytest.raises(DeadlineError):
            await one.infer(images(1), ["level"], deadline=time.perf_counter() + 0.01)
        network.gate.set()
        return await one.infer(images(2), ["level"])

    assert asyncio.run(scenario()).outputs["level"].tolist() == [2]


# Waiting for company


def test_a_lane_waits_for_company_only_where_it_is_told_to(batcher):
    network = Echo()
    patient = batcher(network, max_batch=3, wait_us=3_600_000_000)

    async def scenario():
        tasks = [ask(patient, 1), ask(patient, 2)]
        await settle()
        await asyncio.sleep(0.05)
        assert network.batches == []
        tasks += [ask(patient, 3)]  # completes the batch
        return await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert network.batches == [[1, 2, 3]]


def test_the_wait_for_company_ends(batcher):
    network = Echo()
    answer = asyncio.run(batcher(network, wait_us=1000).infer(images(1), ["level"]))
    assert network.batches == [[1]]
    assert answer.queue_ms >= 1


def test_several_patient_lanes_lose_nothing(batcher):
    network = Echo()
    one = batcher(network, lanes=3, max_batch=4, wait_us=500)

    async def scenario():
        return await asyncio.gather(*(one.infer(images(level), ["level"]) for level in range(200)))

    answers = asyncio.run(scenario())
    assert [answer.outputs["level"][0] for answer in answers] == list(range(200))


@pytest.mark.parametrize("full", [True, False])
def test_a_nice_lane_waits_for_what_is_being_decoded(batcher, monkeypatch, full):
    """Until its batch is full, or nothing more is to come."""
    monkeypatch.setattr(module, "BUSY_WAIT_S", 3600)
    network = Echo()
    one = batcher(network, max_batch=3 if full else 8, niceness=1)

    async def scenario():
        tasks = [ask(one, 1, more_to_come=True), ask(one, 2, more_to_come=True)]
        await settle()
        await asyncio.sleep(0.05)
        assert network.batches == []
        tasks += [ask(one, 3, more_to_come=full)]
        return await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert network.batches == [[1, 2, 3]]


def test_what_is_being_decoded_is_waited_for_by_nice_lanes_only_and_not_for_long(batcher, monkeypatch):
    nice, other = Echo(), Echo()
    patient = batcher(nice, niceness=1)  # made with the true limit
    monkeypatch.setattr(module, "BUSY_WAIT_S", 3600)
    eager = batcher(other, niceness=0)

    async def scenario():
        return await asyncio.gather(ask(patient, 1, more_to_come=True), ask(eager, 2, more_to_come=True))

    waited, _ = asyncio.run(scenario())
    assert (nice.batches, other.batches) == ([[1]], [[2]])
    assert waited.queue_ms >= 25


@pytest.mark.parametrize(
    ("waiting", "batches"),
    [
        ([[1], [2], [3], [4], [5]], [[1, 2, 3], [4, 5]]),
        ([[1], [2], [3], [4], [5], [6]], [[1, 2, 3, 4, 5, 6]]),
        ([[1], [2], [3], [4], [5], [6], [7]], [[1, 2, 3, 4, 5, 6], [7]]),
        ([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5]]),
        ([[1, 2], [3, 4], [5]], [[1, 2], [3, 4, 5]]),
    ],
)
def test_a_large_batch_is_run_where_it_is_full_and_a_small_one_else(batcher, waiting, batches):
    network = Echo(gate_open=False)
    one = batcher(network, max_batch=6, small_batch=3)

    async def scenario():
        tasks = await busy(network, one)
        tasks += [ask(one, *levels) for levels in waiting]
        await settle()
        network.gate.set()
        return await asyncio.gather(*tasks)

    _, *answers = asyncio.run(scenario())
    assert network.batches == [[255], *batches]
    assert [answer.outputs["level"].tolist() for answer in answers] == waiting


def test_a_helper_takes_full_batches_and_nothing_else(batcher):
    network = Echo(gate_open=False)
    one = batcher(network, helpers=1, max_batch=3)

    async def scenario():
        tasks = await busy(network, one)
        tasks += [ask(one, level) for level in (1, 2)]
        await asyncio.sleep(0.05)
        assert network.batches == [[255]]  # the lane is busy, and so few wait for it
        tasks += [ask(one, level) for level in (3, 4)]
        assert await asyncio.to_thread(network.entered.acquire, timeout=30)
        assert network.batches == [[255], [1, 2, 3]]
        network.gate.set()
        return await asyncio.gather(*tasks)

    answers = asyncio.run(scenario())
    assert network.batches == [[255], [1, 2, 3], [4]]
    assert [answer.outputs["level"].tolist() for answer in answers] == [[255], [1], [2], [3], [4]]


@pytest.mark.parametrize("lanes", [1, 2])
def test_alone_is_who_finds_nothing_waiting_running_or_to_come(batcher, lanes):
    network = Echo(gate_open=False)
    one = batcher(network, lanes=lanes, max_batch=1)

    async def idle():
        while one._queue._busy_lanes:
            await asyncio.sleep(0.001)

    async def scenario():
        await idle()
        tasks = await busy(network, one)
        tasks.append(ask(one, 1))  # while the first one runs
        await settle()
        network.gate.set()
        await asyncio.gather(*tasks)
        for levels, hint in (([2], {"more_to_come": True}), ([3, 4], {}), ([5], {})):
            await idle()
            await ask(one, *levels, **hint)

    asyncio.run(scenario())
    found = sorted(zip(network.batches, network.alone, strict=True))
    assert found == [([1], False), ([2], False), ([3], False), ([4], False), ([5], True), ([255], True)]


@pytest.mark.parametrize("lanes", [1, 2])
def test_alone_is_also_who_fills_a_batch_of_the_only_lane(batcher, lanes):
    network = Echo(gate_open=False)
    one = batcher(network, lanes=lanes, max_batch=2)

    async def scenario():
        tasks = await busy(network, one, lanes)
        tasks += [ask(one, 1, 2, 3), ask(one, 4), ask(one, 5, 6, more_to_come=True)]
        await settle()
        network.gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())
    found = dict(zip(map(tuple, network.batches), network.alone, strict=True))
    assert {batch: found[batch] for batch in ((1, 2), (3, 4), (5, 6))} == {
        (1, 2): lanes == 1,
        (3, 4): False,
        (5, 6): False,
    }


# Times, what is told of them, and the end


def test_waiting_counts_as_queue_and_running_as_inference(batcher, monkeypatch):
    """On a clock of our own: two ask at 0 s, the gate opens at 5 s, and every run takes 2 s from there."""
    clock = 0.0

    class Timed(Echo):
        def run(self, batch, names, thresholds=None, *, alone=False):
            nonlocal clock
            outputs = super().run(batch, names)
            clock += 2
            return outputs

    monkeypatch.setattr("app.batcher.time.perf_counter", lambda: clock)
    network = Timed(gate_open=False)
    told = []
    one = batcher(network, on_batch=lambda *of: told.append(of))

    async def scenario():
        nonlocal clock
        (first,) = await busy(network, one)
        second = ask(one, 1, 2)
        await settle()
        clock = 5
        network.gate.set()
        return await asyncio.gather(first, second)

    first, second = asyncio.run(scenario())
    assert (first.queue_ms, first.inference_ms) == (0, 7000)
    assert (second.queue_ms, second.inference_ms) == (7000, 2000)
    assert told == [(1, 7.0), (2, 2.0)]


def test_closing_answers_what_was_accepted_and_refuses_the_rest():
    network = Echo(gate_open=False)
    one = Batcher(network)

    async def scenario():
        tasks = await busy(network, one)
        tasks += [ask(one, 1), ask(one, 2)]
        await settle()
        closing = asyncio.create_task(asyncio.to_thread(one.close))
        await asyncio.sleep(0.01)
        network.gate.set()
        answers = await asyncio.gather(*tasks)
        await closing
        with pytest.raises(InferenceError, match="closed"):
            await one.infer(images(3), ["level"])
        return answers

    _, *answers = asyncio.run(scenario())
    assert [answer.outputs["level"].tolist() for answer in answers] == [[1], [2]]
    one.close()  # again does nothing


def test_one_that_nobody_holds_any_more_ends_and_lets_its_network_go():
    network = Echo()
    one = Batcher(network, lanes=2)
    lanes, gone = list(one._lanes), weakref.ref(network)
    asyncio.run(one.infer(images(1), ["level"]))
    del network, one
    for lane in lanes:
        lane.join(30)
    assert not any(lane.is_alive() for lane in lanes)
    assert gone() is None


def test_a_loop_that_ended_does_not_end_the_lanes(batcher):
    network = Echo(gate_open=False)
    one = batcher(network)

    async def leaves():
        await busy(network, one)

    asyncio.run(leaves())
    network.gate.set()
    assert asyncio.run(one.infer(images(1), ["level"])).outputs["level"].tolist() == [1]


# Real images, under load


def test_answers_under_load_are_those_of_each_image_alone(serve, artefact, photos):
    """Photographs in crops that all differ, asked by 16 at a time; the lone session says what is right."""
    session = Session(artefact, Settings(provider="cpu", threads=1))
    spec = session.card.input
    sources = [(photos / name).read_bytes() for name in ("chelsea.png", "astronaut.png", "rocket.jpg", "camera.png")]
    pixels = [read_input(source, spec) for source in sources]
    expected = [session.run(one[None], ["logits"])["logits"][0] for one in pixels]
    sizes = []
    network = ReadNetwork(session, Interpreter(session.card))
    one = Batcher(network, lanes=2, max_batch=8, on_batch=lambda images, _: sizes.append(images))
    app = create_app(Settings(), Repository([LoadedModel(session.card, session.runtime, one)]))
    with serve(app) as client, ThreadPoolExecutor(16) as pool:

        def post(index):
            answer = client.post("/predict", files={"image": sources[index % 4]}).json()
            return sum(stage["contribution"] for stage in answer["stages"]), answer["prediction"]["index"]

        answers = list(pool.map(post, range(200)))
    assert sum(sizes) == 200
    assert max(sizes) > 1
    for index, (fused, chosen) in enumerate(answers):
        assert chosen == expected[index % 4].argmax()
        assert fused == pytest.approx(expected[index % 4][chosen], rel=1e-3, abs=1e-3)
