"""The application: light to import, loads when it starts, documents itself."""

import asyncio
import subprocess
import sys

import pytest

from app.main import create_app
from app.session import ModelError
from app.settings import Settings, SettingsError

ERRORS = {
    "/predict": {"400", "401", "404", "408", "413", "415", "422", "429", "500", "503", "504"},
    "/model": {"401", "404", "422", "503"},
    "/readyz": {"503"},
}


def test_importing_loads_neither_torch_nor_models_nor_settings(tmp_path):
    """In an environment that may have torch, from a folder without exports, under a setting that is wrong."""
    code = (
        "import app.main, sys; assert app.main.app.title == 'Interflow';"
        "print(sorted({'torch', 'torchvision', 'safetensors', 'training'} & set(sys.modules)))"
    )
    environment = {"INTERFLOW_PORT": "wrong"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_models_are_loaded_when_the_server_starts(serve, artefact):
    with serve(create_app(Settings(exports=artefact.parents[1]))) as client:
        assert client.get("/readyz").json()["models"][0]["name"] == "digits"


def start(app):
    async def enter():
        async with app.router.lifespan_context(app):
            pass

    asyncio.run(enter())


def test_a_start_that_fails_says_why(monkeypatch, tmp_path):
    with pytest.raises(ModelError, match="no model is in"):
        start(create_app(Settings(exports=tmp_path)))
    monkeypatch.setenv("INTERFLOW_PORT", "wrong")
    with pytest.raises(SettingsError, match="INTERFLOW_PORT is 'wrong'"):
        start(create_app())


def test_static_files_are_served_and_nothing_above_them(colours):
    for path in (
        "/static/nothing.png",
        "/static/..%2fmain.py",
        "/static/../main.py",
        "/static/%00",
        "/static/examples",
    ):
        answer = colours.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_openapi_tells_both_forms_of_request_and_the_form_of_errors(colours):
    document = colours.get("/openapi.json").json()
    predict = document["paths"]["/predict"]["post"]
    assert set(predict["requestBody"]["content"]) == {"multipart/form-data", "image/*", "application/octet-stream"}
    assert [parameter["name"] for parameter in predict["parameters"]] == [
        "model",
        "version",
        "top_k",
        "layers",
        "explain",
        "mode",
        "max_loss",
    ]
    for path, statuses in ERRORS.items():
        (operation,) = document["paths"][path].values()
        assert set(operation["responses"]) == statuses | {"200"}
        for status in statuses:
            assert list(operation["responses"][status]["content"]) == ["application/problem+json"]
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_openapi_tells_shares_from_gates_and_that_nobody_gets_them_unasked(colours):
    schemas = colours.get("/openapi.json").json()["components"]["schemas"]
    told = schemas["LayerAttention"]["properties"]["kind"]["description"]
    assert "share: the weights sum to 1" in told
    assert "gate (MRLA-light): each is a number in 0..1 by itself, and they do not sum to 1" in told
    unasked = set(schemas["Answer"]["properties"]) - set(schemas["Answer"]["required"])
    assert unasked == {"doubt", "exit", "layer_attention", "maps"}
