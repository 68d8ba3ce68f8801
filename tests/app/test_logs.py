"""Log lines: one a request, each with the request's id, as text or JSON; nothing of the request's content."""

import json
import logging
import time
from pathlib import Path

import httpx2
import pytest

from app.logs import FIELDS, ConsoleFormatter, JsonFormatter, request_id

IMAGE = Path("app/static/examples/digits-7.png").read_bytes()


@pytest.fixture
def in_request():
    token = request_id.set("abc-1")
    yield
    request_id.reset(token)


def record(message="%d images", *args, **extra):
    return logging.getLogger("app.some").makeRecord(
        "app.some", logging.INFO, "file", 1, message, args or (3,), extra.pop("exc_info", None), extra=extra
    )


def access_lines(logs, number):
    """A line is written just after its answer has gone out."""
    while len(lines := [record for record in logs.records if record.name == "app.access"]) < number:
        time.sleep(0.01)
    return lines


def failure():
    try:
        raise RuntimeError("over\ntwo lines")
    except RuntimeError as error:
        return type(error), error, error.__traceback__


def test_console_lines_end_with_the_requests_id(in_request):
    assert ConsoleFormatter().format(record()).endswith(" INFO app.some: 3 images [abc-1]")


def test_lines_outside_of_a_request_have_no_id():
    assert ConsoleFormatter().format(record()).endswith(" INFO app.some: 3 images")
    assert "request_id" not in json.loads(JsonFormatter().format(record()))


def test_json_lines_are_one_object_each(in_request):
    line = JsonFormatter().format(record(**{FIELDS: {"status": 200}}, exc_info=failure()))
    assert "\n" not in line
    fields = json.loads(line)
    assert (fields["level"], fields["logger"], fields["message"]) == ("info", "app.some", "3 images")
    assert (fields["request_id"], fields["status"]) == ("abc-1", 200)
    assert "RuntimeError: over\ntwo lines" in fields["exception"]
    assert fields["time"].endswith("Z")


def test_one_line_a_request_under_its_route(colours, logs):
    colours.get("/model?version=1", headers={"X-Request-ID": "abc-2"})
    colours.get("/no/such/thing?token=secret")
    lines = access_lines(logs, 2)
    assert [line.fields | {"ms": 0} for line in lines] == [
        {"method": "GET", "route": "/model", "status": 200, "ms": 0},
        {"method": "GET", "route": "none", "status": 404, "ms": 0},
    ]
    assert all(line.fields["ms"] > 0 for line in lines)
    assert "secret" not in " ".join(record.getMessage() for record in logs.records if record.name != "httpx2")


def test_the_line_of_an_answer_names_the_model(digits, logs):
    assert digits.post("/predict", content=IMAGE).status_code == 200
    (line,) = access_lines(logs, 1)
    assert line.fields["model"] == "digits/1"


def test_the_level_turns_access_lines_off(colours, caplog):
    caplog.set_level(logging.WARNING)
    colours.get("/model")
    assert not caplog.records


def test_a_process_writes_its_lines_as_json_with_ids(start):
    process = start(provider="cpu", log_format="json", drain_s=0)
    address = process.stdout.readline().split(" on ")[1].split(";")[0]
    httpx2.get(f"{address}/model", headers={"X-Request-ID": "abc-3"}, trust_env=False)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    lines = [json.loads(line) for line in errors.splitlines()]
    (access,) = [line for line in lines if line["logger"] == "app.access"]
    assert (access["request_id"], access["route"], access["status"]) == ("abc-3", "/model", 200)
