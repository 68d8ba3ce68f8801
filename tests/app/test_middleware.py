"""The request id is the client's where it is sane, else ours; header and body agree."""

import pytest


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
