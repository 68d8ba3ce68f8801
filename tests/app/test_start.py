"""`python -m app` as a process: what it says, what it refuses, and how it ends."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from app.listener import bind
from app.settings import Settings

ROOT = Path(__file__).parents[2]


def finish(process):
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def expect_refusal(process, *expected):
    code, output, errors = finish(process)
    assert (code, output) == (1, "")
    assert errors.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in errors
    for words in expected:
        assert words in errors.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_and_ends_with_0_on_a_signal(start, photos, number):
    process = start(provider="cpu")
    greeting = process.stdout.readline()
    assert greeting.startswith("serving digits version ")
    address = greeting.split(" on ")[1].split(";")[0]
    with httpx2.Client(base_url=address, trust_env=False, timeout=60) as client:
        assert client.get("/readyz").status_code == 200
        assert client.post("/predict", files={"image": (photos / "camera.png").read_bytes()}).status_code == 200
        process.send_signal(number)
        code, _, errors = finish(process)
    assert code == 0
    assert "Traceback" not in errors
    assert "POST /predict" in errors  # the access log


def test_answers_are_not_held_back():
    """asyncio sets TCP_NODELAY on connections of a listener that names its protocol, and on no other."""
    with bind(Settings(port=0)) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_a_port_in_use(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        expect_refusal(
            start(port=port), f"cannot listen on 127.0.0.1 port {port}: address already in use", "INTERFLOW_PORT"
        )


def test_a_host_that_is_not_here(start):
    expect_refusal(start(host="192.0.2.1"), "cannot listen on 192.0.2.1", "INTERFLOW_HOST")


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 300, ".", "a b"])
def test_a_host_that_is_none(start, host):
    expect_refusal(start(host=host), "cannot listen on", "INTERFLOW_HOST")


def test_a_bad_setting(start):
    expect_refusal(start(port="http"), "INTERFLOW_PORT is 'http'")


def test_no_model(start, tmp_path):
    expect_refusal(start(exports=tmp_path), f"no model is in {tmp_path}")


def test_a_broken_model(start, artefact):
    model = artefact / "model.onnx"
    model.write_bytes(model.read_bytes()[:100_000])
    expect_refusal(
        start(exports=artefact.parents[1]), "model.onnx: not a readable ONNX model", "Export the model again."
    )


def test_a_card_at_odds_with_its_graph(start, artefact, rewrite_card):
    rewrite_card(artefact, classes=[f"class {i}" for i in range(10)], metadata=False)
    expect_refusal(start(exports=artefact.parents[1]), "the card inside differs from model.json in `classes`")


def test_help_lists_every_setting(start):
    code, output, _ = finish(start("--help"))
    assert code == 0
    for name in Settings.model_fields:
        assert f"INTERFLOW_{name.upper()} " in output
    assert "10485760" in output


def test_arguments_are_refused(start):
    code, _, errors = finish(start("--port", "80"))
    assert code == 2
    assert "unrecognized arguments: --port 80" in errors


def test_uvicorns_own_start_works(only_bundled):
    """`uvicorn app.main:app` serves as `python -m app` does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "app.main:app", "--port", str(port)]
    environment = os.environ | {"INTERFLOW_EXPORTS": str(only_bundled)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if "Uvicorn running" in line:
                break
        assert httpx2.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200
    finally:
        process.terminate()
        process.communicate(timeout=60)
