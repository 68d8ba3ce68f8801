"""What stands in Ray Serve's proxies, without Ray: a stand-in for the proxy answers as it is told."""

import asyncio
import json

import pytest

from app.cluster_proxy import TRIES, InFront
from app.settings import Settings


class Proxy:
    """Stands for Ray's: answers as told, one after the other, and keeps what it was given."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.given = []

    async def __call__(self, scope, receive, send):
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message.get("more_body"):
                break
        self.given.append((dict(scope["headers"]), body))
        for message in self.answers.pop(0):
            await send(message)


class Gone(Proxy):
    """Looks whether the client is still there before it answers, as Ray's does all the while."""

    async def __call__(self, scope, receive, send):
        await super().__call__(scope, receive, send)
        await receive()


LOST = ()


def said(status, body=b"fine", kind=b"application/json", *headers):
    start = {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), *headers]}
    return start, {"type": "http.response.body", "body": body}


def ask(proxy, *pieces, settings=None, headers=(), then=None, whole=None):
    """What the client gets: status, headers, body.

    Args:
        pieces: of its body.
        then: what comes when nothing of that is left; without, nothing.
        whole: the last piece is the last; else where nothing comes.
    """
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages[-1]["more_body"] = not (then is None if whole is None else whole)
    sent = []

    async def receive():
        if messages:
            return messages.pop(0)
        return await (then or asyncio.Event().wait)()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/predict", "method": "POST", "headers": list(headers), "query_string": b""}
    asyncio.run(InFront(proxy, settings or Settings())(scope, receive, send))
    start, *bodies = sent
    assert [message["type"] for message in sent] == ["http.response.start", *["http.response.body"] * len(bodies)]
    return (
        start["status"],
        [(name.lower(), value) for name, value in start["headers"]],
        b"".join(message["body"] for message in bodies),
    )


def test_a_lost_replica_is_made_up_for_by_another():
    proxy = Proxy(LOST, said(200))
    assert ask(proxy, b"an ", b"image")[::2] == (200, b"fine")
    (first, body), second = proxy.given
    assert second == (first, body)
    assert body == b"an image"


def test_one_that_died_between_head_and_body_is_lost_as_well():
    head, _ = said(200)
    assert ask(Proxy((head,), said(200)), b"image")[::2] == (200, b"fine")


def test_a_request_that_kills_its_replicas_does_not_meet_all_of_them():
    proxy = Proxy(*[LOST] * TRIES, said(200))
    status, headers, body = ask(proxy, b"image")
    assert (status, json.loads(body)["code"]) == (503, "replica_lost")
    assert dict(headers)[b"retry-after"] == b"1"
    assert len(proxy.given) == TRIES


@pytest.mark.parametrize(("status", "code"), [(404, "not_found"), (429, "queue_full"), (503, "not_ready")])
def test_what_the_proxy_says_by_itself_is_a_problem(status, code):
    proxy = Proxy(said(status, b"Ray's words", b"text/plain; charset=utf-8", (b"retry-after", b"3")))
    answered, headers, body = ask(proxy, b"image", headers=[(b"x-request-id", b"mine")])
    problem = json.loads(body)
    assert (answered, problem["code"], problem["request_id"]) == (status, code, "mine")
    assert (b"content-type", b"application/problem+json") in headers
    assert (b"retry-after", b"3") in headers


def test_what_the_application_says_goes_through():
    """Its metrics are text, and its problems are as they are."""
    assert ask(Proxy(said(200, b"metrics", b"text/plain")), b"")[::2] == (200, b"metrics")
    assert ask(Proxy(said(429, b"ours", b"application/problem+json")), b"")[::2] == (429, b"ours")


@pytest.mark.parametrize("given", [None, b"mine", b"forged\nid", b"x" * 129])
def test_the_proxy_and_the_application_are_told_one_sane_id(given):
    proxy = Proxy(said(200, b"fine", b"text/plain", (b"x-request-id", b"one"), (b"X-Request-ID", b"one")))
    _, headers, _ = ask(proxy, b"", headers=[(b"x-request-id", given)] if given else [])
    ((told, _),) = proxy.given
    assert (told[b"x-request-id"] == given) == (given == b"mine")
    assert headers.count((b"x-request-id", b"one")) == 1


def test_a_slow_body_is_given_up_before_a_replica_is_asked():
    proxy = Proxy(said(200))
    status, headers, body = ask(
        proxy, b"half", settings=Settings(body_timeout_s=0.05), then=lambda: asyncio.Event().wait()
    )
    assert (status, json.loads(body)["code"]) == (408, "body_timeout")
    assert (b"connection", b"close") in headers
    assert proxy.given == []


def test_all_bodies_together_are_limited():
    limits = dict.fromkeys(("max_total_bytes", "max_bytes", "max_batch_bytes", "max_tensor_bytes"), 1000)
    proxy = Proxy(said(200))
    status, _, body = ask(proxy, b"x" * 66_000, b"x" * 1000, settings=Settings(**limits))
    assert (status, json.loads(body)["code"]) == (429, "body_budget_spent")
    assert proxy.given == []


def test_nobody_is_asked_for_a_client_that_went_away():
    """Before its body was here, or while it waited: then Ray gives up without an answer, and no replica was lost."""

    async def leave():
        return {"type": "http.disconnect"}

    for pieces, expected in [([b"half"], 0), ([b"whole"], 1)]:
        proxy = Gone(LOST, LOST)
        with pytest.raises(ValueError, match="unpack"):  # it gets nothing
            ask(proxy, *pieces, then=leave, whole=bool(expected))
        assert len(proxy.given) == expected


def test_a_body_larger_than_any_route_takes_goes_through_as_it_comes():
    """The application refuses it by its Content-Length, as on one machine; there is no second try."""
    proxy = Proxy(said(413, b"ours"))
    settings = Settings(**dict.fromkeys(("max_bytes", "max_batch_bytes", "max_tensor_bytes"), 1000))
    size = str(70_000).encode()
    assert ask(proxy, b"x" * 70_000, settings=settings, headers=[(b"content-length", size)])[0] == 413
    assert ask(Proxy(LOST), b"x" * 70_000, settings=settings, headers=[(b"content-length", size)])[0] == 503
