"""What strangers send: a client's mistake is a 4xx that says so, never a 5xx, and the next request is answered."""

import io
import random
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

FORMATS = {
    "JPEG": {},
    "PNG": {},
    "WEBP": {},
    "GIF": {},
    "BMP": {},
    "TIFF": {"compression": "tiff_lzw"},
}


def sample(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, kind, **FORMATS[kind])
        return file.getvalue()


def truncated(content):
    yield from (content[:length] for length in (1, 2, 4, 8, 12, 26, 40, len(content) // 2, len(content) - 1))


def mutated(content):
    chance = random.Random(0)
    for _ in range(60):
        changed = bytearray(content)
        for _ in range(chance.choice((1, 4, 32))):
            changed[chance.randrange(min(len(changed), chance.choice((32, 200, len(changed)))))] = chance.randrange(256)
        yield bytes(changed)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("damage", [truncated, mutated])
def test_damaged_images(colours, kind, damage):
    def post(content):
        return colours.post("/predict", content=content)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(post, damage(sample(kind))))
    for answer in answers:
        assert answer.status_code in (200, 400, 413)
        if answer.status_code != 200:
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["code"] in ("invalid_image", "too_many_pixels")
    assert any(answer.status_code == 400 for answer in answers)
    assert post(sample(kind)).status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b"GIF89a",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"P6 1 1 255 abc",
        b"\0" * 5000,
        b"<html>",
    ],
)
def test_other_files(colours, content):
    answer = colours.post("/predict", content=content, headers={"Content-Type": "image/png"})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_image")


def test_a_tiff_of_a_kind_that_pillow_cannot_read(colours, photos):
    answer = colours.post("/predict", files={"image": (photos / "multipage_rgb.tif").read_bytes()})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_image")


def test_a_png_that_lies_about_its_size(colours):
    """A header of 30,000 x 30,000 before a few bytes: refused by the header, without the 2.7 GB."""
    content = sample("PNG")
    header = b"IHDR" + (30_000).to_bytes(4) * 2 + content[24:29]
    content = content[:12] + header + zlib.crc32(header).to_bytes(4) + content[33:]
    answer = colours.post("/predict", content=content)
    assert (answer.status_code, answer.json()["code"]) == (413, "too_many_pixels")


HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        HEAD + b"X-Large: " + b"x" * 200_000 + b"\r\n\r\n",
        HEAD + b"X-Many: x\r\n" * 20_000 + b"\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nab",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nnonsense\r\n",
        b"POST /predict?model=\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / SPDY/9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS greeting
    ],
)
def test_what_is_no_http_is_a_400(colours, raw_answer, request_bytes):
    assert raw_answer(colours, request_bytes).startswith(b"HTTP/1.1 400 ")
    assert colours.get("/healthz").status_code == 200


def test_an_endless_query(colours):
    answer = colours.post(f"/predict?{'x' * 50_000}=1", content=sample("PNG"))
    assert (answer.status_code, answer.json()["code"]) == (422, "unknown_parameter")
    assert len(answer.content) < 500


@pytest.mark.parametrize("length", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("kind", [b"image/png", b"multipart/form-data; boundary=x"])
def test_half_closed_in_the_middle_of_the_body(colours, raw_answer, length, kind, logs):
    request = HEAD.replace(b"image/png", kind) + length + b"\r\n\r\n3\r\nabc\r\n"
    assert not raw_answer(colours, request, half_close=True).startswith(b"HTTP/1.1 5")
    assert colours.get("/healthz").status_code == 200
    assert [record for record in logs.records if record.levelname == "ERROR"] == []


def test_many_who_hang_up_in_the_middle(colours, raw_answer, logs):
    for _ in range(50):
        raw_answer(colours, HEAD + b"Content-Length: 1000\r\n\r\nabc", read=False)
    assert colours.post("/predict", content=sample("PNG")).status_code == 200
    assert [record for record in logs.records if record.levelname == "ERROR"] == []
