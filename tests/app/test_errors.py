"""Every exception answers as problem+json with its status and stable code; nothing inside leaks out."""

import http

import pytest
from fastapi import FastAPI

from app import errors
from app.errors import HANDLERS, PROBLEMS
from app.middleware import RequestIdMiddleware
from app.refusals import Pace
from model.contract import CardError, InterflowError
from model.images import ImageError


class DamagedImageError(ImageError):
    """Not in the table: answers as the class it derives from."""


RAISED = {
    **{f"/{kind.__name__}": (kind("what to do."), *answer) for kind, answer in PROBLEMS.items()},
    "/derived": (DamagedImageError("what to do."), 400, "invalid_image"),
    "/unlisted": (CardError("what to do."), 500, "internal_error"),
}


@pytest.fixture(scope="module")
def client(serve):
    app = FastAPI(exception_handlers=HANDLERS)
    app.state.refusals = Pace()
    app.add_middleware(RequestIdMiddleware)

    @app.get("/unexpected")
    async def unexpected() -> None:
        raise RuntimeError("the secret inside")

    @app.get("/{name}")
    async def expected(name: str) -> None:
        raise RAISED[f"/{name}"][0]

    with serve(app) as client:
        yield client


@pytest.mark.parametrize("path", RAISED)
def test_our_errors(client, path):
    _, status, code = RAISED[path]
    answer = client.get(path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {
        "type": "about:blank",
        "title": http.HTTPStatus(status).phrase,
        "status": status,
        "detail": "what to do.",
        "code": code,
        "request_id": answer.headers["x-request-id"],
    }


def test_every_error_class_of_the_module_is_in_the_table():
    ours = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, InterflowError)}
    assert ours - {InterflowError} == set(PROBLEMS)


def test_the_unexpected_is_logged_under_the_request_id_and_not_told(client, logs):
    answer = client.get("/unexpected", headers={"X-Request-ID": "abc-1"})
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "abc-1"
    assert "secret" not in answer.text
    (record,) = [record for record in logs.records if record.name == "app.middleware"]
    assert "abc-1" in record.message
    assert "the secret inside" in str(record.exc_info[1])


def test_a_failure_of_ours_is_logged(client, logs):
    client.get("/InferenceError", headers={"X-Request-ID": "abc-2"})
    assert "request abc-2: what to do." in logs.text


def test_unknown_path_and_method(colours):
    answer = colours.get("/nowhere")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    answer = colours.get("/predict")
    assert (answer.status_code, answer.json()["code"], answer.headers["allow"]) == (405, "method_not_allowed", "POST")
    for method in ("HEAD", "OPTIONS", "PATCH", "PROPFIND"):
        assert colours.request(method, "/predict").status_code == 405
    assert colours.request("BREW", "/predict").status_code == 400  # no method that HTTP knows
