"""What benchmarks/cluster.py makes of its records."""

import pytest

from benchmarks.cluster import PLAIN, name_of, rate, table


def record(requests, refused=0, broken=0):
    return {"requests": requests, "seconds": 2.0, "p50_ms": 1.0, "p99_ms": 2.0, "refused": refused, "broken": broken}


@pytest.fixture
def run():
    conditions = {"model": "m", "cpus": 16, "machine": "x", "ray": "0", "wrk": "0", "rounds": 3, "seconds": 2}
    rates = {
        PLAIN: [record(500)],
        name_of("ray", 1): [record(100), record(200), record(900)],
        name_of("ray", 2): [record(380, refused=20), record(360), record(10, broken=3)],
    }
    kills = {"Ray's proxy": [record(50, broken=1), record(60, refused=2)]}
    return {"date": "2026-01-01", "conditions": conditions, "rates": rates, "kills": kills}


def test_medians_of_good_answers_and_their_ratio(run):
    assert rate(run, name_of("ray", 1)) == 100
    assert rate(run, name_of("ray", 2)) == 180
    (line,) = (line for line in table(run).splitlines() if line.startswith(f"| {name_of('ray', 2)} "))
    assert line.endswith("| 23 | 1.80 x |")


def test_every_failed_request_of_the_kills_is_counted(run):
    assert "| Ray's proxy | 2 | 111 | 3 |" in table(run)


@pytest.mark.parametrize(("cpus", "told"), [(2, True), (16, False)])
def test_too_few_cpus_are_told(run, cpus, told):
    run["conditions"]["cpus"] = cpus
    assert ("want five" in table(run)) == told
