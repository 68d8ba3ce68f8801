"""Bodies of all requests together have a budget: what they hold is counted, and given back however a request ends."""

import asyncio
import contextlib
import gzip
import io
import json
import socket
import threading
import time

import httpx2
import numpy as np
import pytest
from PIL import Image

from app.bodies import FREE_BYTES
from app.main import create_app
from app.repository import Repository
from app.settings import Settings

MB = 10**6
LIMIT = 1_000_000
"""Of one request, and of all together."""
INFER = "/v2/models/colours/infer"


def padded(length, colour="blue"):
    """A picture of exactly so many bytes: what follows a PNG's end does not matter."""
    with io.BytesIO() as file:
        Image.new("RGB", (4, 4), colour).save(file, "PNG")
        return file.getvalue().ljust(length, b"\0")


class Held:
    """A server and what it counts; its network waits while it is told to."""

    def __init__(self, app, network):
        self.state = app.state
        self.network = network
        self.client: httpx2.Client

    def require(self, held):
        """Bytes are counted, and given back, just before and just after the other side sees something of it."""
        until = time.monotonic() + 20
        while self.state.bodies.held != held and time.monotonic() < until:
            time.sleep(0.005)
        assert self.state.bodies.held == held


@pytest.fixture
def held(serve, colour_model, colour_network):
    class Waiting:
        go = threading.Event()
        broken = False

        def run(self, images, names, thresholds=None, *, alone=False):
            self.go.wait(30)
            if self.broken:
                raise RuntimeError("broken")
            return colour_network.run(images, names)

    network = Waiting()
    network.go.set()
    limits = dict.fromkeys(("max_bytes", "max_batch_bytes", "max_tensor_bytes", "max_total_bytes"), LIMIT)
    app = create_app(Settings(**limits, body_timeout_s=2), Repository([colour_model(network)]))
    server = Held(app, network)
    with serve(app) as server.client:
        yield server
        network.go.set()
        server.require(0)


def connect(client):
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)


def head(length, path="/predict"):
    return b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % (
        path.encode(),
        length,
    )


def part(content, name="image"):
    return b'--x\r\nContent-Disposition: form-data; name="%b"; filename="a"\r\n\r\n%b\r\n--x--\r\n' % (
        name.encode(),
        content,
    )


def tensors(images):
    tensor = {
        "name": "image",
        "shape": images.shape,
        "datatype": "UINT8",
        "parameters": {"binary_data_size": images.size},
    }
    asked = json.dumps(
        {"inputs": [tensor], "outputs": [{"name": "logits", "parameters": {"binary_data": True}}]}
    ).encode()
    return asked + images.tobytes(), {"Inference-Header-Content-Length": str(len(asked))}


FORM = {"Content-Type": "multipart/form-data; boundary=x"}
IMAGES = np.zeros((10_000, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/predict", padded(500_000), {}, 200),
        ("/predict", part(padded(500_000)), FORM, 200),
        ("/predict/batch", part(padded(500_000), "images"), FORM, 200),
        (INFER, *tensors(IMAGES), 200),
        ("/predict", b"\0" * 500_000, {}, 400),
        ("/predict", b"\0" * 500_000, FORM, 400),
        ("/predict", part(padded(500_000), "other"), FORM, 422),
        ("/predict", padded(LIMIT + 1), {}, 413),
        (INFER, b"{" * 500_000, {}, 400),
        ("/predict?model=none", padded(500_000), {}, 404),
    ],
)
@pytest.mark.parametrize("chunked", [True, False])
def test_given_back_when_it_was_answered_or_refused(held, path, body, headers, status, chunked):
    for _ in range(3):  # together more than the budget
        sent = iter([body[:200_000], body[200_000:]]) if chunked else body
        assert held.client.post(path, content=sent, headers=headers).status_code == status
    held.require(0)


def test_a_failure_gives_it_back(held, caplog):
    held.network.broken = True
    assert held.client.post("/predict", content=padded(500_000)).status_code == 500
    held.require(0)


def test_held_until_the_answer_and_others_are_refused_meanwhile(held):
    held.network.go.clear()
    with connect(held.client) as connection:
        connection.sendall(head(LIMIT) + padded(LIMIT))
        held.require(LIMIT - FREE_BYTES)
        for path in ("/predict", INFER):
            answer = held.client.post(path, content=padded(FREE_BYTES + 100_000))
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"].startswith("the bodies of all requests together would hold more than 1000000 ")
        answer = held.client.post("/predict", content=padded(FREE_BYTES + 100_000))
        assert answer.json()["code"] == "body_budget_spent"
        assert "INTERFLOW_MAX_TOTAL_BYTES" in answer.json()["detail"]
        held.require(LIMIT - FREE_BYTES)
        small = {"X-Request-Timeout-Ms": "100"}
        assert held.client.post("/predict", content=padded(FREE_BYTES), headers=small).status_code == 504  # but not 429
        held.network.go.set()
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    held.require(0)
    assert held.client.post("/predict", content=padded(LIMIT)).status_code == 200


def test_the_deadline_and_a_client_that_hangs_up_give_it_back(held):
    held.network.go.clear()
    body, late = padded(500_000), {"X-Request-Timeout-Ms": "50"}
    assert held.client.post("/predict", content=body, headers=late).status_code == 504
    held.require(0)
    for sent, counted in ((body, 500_000), (body[:300_000], 300_000)):
        with connect(held.client) as connection:
            connection.sendall(head(500_000) + sent)
            held.require(counted - FREE_BYTES)
        held.require(0)


def test_a_body_that_does_not_come_gives_back_what_came(held):
    with connect(held.client) as connection:
        connection.sendall(head(500_000) + padded(300_000))
        held.require(300_000 - FREE_BYTES)
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        held.require(0)


def test_who_is_refused_leaves_room_for_the_others_at_once(held, monkeypatch):
    """Of three that together are too many, the one that meets the limit goes, and the other two are whole."""
    monkeypatch.setattr(held.state, "refusals", HeldBack())
    size = 500_000
    with contextlib.ExitStack() as stack:
        first, *others = (stack.enter_context(connect(held.client)) for _ in range(3))
        for count, connection in enumerate((first, *others), 1):
            connection.sendall(head(size) + padded(size)[:350_000])
            held.require(count * (350_000 - FREE_BYTES))
        first.sendall(bytes(150_000))
        held.require(2 * (350_000 - FREE_BYTES))
        for connection in others:
            connection.sendall(bytes(150_000))
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        held.state.refusals.go = True
        assert first.recv(100).startswith(b"HTTP/1.1 429 ")


class HeldBack:
    """Keeps refusals back until it is told to let them go."""

    go = False

    async def keep(self, deadline):
        while not self.go:
            await asyncio.sleep(0.01)


def test_what_a_body_inflates_to_counts_in_its_place(held):
    body, headers = tensors(IMAGES)
    headers |= {"Content-Encoding": "gzip", "Content-Type": "application/octet-stream"}
    packed = gzip.compress(body)
    assert len(packed) < FREE_BYTES < len(body)
    held.network.go.clear()
    answers = []
    asking = threading.Thread(target=lambda: answers.append(held.client.post(INFER, content=packed, headers=headers)))
    asking.start()
    held.require(len(body) - FREE_BYTES)
    assert len(body) + 700_000 > LIMIT + 2 * FREE_BYTES
    assert held.client.post(INFER, content=bytes(700_000)).json()["error"].startswith("the bodies of all requests")
    held.network.go.set()
    asking.join()
    assert answers[0].status_code == 200


def test_many_who_stall_in_large_bodies_hold_no_more_than_the_budget(measure):
    size, budget, senders = 30 * MB, 100 * MB, 30
    limits = dict.fromkeys(("max_bytes", "max_batch_bytes", "max_tensor_bytes"), size)
    answers = []

    def stall(connection):
        with contextlib.suppress(OSError):  # in the end we hang up
            connection.sendall(head(size) + bytes(size - 1))
            answers.append(connection.recv(100))

    def abuse():
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(connect(measured.client)) for _ in range(senders)]
            stalling = [threading.Thread(target=stall, args=(connection,)) for connection in connections]
            for thread in stalling:
                thread.start()
            while len(answers) < senders - budget // size:
                measured.require_honest_answer()
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            for thread in stalling:
                thread.join()

    with measure(max_total_bytes=budget, body_timeout_s=60, **limits) as measured:
        assert measured.growth(abuse) < budget + 30 * MB
        assert all(answer.startswith(b"HTTP/1.1 429 ") for answer in answers if answer)
        assert measured.client.post("/predict", content=padded(size)).status_code == 200
