"""Refusals come at a pace, and none waits for long; the one now and then is not held back at all."""

import asyncio

import pytest

from app import refusals
from app.refusals import Pace


def waits(moments):
    """How long each of those who come at the given moments is held back; the clock is ours."""

    async def run():
        loop = asyncio.get_running_loop()
        pace, now, held = Pace(), 0.0, []

        async def sleep(seconds):
            held[-1] = seconds

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "time", lambda: now)
            patch.setattr(refusals.asyncio, "sleep", sleep)
            for moment in moments:
                now = 100 + moment
                held.append(0.0)
                await pace.keep()
        return held

    return asyncio.run(run())


def test_who_comes_alone_does_not_wait():
    assert waits([0, 1, 2, 2 + 1.01 / refusals.PER_S]) == [0, 0, 0, 0]


def test_a_crowd_leaves_one_after_the_other():
    assert waits([0] * 4) == pytest.approx([place / refusals.PER_S for place in range(4)])


def test_no_one_waits_for_longer_than_retry_after_says():
    held = waits([0] * 2000 + [0.5])
    assert max(held) == pytest.approx(refusals.LONGEST_S)
    assert held[-1] == pytest.approx(refusals.LONGEST_S - 0.5 + 1 / refusals.PER_S)


def test_after_a_crowd_all_is_as_before():
    assert waits([0] * 1000 + [10])[-1] == 0
