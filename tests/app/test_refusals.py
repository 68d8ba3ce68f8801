"""Refusals come at a pace, and none waits for long; the one now and then is not held back at all."""

import asyncio

import pytest

from app import refusals
from app.refusals import Pace


def waits(moments, limit_s=None):
    """How long each of those who come at the given moments, with so long to live, is held back; the clock is ours."""

    async def run():
        loop = asyncio.get_running_loop()
        pace, now, held = Pace(), 0.0, []

        async def sleep(seconds):
            held[-1] = seconds

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "time", lambda: now)
            patch.setattr(refusals.time, "perf_counter", lambda: 7 + now)  # of another origin
            patch.setattr(refusals.asyncio, "sleep", sleep)
            for moment in moments:
                now = 100 + moment
                held.append(0.0)
                await pace.keep(None if limit_s is None else 7 + now + limit_s)
        return held

    return asyncio.run(run())


def test_who_comes_alone_does_not_wait():
    assert waits([0, 1, 2, 2 + 1.01 / refusals.PER_S]) == [0, 0, 0, 0]


def test_a_crowd_leaves_at_the_pace():
    """In groups: of any moment no more have gone than the pace allows, and of the tick before no fewer."""
    held = waits([0] * 400)
    assert held == sorted(held)
    for moment in range(30):
        gone = sum(wait <= moment * refusals.TICK_S + 1e-6 for wait in held)
        assert abs(gone - refusals.PER_S * refusals.TICK_S * moment) <= refusals.PER_S * refusals.TICK_S + 1
    assert len({round(wait, 6) for wait in held[1:]}) == -(-400 // (refusals.PER_S * refusals.TICK_S))


def test_no_one_waits_for_longer():
    held = waits([0] * 2000 + [0.5])
    assert refusals.LONGEST_S <= max(held) <= refusals.LONGEST_S + refusals.TICK_S
    assert held[-1] == pytest.approx(refusals.LONGEST_S - 0.5 + refusals.TICK_S, abs=refusals.TICK_S)


def test_after_a_crowd_all_is_as_before():
    assert waits([0] * 1000 + [10])[-1] == 0


def test_no_one_waits_past_the_own_deadline():
    crowd = [0] * 400
    held = waits(crowd, limit_s=0.5)
    assert held == [min(wait, 0.5 - refusals.TICK_S) for wait in waits(crowd)]
    assert max(waits(crowd)) > 1
    assert 0.4 < max(held) < 0.5
    assert max(waits(crowd, limit_s=0.01)) == max(waits(crowd, limit_s=-1)) == 0
