"""One serving process: how it ends under load, and what slow, silent and endless clients get."""

import asyncio
import re
import signal
import socket
import threading
from collections import Counter
from pathlib import Path

import httpx2
import pytest

from app.main import create_app
from app.repository import Repository
from app.server import MAX_HEAD_BYTES, Protocol
from app.settings import Settings

IMAGE = Path("app/static/examples/digits-7.png").read_bytes()
REQUEST = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n%b" % (
    len(IMAGE),
    IMAGE,
)


def address_of(process):
    return process.stdout.readline().split(" on ")[1].split(";")[0]


async def ask_until_refused(address, outcomes, fresh):
    """One client that asks again and again: on new connections, or on one for as long as the server keeps it."""
    host, port = re.search(r"//([\d.]+):(\d+)", address).groups()
    connection = None
    while True:
        try:
            connection = connection or await asyncio.open_connection(host, port)
        except ConnectionRefusedError:
            return
        reader, writer = connection
        try:
            writer.write(REQUEST)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", head).group(1)))
            outcomes[head.split()[1].decode()] += 1
        except (OSError, asyncio.IncompleteReadError) as error:
            outcomes[type(error).__name__] += 1
            return
        if fresh or b"connection: close" in head:
            writer.close()
            connection = None


def load_until_it_ends(address, end, clients=16):
    """What so many clients were answered, from before `end` is called until nobody listens any more."""
    outcomes = Counter()

    async def run():
        asking = [asyncio.create_task(ask_until_refused(address, outcomes, number % 2)) for number in range(clients)]
        while outcomes["200"] < 5 * clients:
            await asyncio.sleep(0.01)
        end()
        await asyncio.gather(*asking)

    asyncio.run(run())
    return outcomes


@pytest.mark.parametrize("workers", [1, 2])
def test_under_load_every_accepted_request_is_answered(start, workers):
    process = start(provider="cpu", workers=workers, drain_s=1)
    lines = []
    with process.stdout, process.stderr:
        # read all along, for a full pipe would hold up the server
        reading = threading.Thread(target=lambda: lines.extend(process.stderr))
        reading.start()
        outcomes = load_until_it_ends(address_of(process), process.terminate)
        assert process.wait(timeout=60) == 0
        reading.join()
    assert set(outcomes) == {"200"}
    assert outcomes["200"] == sum("app.access: POST /predict 200 " in line for line in lines)


def test_while_it_drains_it_answers_and_says_that_it_is_not_ready(start):
    process = start(provider="cpu", drain_s=60)
    with httpx2.Client(base_url=address_of(process), trust_env=False, timeout=60) as client:
        assert client.get("/readyz").status_code == 200
        process.terminate()
        while client.get("/readyz").status_code == 200:
            pass
        for path in ("/readyz", "/v2/health/ready"):
            assert client.get(path).status_code == 503
        assert client.get("/readyz").json()["code"] == "draining"
        assert client.get("/healthz").status_code == 200
        answer = client.post("/predict", content=IMAGE)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)  # the second signal
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT


@pytest.fixture
def impatient(serve, colour_model):
    """A server that waits for half a second, and no longer."""
    app = create_app(Settings(body_timeout_s=0.5, keep_alive_s=1), Repository([colour_model()]))
    with serve(app) as client:
        yield client


def test_a_body_that_does_not_come_is_408_and_the_connection_ends(impatient, raw_answer):
    for body in (b"", b"x" * 10):
        answer = raw_answer(impatient, b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + body)
        head, _, problem = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in head.lower()
        assert b'"code":"body_timeout"' in problem


def test_a_body_that_drips_has_no_more_time_than_one_that_waits(impatient):
    with socket.create_connection((impatient.base_url.host, impatient.base_url.port), timeout=30) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        stop = threading.Event()

        def drip():
            while not stop.wait(0.1):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        finally:
            stop.set()
            thread.join()
    assert impatient.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "start_of_head", [b"", b"\r\n", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: b"]
)
def test_a_head_that_does_not_come_ends_the_connection(impatient, raw_answer, start_of_head):
    assert raw_answer(impatient, start_of_head) == b""


def test_a_head_without_end_is_400(colours, raw_answer):
    endless = b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: " + b"b" * (MAX_HEAD_BYTES + 4096)
    assert raw_answer(colours, endless).startswith(b"HTTP/1.1 400 ")
    assert colours.get("/healthz", headers={"A": "b" * 1000}).status_code == 200


def test_requests_that_come_together_are_answered_in_order(colours, raw_answer):
    paths = (b"/healthz", b"/nowhere", b"/readyz")
    last = b"GET /models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    together = b"".join(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path for path in paths) + last
    assert re.findall(rb"HTTP/1.1 (\d+)", raw_answer(colours, together)) == [b"200", b"404", b"200", b"200"]


def test_answers_are_not_held_back(serve, colour_model, monkeypatch):
    """Without TCP_NODELAY every answer on a kept connection would take 40 ms more."""
    seen = []
    connection_made = Protocol.connection_made

    def look(self, transport):
        seen.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        connection_made(self, transport)

    monkeypatch.setattr(Protocol, "connection_made", look)
    with serve(create_app(Settings(), Repository([colour_model()]))) as client:
        client.get("/healthz")
    assert seen == [1]
