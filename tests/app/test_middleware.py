"""Around requests: ids are the client's where they are sane, else ours; prefixes; pages of other origins."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from app.main import create_app
from app.middleware import RequestIdMiddleware
from app.repository import Repository
from app.settings import Settings


@pytest.mark.parametrize("given", ["a", "0f8e-1", "trace/1:2=x@y+z._", "x" * 128])
def test_a_sane_id_is_kept(colours, given):
    assert colours.get("/healthz", headers={"X-Request-ID": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [b"", b"x" * 129, b"two words", b"caf\xc3\xa9", b"<b>", b'"', b"a,b"])
def test_another_id_is_replaced(colours, given):
    made = colours.get("/healthz", headers={b"X-Request-ID": given}).headers["x-request-id"]
    assert len(made) == 32
    assert made != given.decode("latin-1")


def test_every_request_gets_an_id_of_its_own(colours):
    answers = [colours.get("/nowhere") for _ in range(3)]
    ids = {answer.json()["request_id"] for answer in answers}
    assert len(ids) == 3
    assert ids == {answer.headers["x-request-id"] for answer in answers}


@pytest.mark.parametrize(
    ("path", "draining"), [("/predict", True), ("/v2/models/digits/infer", True), ("/predict", False)]
)
def test_what_the_end_of_the_server_cuts_off_is_answered(path, draining):
    """Uvicorn cancels the requests that take longer than the end may; others that are cancelled stay cancelled."""
    messages = []

    async def send(message):
        messages.append(message)

    async def run():
        begun = asyncio.Event()

        async def app(scope, receive, send):
            begun.set()
            await asyncio.sleep(60)

        state = SimpleNamespace(draining=draining)
        scope = {"type": "http", "path": path, "headers": [], "app": SimpleNamespace(state=state)}
        task = asyncio.create_task(RequestIdMiddleware(app)(scope, None, send))
        await begun.wait()
        task.cancel()
        await task

    if not draining:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(run())
        assert messages == []
        return
    asyncio.run(run())
    assert messages[0]["status"] == 503
    body = json.loads(messages[1]["body"])
    assert "the server ends" in (body["error"] if path.startswith("/v2") else body["detail"])


@pytest.fixture(scope="module")
def below(serve):
    """A server of no model below /eyes, for the pages of one other origin."""
    settings = Settings(root_path="/eyes/", cors_origins="https://a.example, https://b.example", api_keys="key-1")
    with serve(create_app(settings, Repository())) as client:
        yield client


@pytest.mark.parametrize("prefix", ["", "/eyes"])
def test_a_path_prefix_may_be_cut_off_by_the_proxy_or_not(below, prefix):
    assert below.get(f"{prefix}/healthz").status_code == 200
    headers = {"X-API-Key": "key-1"}
    assert below.get(f"{prefix}/models").status_code == 401
    assert below.get(f"{prefix}/models", headers=headers).status_code == 503
    assert below.get(f"{prefix}/static/examples/digits-7.png", headers=headers).status_code == 200
    assert below.get(f"{prefix}/openapi.json", headers=headers).json()["servers"] == [{"url": "/eyes"}]
    assert below.get(f"{prefix}/eyesight", headers=headers).status_code == 404


def test_the_prefix_alone_leads_to_the_page(below):
    answer = below.get("/eyes", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, "/eyes/")
    assert "<html" in below.get("/eyes", follow_redirects=True).text


def test_pages_of_the_origins_may_ask_and_others_may_not(below):
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    answer = below.options("/predict", headers=preflight | {"Origin": "https://b.example"})
    assert answer.status_code == 200  # a preflight bears no key
    assert answer.headers["access-control-allow-origin"] == "https://b.example"
    assert "x-api-key" in answer.headers["access-control-allow-headers"].lower()
    assert below.options("/predict", headers=preflight | {"Origin": "https://c.example"}).status_code == 400
    for origin, expected in (("https://a.example", "https://a.example"), ("https://c.example", None)):
        answer = below.get("/models", headers={"Origin": origin})  # errors can be read, too
        assert answer.headers.get("access-control-allow-origin") == expected
        assert answer.headers["x-request-id"]
    readable = below.get("/models", headers={"Origin": "https://a.example"}).headers["access-control-expose-headers"]
    assert {"X-Request-ID", "X-Interflow-Sum", "X-Interflow-Limit", "X-Interflow-Class"} <= set(readable.split(", "))


def test_without_the_setting_no_page_of_another_origin_may_ask(colours):
    assert "access-control-allow-origin" not in colours.get("/model", headers={"Origin": "https://a.example"}).headers


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/static/page.css",
        "/healthz",
        "/readyz",
        "/model",
        "/metrics",
        "/v2/health/live",
        "/docs",
        "/nowhere",
        "/predict",
    ],
)
def test_head_is_answered_as_get_without_the_body(colours, raw_answer, path):
    whole = colours.get(path)
    head = raw_answer(colours, f"HEAD {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert head.endswith(b"\r\n\r\n")
    assert head.count(b"\r\n\r\n") == 1
    lines = head.decode().lower().split("\r\n")
    assert lines[0].startswith(f"http/1.1 {whole.status_code} ")
    assert f"content-type: {whole.headers['content-type'].lower()}" in lines
    if path not in ("/metrics", "/nowhere", "/predict"):  # which are another length each time
        assert f"content-length: {whole.headers['content-length']}" in lines


def test_head_is_counted_and_logged_as_what_it_is(colours):
    count = 'interflow_requests_total{code="200",method="HEAD",route="/healthz"} '
    before = [line for line in colours.get("/metrics").text.splitlines() if line.startswith(count)]
    colours.head("/healthz")
    (after,) = [line for line in colours.get("/metrics").text.splitlines() if line.startswith(count)]
    assert float(after.removeprefix(count)) == (float(before[0].removeprefix(count)) if before else 0) + 1
