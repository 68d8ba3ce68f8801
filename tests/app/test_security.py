"""Keys: who has one may ask, who has the management key may load, and nothing that the server says shows one."""

import contextlib

import pytest
from fastapi import Depends

from app.main import create_app
from app.repository import Repository
from app.security import OPEN_PATHS, load_keys, require_management
from app.settings import Settings, SettingsError

FIRST, SECOND, MANAGEMENT = "first-key-1", "second-key-2", "management-key-3"


@pytest.fixture
def guarded(serve, colour_model):
    @contextlib.contextmanager
    def start(**settings):
        app = create_app(Settings(**settings), Repository([colour_model()]))
        app.add_api_route("/manage", lambda: "done", dependencies=[Depends(require_management)])
        with serve(app) as client:
            yield client

    return start


def test_without_keys_everybody_may_ask(colours):
    assert colours.get("/models").status_code == 200


@pytest.mark.parametrize("key", [FIRST, SECOND, MANAGEMENT])
def test_every_key_opens_by_either_header(guarded, key):
    with guarded(api_keys=f"{FIRST}, {SECOND}", management_key=MANAGEMENT) as client:
        assert client.get("/models", headers={"X-API-Key": key}).status_code == 200
        for scheme in ("Bearer", "bearer"):
            assert client.get("/models", headers={"Authorization": f"{scheme} {key}"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": ""},
        {"X-API-Key": FIRST[:-1]},
        {"X-API-Key": f"{FIRST},{SECOND}"},
        {"Authorization": f"Basic {FIRST}"},
        {"Authorization": FIRST},
        {"Authorization": "Bearer"},
        {"X-API-Key": b"caf\xc3\xa9"},
    ],
)
def test_anything_else_is_refused(guarded, headers):
    with guarded(api_keys=f"{FIRST},{SECOND}") as client:
        answer = client.get("/models", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["x-request-id"] == answer.json()["request_id"]


def test_probes_and_metrics_stay_open_and_nothing_else_does(guarded):
    with guarded(api_keys=FIRST) as client:
        for path in ("/healthz", "/readyz", "/metrics"):
            assert client.get(path).status_code == 200
        for path in OPEN_PATHS:
            assert client.get(path).status_code != 401
        for path in (
            "/docs",
            "/openapi.json",
            "/static",
            "/statically",
            "/nowhere",
            "/healthz/",
            "/Healthz",
        ):
            assert client.get(path).status_code == 401
        assert client.post("/predict", content=b"x").status_code == 401


def test_a_refused_body_is_not_read(guarded, raw_answer):
    """The answer comes although the body never does."""
    with guarded(api_keys=FIRST) as client:
        answer = raw_answer(
            client, b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nConnection: close\r\n\r\n"
        )
        assert answer.startswith(b"HTTP/1.1 401 ")


def test_keys_of_a_file_and_of_the_variable_both_count(guarded, tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{SECOND}\n\n{MANAGEMENT} \r\n")
    with guarded(api_keys=FIRST, api_keys_file=file) as client:
        for key in (FIRST, SECOND, MANAGEMENT):
            assert client.get("/models", headers={"X-API-Key": key}).status_code == 200


def test_management_is_off_without_its_key(guarded):
    with guarded(api_keys=FIRST) as client:
        answer = client.get("/manage", headers={"X-API-Key": FIRST})
        assert (answer.status_code, answer.json()["code"]) == (403, "management_off")


def test_management_takes_its_own_key(guarded):
    with guarded(api_keys=FIRST, management_key=MANAGEMENT) as client:
        for headers in ({"X-API-Key": FIRST}, {}, {"Authorization": f"Bearer {MANAGEMENT}x"}):
            answer = client.get("/manage", headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
        assert client.get("/manage", headers={"X-API-Key": MANAGEMENT}).status_code == 200
        both = {"X-API-Key": FIRST, "Authorization": f"Bearer {MANAGEMENT}"}
        assert client.get("/manage", headers=both).status_code == 200


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"api_keys": " , "}, "INTERFLOW_API_KEYS holds no key"),
        ({"api_keys": f"{FIRST},sec ret"}, "INTERFLOW_API_KEYS: key 2 of 2 holds a character"),
        ({"management_key": "sécret"}, "INTERFLOW_MANAGEMENT_KEY: key 1 of 1 holds a character"),
        ({"api_keys_file": b"\n\n"}, "INTERFLOW_API_KEYS_FILE holds no key"),
        ({"api_keys_file": b"\xff\xfe"}, "which cannot be read (not text)"),
        ({"api_keys_file": None}, "which cannot be read (No such file or directory)"),
    ],
)
def test_keys_that_cannot_be_used_stop_the_start(tmp_path, settings, expected):
    if "api_keys_file" in settings:
        file, content = tmp_path / "keys", settings["api_keys_file"]
        if content is not None:
            file.write_bytes(content)
        settings = {"api_keys_file": file}
    with pytest.raises(SettingsError) as caught:
        load_keys(Settings(**settings))
    assert expected in str(caught.value)
    assert "ret" not in str(caught.value).replace("secretly", "")


def test_no_key_is_shown(guarded, logs):
    settings = {"api_keys": FIRST, "management_key": MANAGEMENT}
    shown = repr(Settings(**settings)) + str(Settings(**settings))
    with guarded(**settings) as client:
        for headers in ({"X-API-Key": FIRST}, {"Authorization": f"Bearer {MANAGEMENT}"}, {"X-API-Key": "wrong-key-9"}):
            for path in ("/models", "/nowhere", "/manage", "/metrics"):
                shown += client.get(path, headers=headers).text
    shown += logs.text
    assert "/models" in shown
    for key in (FIRST, MANAGEMENT, "wrong-key-9"):
        assert key not in shown
