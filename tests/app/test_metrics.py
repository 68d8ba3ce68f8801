"""Metrics: counted once, under bounded labels; what stages say is counted as the answers say it."""

import io
import json
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse

from app.main import create_app
from app.repository import Repository
from app.settings import Settings

IMAGE = Path("app/static/examples/digits-7.png").read_bytes()


def read(client):
    """Values by name and labels."""
    text = client.get("/metrics").text
    return Counter(
        {
            (sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))): sample.value
            for family in parse(text)
            for sample in family.samples
        }
    )


@pytest.fixture
def told(colours):
    """Runs something, and gives what it added to the metrics."""

    def run(work):
        before = read(colours)
        work()
        after = read(colours)
        return {key: after[key] - before[key] for key in after if after[key] != before[key]}

    return run


def png(colour, size=(4, 4)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def test_requests_are_counted_by_route_and_code_never_by_path(colours, told):
    def work():
        for path in ("/model", "/model?version=9", "/a/b", "/c", "/static/x", "/static/y"):
            colours.get(path)
        colours.request("PROPFIND", "/model")

    added = told(work)
    requests = {key[1:]: value for key, value in added.items() if key[0] == "interflow_requests_total"}
    assert requests == {
        ("code=200", "method=GET", "route=/model"): 1,
        ("code=404", "method=GET", "route=/model"): 1,
        ("code=404", "method=GET", "route=none"): 4,
        ("code=405", "method=other", "route=/model"): 1,
        ("code=200", "method=GET", "route=/metrics"): 1,
    }
    assert added["interflow_request_seconds_count", "route=/model"] == 3


def test_an_answer_is_counted_with_what_its_stages_said(colours, told):
    answers = []
    added = told(lambda: answers.append(colours.post("/predict", content=png("red"))))
    (answer,) = (answer.json() for answer in answers)
    assert added["interflow_answer_confidence_count", "model=colours"] == 1
    assert added["interflow_answer_confidence_sum", "model=colours"] == pytest.approx(
        answer["prediction"]["confidence"]
    )
    for stage in answer["stages"]:
        labels = (f"agrees={str(stage['agrees']).lower()}", "model=colours", f"stage={stage['name']}")
        assert added["interflow_stage_confidence_count", *labels] == 1
        assert added["interflow_stage_confidence_sum", *labels] == pytest.approx(stage["prediction"]["confidence"])
    assert sum(value for key, value in added.items() if key[0] == "interflow_stage_confidence_count") == 3
    disagreed = added.get(("interflow_shallow_disagreements_total", "model=colours"), 0)
    assert disagreed == any(not stage["agrees"] for stage in answer["stages"][:-1])


def test_a_deep_stage_alone_is_no_shallow_disagreement(told):
    from app.metrics import record_answer

    def stages(*agreed):
        said = [
            {"name": f"conv{i}", "evaluated": agrees is not None, "agrees": agrees, "prediction": {"confidence": 0.5}}
            for i, agrees in enumerate(agreed)
        ]
        return {"prediction": {"confidence": 0.5}, "stages": said}

    for agreed, expected in [
        ((True, True, False), 0),
        ((False, True, True), 1),
        ((True, False, False), 1),
        ((True, False, None), 0),  # of an adaptive answer: the last that was evaluated is its deepest
        ((True,), 0),
        ((False,), 0),
    ]:
        added = told(lambda agreed=agreed: record_answer("by hand", stages(*agreed)))
        assert added.get(("interflow_shallow_disagreements_total", "model=by hand"), 0) == expected


def test_steps_and_batches_are_timed(colours, told):
    added = told(lambda: [colours.post("/predict", content=png("blue")) for _ in range(2)])
    for step in ("decode", "queue", "inference", "interpret"):
        assert added["interflow_step_seconds_count", "model=colours", f"step={step}"] == 2
        assert added["interflow_step_seconds_sum", "model=colours", f"step={step}"] > 0


@pytest.mark.parametrize("query", ["", "?explain=maps"])
def test_the_steps_of_a_large_batch_are_of_the_request_and_no_longer_than_it(digits, told, query):
    """32 images run in several batches, which wait for each other, side by side or in turn."""
    files = [("images", (f"{number}.png", IMAGE, "image/png")) for number in range(32)]
    begun = time.perf_counter()
    added = told(lambda: digits.post(f"/predict/batch{query}", files=files))
    seconds = time.perf_counter() - begun
    steps = [("model=digits", f"step={step}") for step in ("decode", "queue", "inference", "interpret")]
    assert [added["interflow_step_seconds_count", *step] for step in steps] == [1] * 4
    sums = [added["interflow_step_seconds_sum", *step] for step in steps]
    assert min(sums) >= 0
    assert sum(sums) <= seconds
    assert added["interflow_answer_confidence_count", "model=digits"] == 32


def test_a_served_models_batches_are_counted(digits, told):
    before = read(digits)
    digits.post("/predict", content=IMAGE)
    after = read(digits)
    for name in ("interflow_batch_images_count", "interflow_batch_images_sum", "interflow_batch_seconds_count"):
        assert after[name, "model=digits"] - before[name, "model=digits"] == 1


def test_gauges_say_what_is_loaded_now_and_what_was_unloaded(serve, colour_model):
    repository = Repository([colour_model(name="gone"), colour_model(name="kept", version="7")])
    with serve(create_app(Settings(), repository)) as client:
        values = read(client)
        assert values["interflow_model_loaded", "model=gone", "version=1"] == 1
        assert values["interflow_model_loaded", "model=kept", "version=7"] == 1
        assert values["interflow_queue_images", "model=kept"] == 0
        assert values["interflow_requests_in_flight",] == 1  # the one that reads them
        repository.replace("gone", [])
        values = read(client)
        assert values["interflow_model_loaded", "model=gone", "version=1"] == 0
        assert values["interflow_queue_images", "model=gone"] == 0


def test_the_reader_chooses_the_format(colours):
    assert colours.get("/metrics").headers["content-type"].startswith("text/plain; version=")
    answer = colours.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert list(parse_open(answer.text))


def test_a_million_paths_and_methods_make_no_new_series(colours):
    colours.get("/x1")
    colours.request("REPORT", "/x1")
    read(colours)  # a series of its own from the next time on
    before = len(read(colours))
    for number in range(20):
        colours.get(f"/x{number}/y")
        colours.request("MKCOL", f"/z{number}")
    assert len(read(colours)) == before


def test_every_metric_of_the_dashboard_exists_and_every_one_of_ours_is_shown(digits):
    digits.post("/predict", content=IMAGE)
    exposed = {name for name, *_ in read(digits) if name.startswith("interflow_")}
    dashboard = json.loads(Path("docs/grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    queried = {name for query in queries for name in re.findall(r"\binterflow_\w+", query)}
    # there once a stage disagreed, an answer was adaptive, or a batch failed
    rare = {
        "interflow_shallow_disagreements_total",
        "interflow_adaptive_answers_total",
        "interflow_failed_batches_total",
    }
    assert queried - exposed == rare - exposed
    families = {re.sub("_(total|created|sum|count|bucket)$", "", name) for name in exposed | rare}
    assert families == {re.sub("_(total|created|sum|count|bucket)$", "", name) for name in queried}
    for query in queries:
        for labels in re.findall(r"by \(([\w, ]+)\)", query):
            assert set(labels.split(", ")) <= {"le", "model", "stage", "step", "code", "route", "version"}
