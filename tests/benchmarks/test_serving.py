"""The measurements of serving: wrk is read right, medians and ratios are right, and no server outlives them."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from app.upload import plain_parts
from benchmarks import servers, wrk
from benchmarks.client import Client
from benchmarks.material import Images, find_model, read_card, tensor_request
from benchmarks.servers import ServerError, free_port, running
from benchmarks.serving import Measurement
from benchmarks.serving_report import BARE, LARGE, LEAST, OURS, ROUTE, SMALL, bare, draw, figure, ratios, table
from benchmarks.soak import checker, growth
from model.contract import ExitPolicy, InterflowError

ROOT = Path(__file__).parents[2]
OUTPUT = """Running 2s test @ http://127.0.0.1:8000/predict
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    19.21ms    5.10ms  81.02ms   88.11%
  3,001 requests in 2.00s, 4.92MB read
  Non-2xx or 3xx responses: 12
Requests/sec:   1500.50

RESULT {"requests": 3001, "seconds": 2.000500, "p50_ms": 18.250, "p99_ms": 43.100, "refused": 12, "broken": 3, """
OUTPUT += '"statuses": {"200": 2989, "429": 12}}\n'
needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")


# wrk


def test_the_output_of_wrk_is_read():
    load = wrk.parse(OUTPUT)
    assert load == wrk.Load(3001, 2.0005, 18.25, 43.1, 12, 3, {"200": 2989, "429": 12})
    assert load.per_second == pytest.approx((3001 - 12) / 2.0005)
    assert load.errors == 15


def test_output_without_a_result_is_refused():
    with pytest.raises(InterflowError, match="printed 0 lines that begin with RESULT"):
        wrk.parse("unable to connect to 127.0.0.1:1 Connection refused\n")


def test_without_wrk_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InterflowError, match=r"^wrk is not installed; on Debian and Ubuntu: apt-get install wrk\.$"):
        wrk.require_wrk()


def test_a_form_holds_the_image(tmp_path):
    file = tmp_path / "picture.jpg"
    file.write_bytes(b"\xff\xd8 not really \r\n")
    body = wrk.multipart(file, "image")
    parts = plain_parts(f"multipart/form-data; boundary={wrk.BOUNDARY}", body, 20)
    assert parts is not None
    assert [(part.field, part.content) for part in parts] == [("image", file.read_bytes())]


class _Counting(BaseHTTPRequestHandler):
    """Refuses every third request."""

    protocol_version = "HTTP/1.1"
    bodies: list[bytes]

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(429 if len(self.bodies) % 3 == 0 else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def counting() -> Iterator[tuple[int, list[bytes]]]:
    """Port of a server that refuses every third request, and the bodies that it had."""
    handler = type("Handler", (_Counting,), {"bodies": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1], handler.bodies
        server.shutdown()
        thread.join()


@needs_wrk
@pytest.mark.parametrize("pause_s", [0, 0.05])
def test_wrk_sends_the_bodies_in_turn_and_counts(counting, pause_s):
    port, bodies = counting
    load = wrk.load(
        f"http://127.0.0.1:{port}/", [b"one", b"two"], ["X-Kind: a: b"], connections=1, seconds=1, pause_s=pause_s
    )
    assert bodies[1:5] == [b"two", b"one", b"two", b"one"] or bodies[1:5] == [b"one", b"two", b"one", b"two"]
    assert 0 < load.requests <= len(bodies)
    assert load.refused == load.requests // 3
    assert load.broken == 0
    assert 0 < load.p50_ms <= load.p99_ms
    if pause_s:
        assert load.requests <= 1 + load.seconds / pause_s
        assert load.statuses == {"200": load.requests - load.refused, "429": load.refused}
    else:
        assert load.statuses == {}


# Figures


def _record(server: str, round_: int, images: str, connections: int, **values: float) -> dict:
    standard = {"requests": 1000, "seconds": 1.0, "p50_ms": 10.0, "p99_ms": 40.0, "refused": 0, "broken": 0}
    return {"server": server, "round": round_, "images": images, "connections": connections, **standard, **values}


@pytest.fixture
def run() -> dict:
    """Three rounds: ours at 1600, by hand at 800 and 1000, LitServe at 500, bare onnxruntime at 2000."""
    records = []
    for round_, more in enumerate([0, 500, -500], 1):  # the median is that of the first
        records += [{"server": BARE, "round": round_, "batch": 32, "per_second": 2000 + more}]
        for connections in (1, 32, 128):
            for server, rate in ((OURS, 1600), ("by hand, 1", 800), ("by hand, 2", 1000), ("LitServe", 500)):
                records += [_record(server, round_, SMALL, connections, requests=rate + more)]
                records += [_record(server, round_, LARGE, connections, requests=(300 if server == OURS else 50))]
        records += [_record(OURS, round_, ROUTE, 4, requests=30) | {"batch": 64}]
    conditions = {
        "cpu": "a CPU",
        "usable CPUs": 2,
        "system": "Linux",
        "Python": "3.11",
        "versions": {"wrk": "4"},
        "peers": ["litserve==1"],
        "model": {"name": "m", "backbone": "vgg16 S3 x0.5", "sha256": "0" * 64},
        "images": {SMALL: {"count": 16, "mean_bytes": 1000}},
        "connections": [1, 32, 128],
        "seconds": 1,
        "warm-up seconds": 1,
        "rounds": 3,
        "wrk command": "wrk",
    }
    return {
        "id": "1",
        "started": "2026-01-01",
        "conditions": conditions,
        "records": records,
        "failures": {"BentoML": "it ended."},
    }


def test_figures_are_medians_and_errors_are_sums(run):
    run["records"][1] |= {"refused": 100, "broken": 7, "p50_ms": 99.0, "p99_ms": 400.0}
    found = figure(run, OURS, SMALL, 1)
    assert found.per_second == 1500  # of 1500, 2100 and 1100: what was refused is no good answer
    assert found.spread == (1100, 2100)
    assert (found.p50_ms, found.p99_ms) == (10, 40)
    assert (found.errors, found.requests) == (107, 1600 + 2100 + 1100 + 7)
    assert figure(run, "BentoML", SMALL, 1) is None
    assert bare(run) == 2000
    assert bare(run, 1) is None


def test_the_ratios_are_those_that_were_asked_for(run):
    found = {ratio.what: (ratio.value, ratio.verdict) for ratio in ratios(run)}
    assert found[f"ours / bare onnxruntime in batches of 32; {SMALL}, 32 connections"] == (0.8, "yes")
    assert found[f"ours / LitServe; {SMALL}, 128 connections"] == (3.2, "yes")
    assert found[f"ours / best by hand; {SMALL}, 32 connections"] == (1.6, "yes")
    assert found[f"ours / best by hand; {LARGE}, 1 connection"] == (6, "yes")
    assert found[f"p99 of ours, ms; {SMALL}, 32 connections"] == (40, "yes")
    assert found["images/s of binary tensors in batches of 64 / bare onnxruntime in batches of 32"] == (0.96, "yes")


def test_what_is_not_reached_or_not_measured_is_said(run):
    run["records"] = [record for record in run["records"] if record["server"] != "LitServe"]
    for record in run["records"]:
        if record["server"] == OURS:
            record["p99_ms"] = 46.0
    verdicts = {ratio.what: ratio.verdict for ratio in ratios(run)}
    assert verdicts[f"ours / LitServe; {SMALL}, 32 connections"] == "not measured"
    assert verdicts[f"p99 of ours, ms; {SMALL}, 32 connections"] == "no"


def test_table_and_picture_show_all(run, tmp_path):
    text = table(run)
    assert f"| ours | {SMALL} | 32 | 1,600.0 | 1,100.0 to 2,100.0 | 10.0 | 40.0 | 0 of 4,800 |" in text
    assert "BentoML was not measured: it ended." in text
    draw(run, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


# Runs that go on


def test_a_run_goes_on_under_its_conditions_alone(tmp_path):
    file = tmp_path / "serving.json"
    first = Measurement({"seconds": 8, "peers": ("a",)}, file, None)
    first.fail("LitServe", "it ended.")
    first.add("ours", 1, [{"requests": 5}])
    again = Measurement({"seconds": 8, "peers": ("a",)}, file, first.run["id"])
    assert again.has("ours", 1)
    assert not again.has("ours", 2)
    again.add("LitServe", 1, [{"requests": 3}])
    kept = json.loads(file.read_text())
    assert [record["server"] for record in kept["records"]] == ["ours", "LitServe"]
    assert kept["failures"] == {}
    with pytest.raises(InterflowError, match="its seconds was 8, and is 4 now"):
        Measurement({"seconds": 4, "peers": ("a",)}, file, first.run["id"])
    with pytest.raises(InterflowError, match="holds the run"):
        Measurement({"seconds": 8}, file, "another")


# Servers


def test_a_server_that_does_not_start_is_told_of_with_its_last_words(tmp_path):
    command = [sys.executable, "-c", "print('no such model'); exit(3)"]
    with (
        pytest.raises(ServerError, match=r"ended with 3 before it was ready; its last words: no such model"),
        running(command, {}, free_port(), "/", tmp_path / "log"),
    ):
        pass


def test_no_process_of_a_server_is_left(tmp_path, monkeypatch):
    """Not even of one that takes no notice of SIGTERM and has a child in a session of its own."""
    monkeypatch.setattr(servers, "END_S", 0.5)
    child = "import time; time.sleep(600)"
    script = (
        "import http.server, os, signal, subprocess, sys\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(os.environ['PORT'])), Handler).serve_forever()\n"
    )
    port = free_port()
    with running([sys.executable, "-c", script], {"PORT": str(port)}, port, "/", tmp_path / "log") as server:
        members = servers.family(server.process.pid)
        assert len(members) == 2
        assert server.memory_bytes() > 10 * 2**20
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{member}/cmdline").exists() for member in members) and time.monotonic() < deadline:
        time.sleep(0.05)
    # an orphan that was killed may wait for init to take note
    states = [Path(f"/proc/{member}/stat") for member in members]
    assert all(not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z" for state in states)


# Checks of answers


def _answer(label: str, confidence: float, version: str) -> bytes:
    return json.dumps(
        {"model": {"version": version}, "prediction": {"label": label, "confidence": confidence}}
    ).encode()


def test_an_answer_is_held_against_its_image_and_its_version():
    logits = np.array([[np.log(3), 0.0], [0.0, np.log(4)]])  # 3 to 1, and 1 to 4
    branch_logits = np.stack([[[0, np.log(9)], [0, np.log(9)]], logits], axis=1)  # the first stage: always a dog
    images = Images("two", [], np.empty(0), logits, branch_logits, ["cat", "dog"])
    policies = [
        ExitPolicy(max_loss=loss, thresholds=(limit,), accuracy=1, work=1, stops=(0.5, 0.5))
        for loss, limit in ((0.01, 0.91), (0.1, 0.89))
    ]
    card = read_card(ROOT / "exports" / "digits" / "1").model_copy(
        update={"classes": ("cat", "dog"), "reading_scales": ((1, 1),) * 2, "power": 1, "exits": tuple(policies)}
    )
    check = checker(images, card, {"1": 1.0, "2": 2.0})
    assert check(0, _answer("cat", 0.75, "1")) is None
    assert check(1, _answer("dog", 0.8, "1")) is None
    assert check(1, _answer("dog", 2 / 3, "2")) is None  # half the logits: 1 to 2
    assert check(1, _answer("cat", 0.8, "1")) == "cat instead of dog"
    assert "confidence 0.8 instead of 0.667" in check(1, _answer("dog", 0.8, "2"))
    assert check(0, _answer("cat", 0.75, "3")) == "version 3, which is not there"
    adaptive = checker(images, card, {"1": 1.0}, max_loss=0.1)  # of which the first stage is sure enough, or not
    assert adaptive(0, _answer("dog", 0.9, "1")) is None
    assert adaptive(0, _answer("cat", 0.75, "1")) == "cat instead of dog"
    assert checker(images, card, {"1": 1.0}, max_loss=0.01)(0, _answer("cat", 0.75, "1")) is None


def _ask_a_server_that(answers: list[bytes]) -> tuple[Client, int]:
    """Ask over one connection at a time a server that gives these answers, one each, and then closes.

    Returns:
        The client, and how many connections it took.
    """
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError):  # the client closed
            while answers:
                await reader.readuntil(b"end")
                writer.write(answers.pop(0))
        client.stopping = not answers
        writer.close()

    def check(_: int, body: bytes) -> str | None:
        return None if body == b"ok" else body.decode()

    async def run() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", port):
            await client.keep_asking(1)

    port = free_port()
    client = Client(port, "/", [b"end"], check)
    asyncio.run(run())
    return client, connections


def test_the_client_tells_right_wrong_refused_and_missing_answers_apart():
    client, connections = _ask_a_server_that(
        [
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad",
            b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nok",
        ]
    )
    assert client.tally.statuses == {200: 2, 429: 1}
    assert connections == 2  # the third answer closes
    assert client.tally.wrong == ["bad"]
    assert len(client.tally.lost) == 1
    assert "IncompleteReadError" in client.tally.lost[0]
    assert len(client.tally.latencies_ms) == 2


def test_a_connection_that_cannot_be_had_is_lost_unless_the_server_was_told_to_end():
    for may_be_refused, lost in ((False, 2), (True, 0)):
        client = Client(free_port(), "/", [b""], lambda *_: None)
        client.may_be_refused = may_be_refused
        asyncio.run(client.keep_asking(2))
        assert len(client.tally.lost) == lost


def test_growth_leaves_out_the_start():
    assert growth([1] * 9) is None
    assert growth([1, 50, 100, 100, 100, 100, 100, 100, 100, 100]) == 0
    assert growth([*range(100, 200)]) == pytest.approx(189.5 / 129.5 - 1)


# Material


def test_a_model_is_found_by_its_folder_or_its_newest_version(tmp_path):
    for version in ("2", "10"):
        (tmp_path / "m" / version).mkdir(parents=True)
        (tmp_path / "m" / version / "model.onnx").touch()
    assert find_model(tmp_path / "m", tmp_path) == tmp_path / "m" / "10"
    assert find_model(tmp_path / "m" / "2", tmp_path) == tmp_path / "m" / "2"
    with pytest.raises(InterflowError, match="expected a folder that holds"):
        find_model(tmp_path, tmp_path)


def test_a_tensor_request_is_json_and_then_the_pixels():
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    body, json_bytes = tensor_request(pixels, 3)
    said = json.loads(body[:json_bytes])
    assert said["inputs"][0]["shape"] == [3, 4, 4, 3]
    assert said["inputs"][0]["parameters"]["binary_data_size"] == len(body) - json_bytes
    assert body[json_bytes:] == pixels.tobytes() + pixels[0].tobytes()


# Whole, and small


def _python(*arguments: str, timeout: int = 500) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The artefact of random weights that the commands make where no model is shipped."""
    from benchmarks.material import make_model

    return make_model(tmp_path_factory.mktemp("exports"))


@pytest.mark.slow
@needs_wrk
def test_serving_measures_this_server_one_by_hand_and_the_least(model, tmp_path):
    given = ("--quick", "--only", "ours", "by-hand", "least", "--connections", "1", "4", "--model", str(model))
    done = _python("benchmarks/serving.py", *given, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "serving.json").read_text())
    assert kept["failures"] == {}
    measured = [(record["server"], record.get("images")) for record in kept["records"]]
    assert measured.count((OURS, SMALL)) == measured.count((OURS, LARGE)) == 2
    assert measured.count((OURS, ROUTE)) == 1
    by_hand = next(name for name, _ in measured if name.startswith("by hand"))
    assert figure(kept, OURS, SMALL, 4).per_second > 0
    assert figure(kept, by_hand, SMALL, 4).per_second > 0
    assert figure(kept, LEAST, LARGE, 4).per_second > 0
    assert figure(kept, LEAST, LARGE, 4).errors == 0
    assert figure(kept, OURS, SMALL, 4).errors == 0
    assert bare(kept) > 0
    assert (tmp_path / "serving.md").read_text() == table(kept)
    assert (tmp_path / "serving.png").exists()


@pytest.mark.slow
@needs_wrk
def test_sigterm_under_load_loses_no_request(model, tmp_path):
    given = ("drain", "--times", "1", "--seconds", "2", "--connections", "16", "--model", str(model))
    done = _python("benchmarks/soak.py", *given, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok   ") == 4
    assert json.loads((tmp_path / "soak-drain.json").read_text())["drains"][0]["exit"] == 0
