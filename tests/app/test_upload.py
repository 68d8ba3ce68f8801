"""One image a request, from a form or as the body; limits hold while it streams in; nothing is written to disk."""

import asyncio
import io
import random
import tempfile

import pytest
from PIL import Image
from starlette.datastructures import Headers

from app import upload
from app.errors import MultipartError

LIMIT = 100_000  # of the `colours` server


def png(colour="red", size=(4, 4)):
    with io.BytesIO() as file:
        Image.new("RGB", size, colour).save(file, "PNG")
        return file.getvalue()


def part(content, disposition='form-data; name="image"; filename="a.png"'):
    return b"--x\r\nContent-Disposition: " + disposition.encode() + b"\r\n\r\n" + content + b"\r\n"


def post_form(client, body, content_type="multipart/form-data; boundary=x"):
    return client.post("/predict", content=body, headers={"Content-Type": content_type})


def refused(answer):
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["code"]


@pytest.mark.parametrize("field", ["image", "file"])
def test_a_form(colours, field):
    answer = colours.post("/predict", files={field: ("any name", png("lime"), "text/plain")})
    assert answer.json()["prediction"]["label"] == "green"


@pytest.mark.parametrize(
    "kind", ["image/png", "image/jpeg", "IMAGE/*", "image/png; q=1", "application/octet-stream", None]
)
def test_a_raw_body_of_whatever_image_type_it_claims(colours, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = colours.post("/predict", content=png("blue"), headers=headers)
    assert answer.json()["prediction"]["label"] == "blue"


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "application/json", "imagine/png", "x" * 999])
def test_another_type_is_refused_with_advice(colours, kind):
    answer = colours.post("/predict", content=png(), headers={"Content-Type": kind})
    assert refused(answer) == (415, "unsupported_media_type")
    assert "-F image=@picture.jpg" in answer.json()["detail"]
    assert len(answer.json()["detail"]) < 500


# Limits


def padded(length):
    """A picture of exactly so many bytes: what follows a PNG's end does not matter."""
    return png().ljust(length, b"\0")


def in_chunks(content):
    for start in range(0, len(content), 1000):
        yield content[start : start + 1000]


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("form", [True, False])
def test_the_byte_limit_is_that_of_the_image_to_the_byte(colours, form, chunked):
    def post(content):
        body = part(content) + b"--x--\r\n" if form else content
        kind = "multipart/form-data; boundary=x" if form else "image/png"
        return post_form(colours, in_chunks(body) if chunked else body, kind)

    assert post(padded(LIMIT)).status_code == 200
    answer = post(padded(LIMIT + 1))
    assert refused(answer) == (413, "too_many_bytes")
    assert "more than 100000 bytes" in answer.json()["detail"]


@pytest.mark.parametrize("form", [True, False])
def test_an_endless_body_is_stopped_at_the_limit(colours, form):
    """The reader stops asking; httpx2 then reads the answer, though it has not sent everything."""
    sent = 0

    def endless():
        nonlocal sent
        yield part(b"")[:-2] if form else b""
        while sent < 200_000_000:
            sent += 50_000
            yield bytes(50_000)

    answer = post_form(colours, endless(), "multipart/form-data; boundary=x" if form else "image/png")
    assert refused(answer) == (413, "too_many_bytes")


@pytest.mark.parametrize("kind", ["image/png", "multipart/form-data; boundary=x"])
def test_a_declared_length_is_refused_before_a_byte_is_read(colours, raw_answer, kind):
    request = (
        f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: 200000000\r\n"
        "Expect: 100-continue\r\nConnection: close\r\n\r\n"
    )
    answer = raw_answer(colours, request.encode())
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"too_many_bytes"' in answer


@pytest.mark.parametrize(
    ("size", "status"), [((1000, 1000), 200), ((1000, 1001), 413), ((9000, 9000), 413), ((14_000, 14_000), 413)]
)
def test_the_pixel_limit_holds_before_decoding(colours, size, status):
    with io.BytesIO() as file:
        Image.new("1", size).save(file, "PNG")
        content = file.getvalue()
    answer = colours.post("/predict", content=content)
    assert answer.status_code == status
    if status == 413:
        assert answer.json()["code"] == "too_many_pixels"
        assert "the limit" in answer.json()["detail"]


def test_images_never_touch_the_disk(digits, monkeypatch, photos):
    def fail(self):
        raise AssertionError("rolled over to disk")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", fail)
    content = (photos / "astronaut.png").read_bytes().ljust(3 * 2**20, b"\0")
    assert digits.post("/predict", files={"image": content}).status_code == 200


# Forms that are none, or not ours


@pytest.mark.parametrize("empty", [{"content": b""}, {"files": {"image": b""}}])
def test_no_bytes(colours, empty):
    assert refused(colours.post("/predict", **empty)) == (400, "empty_image")


def test_no_image_field(colours):
    answer = colours.post("/predict", files={"picture": png(), "second": png()})
    assert refused(answer) == (422, "invalid_form")
    assert "'picture', 'second'" in answer.json()["detail"]


def test_more_than_the_image(colours):
    answer = colours.post("/predict", files={"image": png()}, data={"top_k": "3"})
    assert refused(answer) == (422, "invalid_form")
    assert "'top_k'" in answer.json()["detail"]
    answer = colours.post("/predict", files=[("image", png()), ("image", png())])
    assert refused(answer) == (422, "invalid_form")


def test_text_instead_of_a_file(colours):
    answer = post_form(colours, part(png(), 'form-data; name="image"') + b"--x--\r\n")
    assert refused(answer) == (422, "invalid_form")
    assert "-F image=@picture.jpg" in answer.json()["detail"]


def test_an_empty_form(colours):
    assert refused(post_form(colours, b"")) == (400, "invalid_multipart")
    assert refused(post_form(colours, b"--x--\r\n")) == (422, "invalid_form")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", part(b"")),
        ("multipart/form-data; boundary=", part(b"")),
        ("multipart/form-data; boundary=" + "y" * 9000, part(b"")),
        ("multipart/form-data; boundary=y", part(b"") + b"--x--\r\n"),
        ("multipart/form-data; boundary=x", b"no boundary at all"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\n1\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\nno colon\r\n\r\n1\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"A: b\r\n" * 5000 + b"\r\n1\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\nA: " + b"b" * 50_000 + b"\r\n\r\n1\r\n--x--\r\n"),
    ],
)
def test_forms_that_break_the_syntax(colours, kind, body):
    assert refused(post_form(colours, body, kind)) == (400, "invalid_multipart")


@pytest.mark.parametrize("disposition", ['form-data; name="image"; filename="a"', 'form-data; name="text"'])
def test_thousands_of_parts(colours, disposition):
    assert refused(post_form(colours, part(b"1", disposition) * 1500 + b"--x--\r\n")) == (400, "invalid_multipart")


def test_a_form_inside_a_form_is_no_image(colours):
    body = b"deep"
    for depth in range(200):
        body = b"--%d\r\nContent-Type: multipart/mixed; boundary=%d\r\n\r\n%b\r\n--%d--" % (depth, depth, body, depth)
    assert refused(post_form(colours, part(body) + b"--x--\r\n")) == (400, "invalid_image")


@pytest.mark.parametrize("cut", [1, 8, 30, 100])
def test_a_form_cut_off(colours, cut):
    answer = post_form(colours, (part(png()) + b"--x--")[:-cut])
    assert refused(answer) == (400, "invalid_multipart")
    assert "closing boundary" in answer.json()["detail"]


# The fast way through a plain form, against the general one

CONTENTS = [
    b"",
    b"x",
    b"\r\n",
    b"--x",
    b"\r\n--",
    b"\r\n--x",
    b"\r\n--xy",
    b"\r\n--x--",
    b"\r\n--x\r\n",
    bytes(range(256)),
]
NAMES = [b"image", b"file", b"images", b"a b", b""]
FILENAMES = [*[b'"; filename="a.png"'] * 9, b'"', b'"; filename=""', b'"; filename="\xc3\xa9"', b'"; filename=a']
TYPES = [*[b"", b"\r\nContent-Type: image/png"] * 5, b"\r\nContent-Type: text/plain; charset=x", b"\r\nX: y"]
PIECES = [
    b"--x", b"--", b"\r\n", b"\n", b"x", b"y", b" ", b";", b'"', b"\0", b"Content-Disposition: form-data; name=",
    b'Content-Disposition: form-data; name="image"; filename="a.png"', b"Content-Type: image/png",
    b'content-disposition: form-data; name="file"; filename=""', b"Content-Transfer-Encoding: base64", b"\xff",
]  # fmt: skip


def both_ways(body, content_type, max_parts):
    """What each parser says; None where it refuses."""
    try:
        headers = Headers({"Content-Type": content_type})
        general = asyncio.run(upload.general_parts(headers, body, max_parts))
    except MultipartError:
        general = None
    return upload.plain_parts(content_type, body, max_parts), general


def test_a_plain_form_as_clients_write_it_takes_the_fast_way():
    for client in (
        b'Content-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png',  # curl, browsers
        b'Content-Disposition: form-data; name="file"; filename="a b(1).jpeg"',  # requests
        b'Content-Disposition: form-data; name="image"; filename="blob"\r\nContent-Type: application/octet-stream',
    ):
        for content in (b"", png(), b"\r\n\r\n--y"):
            body = b"--x\r\n" + client + b"\r\n\r\n" + content + b"\r\n--x--\r\n"
            plain, general = both_ways(body, "multipart/form-data; boundary=x", 1)
            assert plain == general
            assert [part.content for part in plain] == [content]


@pytest.mark.parametrize("seed", range(20))
def test_the_fast_way_never_differs_from_the_general_one(seed):
    """Forms of every kind of part and content, then mutated: whatever the fast way takes, it takes as the other."""
    chance = random.Random(seed)
    taken = 0
    for _ in range(200):
        parts = [
            b"--x\r\nContent-Disposition: form-data; name=\""
            + chance.choice(NAMES) + chance.choice(FILENAMES) + chance.choice(TYPES)
            + b"\r\n\r\n" + b"".join(chance.choices(CONTENTS, k=chance.randrange(3))) + b"\r\n"
            for _ in range(chance.choice([0, 1, 1, 1, 2, 5]))
        ]  # fmt: skip
        body = b"".join(parts) + chance.choice([b"--x--\r\n", b"--x--"] * 4 + [b"--x--\r\nmore", b"--x-", b""])
        for _ in range(chance.choice([0, 0, 0, 1, 2])):
            place = chance.randrange(len(body) + 1)
            body = body[:place] + chance.choice(PIECES) + body[place + chance.randrange(3) :]
        kind = chance.choice(["multipart/form-data; boundary=x"] * 8 + ['multipart/form-data; boundary="x"; a=b'])
        plain, general = both_ways(body, kind, 3)
        if plain is not None:
            taken += 1
            assert plain == general, body
    assert taken > 10


def test_the_fast_way_keeps_the_limit_of_parts():
    for count in (3, 4):
        body = part(b"1", 'form-data; name="images"; filename="a"') * count + b"--x--"
        plain, general = both_ways(body, "multipart/form-data; boundary=x", 3)
        assert (plain is None) == (general is None) == (count > 3)
