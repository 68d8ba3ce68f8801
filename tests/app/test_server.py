"""One serving process: how it ends under load, and what slow, silent and endless clients get."""

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import httpx2
import pytest
from fastapi.responses import StreamingResponse

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


# Requests for another protocol, which are answered as if they did not ask, and those that wait to be told to go on

PICTURE = b"Content-Type: image/png\r\nContent-Length: %d\r\n\r\n%b" % (len(IMAGE), IMAGE)
PIECES = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (IMAGE[:9], IMAGE[9:]))
CHUNKED_PICTURE = b"Content-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n" + PIECES + b"0\r\n\r\n"
POST = b"POST /predict HTTP/1.1\r\nHost: x\r\n"
ASKING = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n",
    "websocket": b"UPGRADE: websocket\r\nCONNECTION: keep-alive, upgrade\r\nSec-WebSocket-Version: 13\r\n",
    "anything": b"upgrade: a/1, b/2\r\nX:\r\nconnection: UPGRADE\r\n",
}


def answers_to(client, pieces):
    """Status and label of each answer on one connection, until the server closes it."""
    found = []
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=30) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.002)  # so that it travels by itself
        with connection.makefile("rb") as answers:
            while head := b"".join(iter(answers.readline, b"\r\n")):
                body = json.loads(answers.read(int(re.search(rb"content-length: (\d+)", head).group(1))))
                found.append((int(head.split()[1]), body.get("prediction", {}).get("label")))
                if b"connection: close" in head:
                    assert answers.read() == b""
                    return found
    return found


def split(request, size):
    return [request[start : start + size] for start in range(0, len(request), size)]


@pytest.mark.parametrize("body", [PICTURE, CHUNKED_PICTURE], ids=["with its length", "in chunks"])
@pytest.mark.parametrize("asking", ASKING)
def test_who_asks_for_another_protocol_is_answered_in_this_one(digits, asking, body):
    request = POST + ASKING[asking] + body
    last = POST + b"Connection: close, Upgrade\r\nUpgrade: h2c\r\n" + body
    head, content = request[: -len(body)], body
    for pieces in (
        [request, last],
        [head, content, last],
        [head + content[:100], content[100:] + last],
        [request * 3 + POST + body + request + last],
        split(request + last, 7),
    ):
        answers = answers_to(digits, pieces)
        assert answers == [(200, "7")] * b"".join(pieces).count(b"POST /predict")


def test_who_asks_for_another_protocol_keeps_the_limits_of_this_one(colours, raw_answer):
    for asking in ASKING.values():
        for rest, status in (
            (b"Content-Length: 200000000\r\n\r\n", b"413"),
            (b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
            (b"A: " + b"b" * (MAX_HEAD_BYTES + 4096), b"400"),
        ):
            request = b"POST /predict HTTP/1.1\r\nHost: x\r\n" + asking + rest
            assert raw_answer(colours, request, half_close=True).startswith(b"HTTP/1.1 " + status)
    many = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: a\r\n\r\n" * 3000
    last = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert raw_answer(colours, many + last).count(b"HTTP/1.1 200 ") == 3001


def test_who_waits_to_be_told_to_go_on_is_told(digits):
    for asking in (b"", *ASKING.values()):
        with socket.create_connection((digits.base_url.host, digits.base_url.port), timeout=30) as connection:
            head, _, content = (POST + asking + b"Expect: 100-continue\r\n" + PICTURE).partition(b"\r\n\r\n")
            connection.sendall(head + b"\r\n\r\n")
            assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(content)
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.skipif(shutil.which("curl") is None, reason="takes curl")
def test_curl_sends_large_pictures(digits, tmp_path):
    """Above a megabyte it waits to be told to go on; those above the limit it does not send."""
    (tmp_path / "large.png").write_bytes(IMAGE.ljust(9 * 2**20, b"\0"))
    (tmp_path / "too-large.png").write_bytes(IMAGE.ljust(11 * 2**20, b"\0"))
    ask = [
        "curl",
        "-sS",
        "--noproxy",
        "*",
        "-w",
        "%{http_code} %{size_upload}",
        "-o",
        "/dev/null",
        "-H",
        "Expect: 100-continue",
    ]
    for name, status in (("large.png", "200"), ("too-large.png", "413")):
        for how in (["-F", f"image=@{name}"], ["-H", "Content-Type: image/png", "--data-binary", f"@{name}"]):
            done = subprocess.run(
                [*ask, *how, str(digits.base_url.join("/predict"))],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=True,
            )
            answered, sent = done.stdout.split()
            assert answered == status
            assert (int(sent) == 0) == (status == "413")


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


class Written:
    """A transport that says what was written to it, call by call."""

    def __init__(self, transport, calls):
        self._transport, self._calls = transport, calls

    def __getattr__(self, name):
        return getattr(self._transport, name)

    def write(self, data):
        self._calls.append(bytes(data))
        self._transport.write(data)

    def writelines(self, pieces):
        self._calls.append(b"".join(pieces))
        self._transport.writelines(pieces)


def test_an_answer_leaves_in_one_write(serve, colour_model, monkeypatch):
    """And the head of one that has no body, or that breaks off before it."""
    calls = []
    connection_made = Protocol.connection_made
    monkeypatch.setattr(Protocol, "connection_made", lambda self, given: connection_made(self, Written(given, calls)))
    app = create_app(Settings(), Repository([colour_model()]))

    @app.get("/broken")
    async def broken():
        async def pieces():
            raise RuntimeError("on purpose")
            yield b""

        return StreamingResponse(pieces(), headers={"Content-Length": "9"})

    with serve(app) as client:
        for _ in range(2):
            assert client.post("/predict", content=IMAGE, headers={"Content-Type": "image/png"}).status_code == 200
        assert client.head("/static/page.css").status_code == 200
        with pytest.raises(httpx2.RemoteProtocolError):
            client.get("/broken")
    *answers, empty, broken_off = calls
    assert [answer.count(b'"prediction"') > 0 for answer in answers] == [True, True]
    assert all(answer.startswith(b"HTTP/1.1 200 OK\r\n") for answer in calls)
    assert empty.endswith(b"\r\n\r\n")
    assert broken_off.endswith(b"\r\n\r\n")
