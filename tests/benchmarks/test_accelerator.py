"""The GPU's benchmark goes on where it was, says what was not run, and holds outputs and identities as it says."""

import json
import time
from functools import partial

import pytest

from benchmarks import accelerator
from benchmarks.accelerator import Measurement, NoTimeError
from benchmarks.accelerator_report import table
from model.contract import InterflowError

CONDITIONS = {"provider": "cpu", "GPU": None, "CPUs": 1, "Python": "3", "versions": {"numpy": "2"}, "seconds": 1}


@pytest.fixture
def begin(tmp_path):
    """A call of the benchmark, that has so many seconds."""
    return lambda seconds=60, **changes: Measurement(
        tmp_path / "out" / "accelerator.json", CONDITIONS | changes, time.monotonic() + seconds
    )


def test_the_next_call_measures_what_is_missing_and_what_failed(begin):
    ran = []

    def measure(name):
        ran.append(name)
        if ran.count(name) == 1 and name == "fails once":
            raise RuntimeError("CUDA failure 2\nmore")
        return {"per_second": len(ran)}

    for _ in range(2):
        measurement = begin()
        for name in ("a", "fails once", "b"):
            measurement.row({"part": "bare", "way": name}, partial(measure, name))
    assert ran == ["a", "fails once", "b", "fails once"]
    assert {row["way"]: row.get("failure") for row in measurement.run["rows"]} == dict.fromkeys(
        ["a", "b", "fails once"]
    )
    with pytest.raises(NoTimeError):
        begin(seconds=-1).row({"part": "bare", "way": "c"}, partial(measure, "c"))
    with pytest.raises(InterflowError, match="under other conditions"):
        begin(CPUs=2)


def test_what_was_not_measured_is_said_and_a_cpu_is_named_as_one(begin):
    text = table({"conditions": None, "rows": []})
    assert "not run yet" in text
    assert text.count("| not run |") == 6  # three tables of two networks
    assert text.count("not run (to reach") == 4
    measurement = begin()
    row = {"part": "bare", "model": "cifar10", "precision": "tf32", "way": "run", "layout": "nchw", "batch": 1}
    measurement.row(row, lambda: {"per_second": 1234.0, "p50_ms": 1.0, "p99_ms": 2.0})
    text = table(json.loads(json.dumps(measurement.run)))
    assert "none of these figures is one of a GPU" in text
    assert "| onnxruntime, run | tf32 | 1 | 1,234 | 1.000 | 2.000 | not run | not run |" in text
    assert text.count("| not run |") == 5 + 1


def test_outputs_that_are_too_far_from_the_cpus_do_not_pass(bundled, monkeypatch):
    folder = bundled.parents[1] / "cifar10" / "1"
    same = accelerator.same(folder, "tf32", "cpu")
    assert same["passed"]
    assert (max(same["outputs"].values()), same["same_answer"]) == (0, 1)
    opened = accelerator.open_session

    class Off:
        """The GPU's, whose logits are no sum of anything."""

        def __init__(self, session):
            self._session = session

        def run(self, names, feeds):
            return [
                1.01 * values if name == "logits" else values
                for name, values in zip(names, self._session.run(names, feeds), strict=True)
            ]

    monkeypatch.setattr(
        accelerator,
        "open_session",
        lambda f, p, where: opened(f, p, "cpu") if where == "cpu" else Off(opened(f, p, "cpu")),
    )
    same = accelerator.same(folder, "tf32", "cuda")
    assert not same["passed"]
    assert same["outputs"]["logits"] == pytest.approx(0.01, rel=1e-3)
    assert same["identities"] > 1e-3
