"""The application on Ray Serve: the routes' own tests against it, replicas killed under load, and models that change.

All of that is slow, for one small Ray Serve in a process of its own (`ray_serve.py`).
"""

import asyncio
import importlib
import inspect
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FunctionType, SimpleNamespace

import httpx2
import pytest
from PIL import Image

from app.main import create_app
from app.settings import Settings, SettingsError

pytest.importorskip("ray.serve")

from app import cluster
from benchmarks.servers import family

ROOT = Path(__file__).parents[2]
PATIENCE_S = 2
"""INTERFLOW_BODY_TIMEOUT_S of the proxies."""


def encoded(colour="red"):
    with io.BytesIO() as file:
        Image.new("RGB", (7, 5), colour).save(file, "PNG")
        return file.getvalue()


# One small Ray Serve


class Cluster:
    """A Ray Serve of two logical CPUs, and the applications of `ray_serve.py`."""

    def __init__(self, process, port, exports):
        self.process = process
        self.port = port
        self.exports = exports

    def wait_for(self, word):
        """Ray, too, writes to its output."""
        lines = iter(self.process.stdout.readline, "")
        assert any(line.strip() == word for line in lines), "it ended"

    @contextmanager
    def client(self, name):
        address = f"http://127.0.0.1:{self.port}/{name.removeprefix('colours')}"
        with httpx2.Client(base_url=address, timeout=60, trust_env=False) as client:
            yield client

    def change(self, user_config, **settings):
        """Deploy the application `two` again."""
        self.process.stdin.write(json.dumps({"user_config": user_config, "settings": settings}) + "\n")
        self.process.stdin.flush()
        self.wait_for("done")

    def replicas(self):
        """Process ids of the replicas of `two`."""
        titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in family(self.process.pid)}
        return [pid for pid, title in titles.items() if title.startswith(b"ray::ServeReplica:two:")]


@pytest.fixture(scope="session")
def ray_cluster(bundled, only_bundled, tmp_path_factory):
    both, two, state = (tmp_path_factory.mktemp(name) for name in ("both", "two", "state"))
    for name in ("cifar10", "digits"):
        shutil.copytree(bundled.parents[1] / name / "1", both / name / "1")
    shutil.copytree(bundled, two / "digits" / "1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"port": port, "digits": only_bundled, "both": both, "two": two, "state": state}
    environment = os.environ | {
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # the environment is here already
        "PYTHONPATH": str(ROOT),
        "INTERFLOW_BODY_TIMEOUT_S": str(PATIENCE_S),
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_raylet_start_wait_time_s": "90",  # where many tests run beside it, its 30 s do not suffice
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.app.ray_serve", json.dumps(given, default=str)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process.stdin, process.stdout:
        try:
            started = Cluster(process, port, two)
            started.wait_for("ready")
            yield started
        finally:
            everybody = [os.pidfd_open(pid) for pid in family(process.pid)]
            process.stdin.close()
            with_grace = threading.Timer(60, process.kill)
            with_grace.start()
            process.wait()
            with_grace.cancel()
            for handle in everybody:  # Ray's own, were it not to end
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                os.close(handle)


@pytest.fixture(scope="session")
def colours(ray_cluster):
    with ray_cluster.client("colours") as client:
        yield client


@pytest.fixture(scope="session")
def layered(ray_cluster):
    with ray_cluster.client("layered") as client:
        yield client


@pytest.fixture(scope="session")
def digits(ray_cluster):
    with ray_cluster.client("digits") as client:
        yield client


@pytest.fixture(scope="session")
def both(ray_cluster):
    with ray_cluster.client("both") as client:
        yield client


# The routes' own tests: those that ask a server which stands for all of them. The others make an application of their
# own, with a network or a clock that they hold in their hands, and know it in this very process.
LIVE = {"colours", "layered", "digits", "both"}
HERE = {"serve", "logs", "monkeypatch", "caplog", "start", "measure", "measured"}
OTHERWISE = {
    "test_one_model_is_its_card_and_its_runtime": "its provider is `auto`; a replica is told whether it has a GPU",
    "test_the_readmes_example_runs": "it speaks to an address, and `digits` is below a path of it here",
}
MODULES = ("adaptive", "explain", "health", "maps", "models", "predict", "v2")


def _slow(test):
    """A copy, for a mark would make the test itself slow."""
    copy = FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    copy.pytestmark = [*getattr(test, "pytestmark", []), pytest.mark.slow.mark]
    return copy


def _routes_tests():
    for module in MODULES:
        tests = vars(importlib.import_module(f"tests.app.routes.test_{module}"))
        for name, test in tests.items():
            if name.startswith("test_") and inspect.isfunction(test) and name not in OTHERWISE:
                asked = set(inspect.signature(test).parameters)
                if asked & LIVE and not asked & HERE:
                    yield f"{name}_by_{module}", _slow(test)
                    yield from ((fixture, tests[fixture]) for fixture in asked & tests.keys())


globals().update(_routes_tests())


# Replicas and models that come and go


class Load:
    """Clients that ask as fast as they are answered, until the block ends; every answer is looked at."""

    def __init__(self, ray_cluster, clients=6):
        self.answers = Counter()
        self._cluster = ray_cluster
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self._clients = clients
        self._image = (ROOT / "app/static/examples/digits-7.png").read_bytes()

    def __enter__(self):
        self._running = [self._pool.submit(self._ask) for _ in range(self._clients)]
        return self

    def __exit__(self, *_):
        self._end.set()
        for running in self._running:
            self.answers.update(running.result())
        self._pool.shutdown()

    def _ask(self):
        answers = Counter()
        with self._cluster.client("two") as client:
            while not self._end.is_set():
                try:
                    answer = client.post("/predict", content=self._image)
                    answers[answer.status_code, answer.json()["prediction"]["label"]] += 1
                except (httpx2.HTTPError, KeyError, ValueError) as error:
                    answers[repr(error)] += 1
        return answers


def until(found, patience_s=60):
    """Wait for something to be true."""
    deadline = time.monotonic() + patience_s
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_no_request_fails_when_a_replica_is_killed_under_load(ray_cluster):
    until(lambda: len(ray_cluster.replicas()) == 2)
    with Load(ray_cluster) as load:
        time.sleep(2)
        first, second = ray_cluster.replicas()
        os.kill(first, signal.SIGKILL)
        until(lambda: first not in ray_cluster.replicas())
        until(lambda: len(ray_cluster.replicas()) == 2)  # another was started
        assert second in ray_cluster.replicas()
        time.sleep(2)
    assert set(load.answers) == {(200, "7")}
    assert load.answers.total() > 50


@pytest.mark.slow
def test_models_and_settings_change_on_every_replica_and_no_request_fails(ray_cluster, bundled, rewrite_card):
    until(lambda: len(ray_cluster.replicas()) == 2)
    with ray_cluster.client("two") as client, Load(ray_cluster) as load:

        def everywhere(version, max_queue=512):
            """Of 30 answers from two replicas."""
            told = [client.get("/model").json() for _ in range(30)]
            return {(one["version"], one["runtime"]["max_queue"]) for one in told} == {(version, max_queue)}

        assert everywhere("1")
        folder = ray_cluster.exports / "digits" / "2"
        shutil.copytree(bundled, folder)
        rewrite_card(folder, version="2")
        key = {"X-API-Key": "secret"}
        assert client.post("/v2/repository/models/digits/load", headers=key).status_code == 200
        until(lambda: everywhere("2"))  # the other followed through INTERFLOW_STATE_DIR
        before = set(ray_cluster.replicas())
        ray_cluster.change({"models": {"digits": {"specific": {"versions": [1]}}}})
        until(lambda: everywhere("1"))
        ray_cluster.change({"models": {"digits": {"specific": {"versions": [7]}}}})
        time.sleep(1)
        assert everywhere("1")  # there is no 7: what was loaded stays
        assert set(ray_cluster.replicas()) == before
        ray_cluster.change({"models": {"digits": {"latest": {"num_versions": 1}}}}, max_queue=300)
        until(lambda: everywhere("2", 300))
        assert not before & set(ray_cluster.replicas())  # a rolling update
    assert set(load.answers) == {(200, "7")}
    assert load.answers.total() > 50


# What the routes' tests above know only in their own process, and what the proxies say


@pytest.mark.slow
def test_health_metrics_and_adaptive_answers(both):
    assert both.get("/healthz").json() == {"status": "alive"}
    assert [model["name"] for model in both.get("/readyz").json()["models"]] == ["cifar10", "digits"]
    image = (ROOT / "app/static/examples/cat.jpg").read_bytes()
    answer = both.post("/predict?model=cifar10&mode=adaptive&max_loss=0.01", content=image).json()
    assert answer["prediction"]["label"] == "cat"
    assert "exit" in answer
    assert 'interflow_adaptive_answers_total{model="cifar10"' in both.get("/metrics").text


@pytest.mark.slow
def test_the_deadline_of_a_request(ray_cluster):
    with ray_cluster.client("slow") as client:
        answer = client.post("/predict", content=encoded(), headers={"X-Request-Timeout-Ms": "50"})
        assert (answer.status_code, answer.json()["code"]) == (504, "deadline_passed")
        until(lambda: client.post("/predict", content=encoded()).status_code == 200)


def parsed(raw):
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    return int(lines[0].split()[1]), dict(line.split(": ", 1) for line in lines[1:]), body


@pytest.mark.slow
def test_more_requests_than_may_wait_are_told_to_come_again(ray_cluster):
    """One runs for half a second, one waits for it in the proxy; six come."""
    with ray_cluster.client("slow") as client, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: client.post("/predict", content=encoded()), range(6)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 1 <= len(refused) <= 4
    for answer in refused:
        problem = answer.json()
        assert (answer.status_code, problem["code"]) == (429, "queue_full")
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["retry-after"] == "1"
        assert answer.headers.get_list("x-request-id") == [problem["request_id"]]


@pytest.mark.slow
def test_a_body_that_does_not_come_holds_no_replica(ray_cluster, raw_answer):
    half = b"POST /slow/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf"
    with ThreadPoolExecutor(4) as pool, ray_cluster.client("slow") as client:
        waiting = [pool.submit(raw_answer, client, half) for _ in range(4)]
        time.sleep(0.5)
        assert client.get("/healthz").status_code == 200  # it takes one request at a time
        for answer in waiting:
            status, headers, body = parsed(answer.result())
            assert (status, json.loads(body)["code"]) == (408, "body_timeout")
            assert headers["connection"] == "close"


@pytest.mark.slow
@pytest.mark.parametrize("given", ["mine", "forged id", "x" * 129])
def test_one_request_id_everywhere(colours, given):
    answer = colours.get("/nowhere", headers={"X-Request-ID": given})
    (identity,) = answer.headers.get_list("x-request-id")
    assert answer.json()["request_id"] == identity
    assert (identity == given) == (given == "mine")


# The deployment by itself


def test_without_ray_one_sentence_says_what_to_install():
    code = "import sys; sys.modules['ray'] = None\nimport app.cluster"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "InterflowError: ray is not installed" in done.stderr.splitlines()[-1]
    assert "uv sync --extra cluster" in done.stderr.splitlines()[-1]


def test_settings_are_the_environments(monkeypatch):
    monkeypatch.setenv("INTERFLOW_MAX_QUEUE", "300")
    (settings,) = cluster.app({})._bound_deployment.init_args
    assert settings.max_queue == 300
    with pytest.raises(SettingsError, match="takes no arguments, but 'max_queue' was given; set INTERFLOW_MAX_QUEUE"):
        cluster.app({"max_queue": "300"})
    monkeypatch.setenv("INTERFLOW_MAX_QUEUE", "none")
    with pytest.raises(SettingsError, match="INTERFLOW_MAX_QUEUE is 'none'"):
        cluster.app({})


def test_models_that_only_one_replica_would_load(monkeypatch, tmp_path):
    monkeypatch.setenv("INTERFLOW_MANAGEMENT_KEY", "secret")
    with pytest.raises(SettingsError, match=r"one replica alone\. Set INTERFLOW_STATE_DIR"):
        cluster.app({})
    monkeypatch.setenv("INTERFLOW_STATE_DIR", str(tmp_path))
    cluster.app({})


def test_a_model_that_user_config_names_no_more_has_its_newest_version_again(only_bundled, rewrite_card, tmp_path):
    """Else a replica that starts later would serve another one under the same address."""
    exports = tmp_path / "exports"
    shutil.copytree(only_bundled, exports)
    shutil.copytree(exports / "digits" / "1", exports / "digits" / "2")
    rewrite_card(exports / "digits" / "2", version="2")

    app = create_app(Settings(exports=exports, provider="cpu"))
    # not made by Ray, whose class has a `__del__` that somebody must await
    replica = SimpleNamespace(_app=app, _configured=True, _named=set())

    async def serve_in_turn(*configs):
        versions = []
        async with app.router.lifespan_context(app):
            for config in configs:
                await cluster.Replica.func_or_class.reconfigure(replica, config)
                versions.append([model.card.version for model in app.state.repository.models])
        return versions

    pinned = {"models": {"digits": {"specific": {"versions": [1]}}}}
    assert asyncio.run(serve_in_turn({}, pinned, {"models": {}}, None)) == [["2"], ["1"], ["2"], ["2"]]


def test_a_user_config_that_cannot_be_used():
    assert cluster.read_user_config(None).models == {}
    with pytest.raises(SettingsError, match=r"user_config of the deployment cannot be used.*`model`"):
        cluster.read_user_config({"model": {}})


@pytest.mark.parametrize(
    ("given", "usable", "expected"),
    [
        ({"CPU": 1}, 16, {"workers": 9, "provider": "cpu", "decode_workers": 1}),
        ({"CPU": 4}, 16, {"workers": 4, "provider": "cpu", "decode_workers": 4}),
        ({"CPU": 6}, 16, {"workers": 3, "provider": "cpu", "decode_workers": 6}),
        ({"CPU": 16}, 16, {"workers": 1, "provider": "cpu", "decode_workers": 16}),
        ({}, 2, {"workers": 2, "provider": "cpu", "decode_workers": 1}),
        ({"CPU": 4, "GPU": 1}, 16, {"workers": 1, "provider": "cuda", "decode_workers": 4}),
        ({"CPU": 2, "GPU": 0.25}, 16, {"workers": 4, "provider": "cuda", "decode_workers": 2}),
    ],
)
def test_a_replica_takes_the_cpus_and_the_gpu_that_it_was_given(monkeypatch, given, usable, expected):
    context = SimpleNamespace(get_assigned_resources=lambda: given)
    monkeypatch.setattr(cluster.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(cluster, "usable_cpus", lambda processes=1: max(1, usable // processes))
    own = cluster.own_settings(Settings())
    assert {name: getattr(own, name) for name in expected} == expected
    assert not own.pinning
    if "GPU" not in given:
        assert usable // own.workers <= max(1, given.get("CPU", 0))
    assert cluster.own_settings(Settings(provider="cpu", decode_workers=3)).decode_workers == 3
