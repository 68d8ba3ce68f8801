"""What strangers send: a mistake is a 4xx that says so, in bounded memory, and the next request is answered."""

import contextlib
import io
import json
import re
import socket
import time

import numpy as np
import pytest
from PIL import Image

from app.main import create_app
from app.repository import Repository
from app.settings import Settings

MB = 10**6
BOUNDARY = "multipart/form-data; boundary=x"


def png(colour="blue"):
    with io.BytesIO() as file:
        Image.new("RGB", (4, 4), colour).save(file, "PNG")
        return file.getvalue()


def post(client, content, kind="image/png", path="/predict", **headers):
    return client.post(path, content=content, headers={"Content-Type": kind} | headers)


def refusal(answer):
    """Status and code of a problem that says what is wrong in a few words."""
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert 10 < len(problem["detail"]) < 1200
    return answer.status_code, problem["code"]


def statuses(answers):
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", answers)]


@pytest.fixture(autouse=True)
def _nothing_is_logged_and_the_next_is_answered(colours, logs):
    yield
    assert post(colours, png()).json()["prediction"]["label"] == "blue"
    assert [record for record in logs.get_records("call") if record.levelname == "ERROR"] == []


# HTTP that is none

HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nConnection: close\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        HEAD + b"X-Large: " + b"x" * 500_000 + b"\r\n\r\n",
        HEAD + b"X-Many: x\r\n" * 50_000 + b"\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nab",
        HEAD + b"Content-Length: 0x10\r\n\r\nab",
        HEAD + b"No colon\r\n\r\n",
        HEAD + b": no name\r\n\r\n",
        HEAD + b"X: a\0b\r\n\r\n",
        CHUNKED + b"zz\r\n",
        CHUNKED + b"-1\r\n",
        CHUNKED + b"f" * 17 + b"\r\n",
        CHUNKED + b"3\r\nabc\r\nnonsense\r\n",
        b"POST /predict?model=\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET \xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / SPDY/9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS greeting
        b"\0" * 1000,
    ],
)
def test_what_is_no_http_is_a_400(colours, raw_answer, request_bytes):
    assert statuses(raw_answer(colours, request_bytes))[-1] == 400


@pytest.mark.parametrize(
    "path",
    ["/predict/%00", "/%ff%fe", "/v2/models/%00%ff/infer", "/v2/models/../../etc/passwd/infer", "/a" * 5000],
)
def test_a_path_to_nowhere_is_a_404(colours, path):
    answer = colours.post(path, content=b"{}")
    assert answer.status_code == 404
    assert len(answer.content) < 1000


def test_an_endless_query(colours):
    answer = post(colours, png(), path=f"/predict?{'x' * 50_000}=1")
    assert refusal(answer) == (422, "unknown_parameter")
    assert len(answer.content) < 500


@pytest.mark.parametrize(
    ("beginning", "piece"),
    [
        (CHUNKED + b"1;", b"x" * 1000),
        (CHUNKED + b"1\r\na\r\n0\r\n", b"A: " + b"b" * 995 + b"\r\n"),
        (CHUNKED + b"1\r\na\r\n0\r\nA: ", b"b" * 1000),
        (HEAD, b"A: " + b"b" * 995 + b"\r\n"),
        (HEAD + b"A: ", b"b" * 1000),
    ],
    ids=["a chunk's extension", "trailers", "one trailer", "headers", "one header"],
)
def test_what_is_no_body_has_its_limit_too(measured, raw_answer, beginning, piece):
    request = beginning + piece * 60_000
    assert measured.growth(lambda: raw_answer(measured.client, request, half_close=True)) < 10 * MB
    assert statuses(raw_answer(measured.client, beginning + piece * 300, half_close=True)) == [400]


# Bodies without end

HUGE = 200 * MB
JSON = b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BINARY = (
    b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n"
    b"Inference-Header-Content-Length: 100\r\n"
)
FORM = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
HEADS = {
    "raw": HEAD.replace(b"Connection: close\r\n", b""),
    "form": FORM % b"/predict",
    "batch": FORM % b"/predict/batch",
    "json": JSON,
    "binary": BINARY,
    "gzip": BINARY + b"Content-Encoding: gzip\r\n",
}


def huge(name):
    """A body of 200 MB of the kind that the head announces."""
    field = {"form": b"image", "batch": b"images"}.get(name, b"")
    part = b'--x\r\nContent-Disposition: form-data; name="%b"; filename="a"\r\n\r\n' % field if field else b""
    return part + {"json": b" "}.get(name, b"\0") * (HUGE - len(part))


def in_chunks(body, size):
    pieces = (body[start : start + size] for start in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("sent", ["with its length", "in chunks", "with a length that is too small"])
@pytest.mark.parametrize("name", HEADS)
def test_200_megabytes_are_refused_while_they_come_and_never_held(measured, raw_answer, name, sent):
    request = {
        "with its length": lambda: HEADS[name] + b"Content-Length: %d\r\n\r\n" % HUGE + huge(name),
        "in chunks": lambda: HEADS[name] + b"Transfer-Encoding: chunked\r\n\r\n" + in_chunks(huge(name), MB),
        "with a length that is too small": lambda: HEADS[name] + b"Content-Length: 100\r\n\r\n" + huge(name),
    }[sent]()
    answers = []
    growth = measured.growth(lambda: answers.append(raw_answer(measured.client, request, half_close=True)))
    assert growth < 2 * measured.max_bytes + 10 * MB
    (answer,) = answers
    # what goes on behind a body of 100 bytes is no request: both are refused, and the connection ends
    assert statuses(answer) in ([[413]] if sent != "with a length that is too small" else [[400], [400, 400], []])


def test_a_body_that_inflates_to_200_megabytes_is_never_held(measured):
    import gzip

    body = gzip.compress(bytes(HUGE), 1)
    answers = []

    def abuse():
        kind = {"Content-Encoding": "gzip", "Inference-Header-Content-Length": "100"}
        answers.append(post(measured.client, body, "application/octet-stream", "/v2/models/digits/infer", **kind))

    assert measured.growth(abuse) < 2 * measured.max_bytes + 10 * MB
    assert answers[0].status_code == 413
    assert "inflates to more than" in answers[0].json()["error"]


# Slow and silent


def connect(client):
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)


def test_many_who_are_slow_hold_up_nobody_and_are_sent_away(measured):
    """Heads and bodies that stop, silence, and half-closed connections; honest clients are answered beside them."""
    starts = [b"", b"POST", HEAD, HEAD + b"Content-Length: 1000\r\n\r\n", CHUNKED, CHUNKED + b"3\r\nab", BINARY[:-3]]
    with contextlib.ExitStack() as open_ones:
        connections = []
        for number in range(350):
            connection = open_ones.enter_context(connect(measured.client))
            connection.sendall(starts[number % len(starts)])
            if number % 3 == 0:
                connection.shutdown(socket.SHUT_WR)
            connections.append(connection)
        for _ in range(20):
            measured.require_honest_answer()
        answers = [everything(connection) for connection in connections]
    assert {status for answer in answers for status in statuses(answer)} <= {400, 408}
    assert any(statuses(answer) == [408] for answer in answers)
    measured.require_honest_answer()


def everything(connection):
    answer = b""
    with contextlib.suppress(ConnectionError):
        while received := connection.recv(65536):
            answer += received
    return answer


@pytest.fixture
def impatient(serve, colour_model):
    """A server that waits for a second, and no longer."""
    app = create_app(Settings(body_timeout_s=1, keep_alive_s=1), Repository([colour_model()]))
    with serve(app) as client:
        yield client


@pytest.mark.parametrize(("count", "last"), [(1, b""), (1, b"Connection: close\r\n"), (60, b"")])
def test_who_does_not_read_the_answer_is_cut_off(impatient, count, last):
    """One large answer, and many that come one after the other."""
    images = np.zeros((200_000 // count, 4, 4, 3), np.uint8)
    tensor = {
        "name": "image",
        "shape": images.shape,
        "datatype": "UINT8",
        "parameters": {"binary_data_size": images.size},
    }
    asked = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    head = b"POST /v2/models/colours/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: %d\r\n" % len(asked)
    request = head + last + b"Content-Length: %d\r\n\r\n" % (len(asked) + images.size) + asked + images.tobytes()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what is not read stays at the server
        connection.settimeout(30)
        connection.connect((impatient.base_url.host, impatient.base_url.port))

        def send_until_cut_off():
            for _ in range(count):
                connection.sendall(request)
            for _ in range(200):
                time.sleep(0.1)
                connection.sendall(b"x")

        with pytest.raises(ConnectionError):
            send_until_cut_off()
    assert post(impatient, png()).status_code == 200


@pytest.mark.parametrize("length", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
@pytest.mark.parametrize("kind", [b"image/png", b"multipart/form-data; boundary=x"])
def test_half_closed_in_the_middle_of_the_body(colours, raw_answer, length, kind):
    request = HEAD.replace(b"image/png", kind) + length + b"\r\n\r\n3\r\nabc\r\n"
    assert not raw_answer(colours, request, half_close=True).startswith(b"HTTP/1.1 5")


def test_half_closed_behind_a_whole_request(colours, raw_answer):
    """Whoever has said all may still be answered, or not, but with nothing else."""
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(png()) + png()
    assert statuses(raw_answer(colours, request, half_close=True)) in ([200], [])


def test_many_who_hang_up_in_the_middle(colours, raw_answer):
    for _ in range(50):
        raw_answer(colours, HEAD + b"Content-Length: 1000\r\n\r\nabc", read=False)


# Types


@pytest.mark.parametrize(
    "kind",
    [
        "text/html", "text/plain; charset=utf-7", "application/json", "application/x-www-form-urlencoded",
        "multipart/mixed; boundary=x", "multipart/form-datax", "multipart/related; boundary=x", "image", "/", "é",
        "image /png", "x" * 5000, "application/octet-stream, image/png", "message/http",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
def test_a_type_that_is_none_of_ours_is_a_415(colours, kind, path):
    answer = colours.post(path, content=png(), headers={"Content-Type": kind.encode("latin-1")})
    assert refusal(answer) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "charset", ["punycode", "idna", "utf-7", "hex", "zip", "undefined", "unicode_escape", "x" * 999]
)
def test_a_forms_charset_is_ignored(colours, charset):
    """Python's own would take minutes for a megabyte (punycode, idna), or do what no charset does."""
    form = part(png()) + b"--x--\r\n"
    assert post(colours, form, f"{BOUNDARY}; charset={charset}").json()["prediction"]["label"] == "blue"
    texts = part(b"-" + b"a" * 90_000, 'form-data; name="image"') + b"--x--\r\n"
    assert refusal(post(colours, texts, f"{BOUNDARY}; charset={charset}")) == (422, "invalid_form")


# Forms


def part(content, disposition='form-data; name="image"; filename="a.png"', more=b""):
    return b"--x\r\nContent-Disposition: " + disposition.encode() + b"\r\n" + more + b"\r\n" + content + b"\r\n"


def nested(depth):
    body = png()
    for level in range(depth):
        body = b"--%d\r\nContent-Type: multipart/mixed; boundary=%d\r\n\r\n%b\r\n--%d--" % (level, level, body, level)
    return part(body, more=b"Content-Type: multipart/mixed; boundary=%d\r\n" % (depth - 1)) + b"--x--\r\n"


BAD_FORM = (400, "invalid_multipart")
OTHER_FORM = (422, "invalid_form")
NO_IMAGE = (400, "invalid_image")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (nested(1), NO_IMAGE),
        (nested(500), NO_IMAGE),
        (part(b"1") * 1500 + b"--x--\r\n", BAD_FORM),
        (part(b"1", 'form-data; name="text"') * 1500 + b"--x--\r\n", BAD_FORM),
        (part(b"", 'form-data; name=""') * 20 + b"--x--\r\n", OTHER_FORM),
        (part(png()) * 2 + b"--x--\r\n", OTHER_FORM),
        (part(png()) + part(png(), 'form-data; name="file"; filename="b"') + b"--x--\r\n", OTHER_FORM),
        (part(png(), 'form-data; name=""; filename="a"') + b"--x--\r\n", OTHER_FORM),
        (part(png(), 'form-data; name="image\0"; filename="a"') + b"--x--\r\n", OTHER_FORM),
        (part(png(), "form-data; name=image; filename*=UTF-8''a%00.png") + b"--x--\r\n", OTHER_FORM),  # RFC 7578: none
        (part(png(), 'form-data; name="' + "n" * 9000 + '"; filename="a"') + b"--x--\r\n", BAD_FORM),
        (part(png(), 'form-data; filename="a"') + b"--x--\r\n", BAD_FORM),
        (part(png(), 'attachment; name="image') + b"--x--\r\n", OTHER_FORM),
        (part(png(), more=b"X: " + b"x" * 60_000 + b"\r\n") + b"--x--\r\n", BAD_FORM),
        (part(png(), more=b"X: x\r\n" * 10_000) + b"--x--\r\n", BAD_FORM),
        (part(png(), more=b" folded\r\n") + b"--x--\r\n", BAD_FORM),
        (part(png()).replace(b"\r\n", b"\n", 3) + b"--x--\r\n", BAD_FORM),
        (part(png()), BAD_FORM),
        (part(png()) + b"--x-", BAD_FORM),
        (b"--x" * 30_000, OTHER_FORM),
        (b"\r\n--" * 20_000, BAD_FORM),
        (b"\r" * 90_000, BAD_FORM),
        (b"--x\r\n" * 20_000, BAD_FORM),
    ],
)  # fmt: skip
def test_a_form_that_is_none_or_not_ours(colours, body, expected):
    assert refusal(post(colours, body, BOUNDARY)) == expected


def test_what_is_wrong_with_a_form_is_told_and_not_logged(measured):
    before = len(measured.log)
    assert refusal(post(measured.client, b"--x\r\nno token: 1\r\n\r\n1\r\n--x--\r\n", BOUNDARY)) == BAD_FORM
    measured.require_honest_answer()
    while len([line for line in measured.log[before:] if " 200 " in line]) == 0:
        time.sleep(0.01)
    assert [line for line in measured.log[before:] if "app.access" not in line] == []


@pytest.mark.parametrize(
    "disposition",
    [
        'form-data; name="image"; filename="../../../../etc/passwd"',
        'form-data; name="image"; filename="..\\..\\windows\\system.ini"',
        'form-data; name="image"; filename="a\\"b.png"',
        'form-data; name="image"; filename="%00.png"',
        'form-data; name="image"; filename=""',
        'form-data; name="image"; filename="' + "n" * 2000 + '"',
        'form-data; name="image"; filename="<script>alert(1)</script>"',
        'form-data; name="image"; filename="é\u202e"',
        "form-data; name=image; filename=a",
    ],
)
def test_no_file_name_matters(colours, disposition):
    answer = post(colours, part(png(), disposition) + b"--x--\r\n", BOUNDARY)
    assert answer.json()["prediction"]["label"] == "blue"


@pytest.mark.parametrize(
    "kind",
    ["multipart/form-data", "multipart/form-data; boundary=", 'multipart/form-data; boundary="', BOUNDARY + "y",
     BOUNDARY[:-1] + "y" * 5000, "multipart/form-data; boundary=\\", "multipart/form-data; BOUNDARY"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
def test_a_boundary_that_is_missing_or_another(colours, kind, path):
    assert refusal(post(colours, part(png()) + b"--x--\r\n", kind, path)) == BAD_FORM


@pytest.mark.parametrize("boundary", [b"y" * 70, b"y" * 200, b"-", b"--", b"=?"])
def test_a_boundary_is_found_only_where_it_is_one(colours, boundary):
    """Contents that hold it without a line's end before it are the image's."""
    content = png() + b"--" + boundary + b"--" + b"\r\n-" + boundary
    body = part(content).replace(b"--x\r\n", b"--" + boundary + b"\r\n", 1) + b"--" + boundary + b"--\r\n"
    kind = b'multipart/form-data; boundary="' + boundary + b'"'
    answer = colours.post("/predict", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 200 or refusal(answer) == BAD_FORM


@pytest.mark.parametrize("fill", [b"\r", b"\n", b"\r\n", b"\r\n-", b"\r\n--", b"-"])
def test_contents_full_of_beginnings_of_a_boundary_take_no_more_than_others(measured, fill):
    content = (fill * measured.max_bytes)[: measured.max_bytes - 1000]
    body = part(content) + b"--x--\r\n"
    answers = []

    def abuse():
        answers.append(post(measured.client, body, 'multipart/form-data; boundary="x"'))  # quoted: the general way

    assert measured.growth(abuse) < 6 * measured.max_bytes
    assert refusal(answers[0]) == NO_IMAGE


# Tensors

INFER = "/v2/models/colours/infer"


def ask(**changes):
    tensor = {"name": "image", "shape": [1, 4, 4, 3], "datatype": "UINT8", "data": [0] * 48} | changes
    return {"inputs": [tensor]}


def said(answer):
    """What an answer of the protocol says is wrong, in a few words."""
    assert answer.headers["content-type"] == "application/json"
    assert 10 < len(answer.json()["error"]) < 500
    return answer.json()["error"]


NINES = "9" * 4299  # the most digits that Python reads


@pytest.mark.parametrize(
    "body",
    [
        "[" * 100_000, '{"inputs":' * 100_000, "{" + '"a":{' * 1000, '{"inputs": null}', "null", "[]", '"', "\ufeff{}",
        json.dumps(ask()).replace("[0, ", "[" * 60 + "0" + "]" * 60 + ",[", 1),
        *(json.dumps(ask()).replace("[1, 4, 4, 3]", shape) for shape in (
            f"[{NINES}, 4, 4, 3]", f"[{NINES}9, 4, 4, 3]", "[9223372036854775807, 4, 4, 3]", "[4294967296, 4, 4, 3]",
            "[-1, 4, 4, 3]", "[1e400, 4, 4, 3]", "[NaN, 4, 4, 3]", "[1.0, 4, 4, 3]", "[0, 4, 4, 3]", "[]", "[[1]]",
            "[true, 4, 4, 3]", '["1", 4, 4, 3]', "[" + "1," * 10_000 + "1]", "null", "[1, 4, 4, 3, 1]", "[3, 4, 4, 1]",
        )),
        *(json.dumps(ask(data=[])).replace("[]", data) for data in (
            "[]", "[NaN]", "[Infinity]", "[1e400]", "[-1]", "[256]", f"[{NINES}]", "[0.5]", "[null]", "[{}]", '["0"]',
            "[[0], 0]", "[" * 33 + "0" + "]" * 33, "[" * 150 + "0" + "]" * 150, f"[{'[],' * 20_000}[]]", "{}", '"AAAA"',
            "[true]", "[" + ",".join([NINES] * 15) + "]", "[0]",
        )),
        json.dumps({"inputs": [ask()["inputs"][0]] * 200}),
        json.dumps({"inputs": [{"name": "", "shape": [0], "datatype": "UINT8", "data": []}] * 1500}),
        json.dumps(ask(datatype="x" * 50_000)),
        json.dumps(ask(name="\ud800")),
        json.dumps(ask(name="\0" * 9000)),
        json.dumps(ask() | {"outputs": [{"name": "logits"}] * 3000}),
        json.dumps(ask() | {"outputs": [{"name": "x" * 9000}]}),
        json.dumps(ask() | {"outputs": [{"name": "logits", "parameters": {"classification": -1}}]}),
        json.dumps(ask() | {"parameters": {"timeout": 10**30}}),
        json.dumps(ask(parameters={"shared_memory_region": "../../etc/passwd"})),
    ],
    ids=lambda body: body[:40],
)  # fmt: skip
def test_json_that_is_no_request(colours, body):
    answer = post(colours, body.encode("utf-8", "surrogatepass"), "application/json", INFER)
    assert answer.status_code == 400
    said(answer)


@pytest.mark.parametrize("size", ["-1", "0", "47", "49", "18446744073709551616", NINES, "1.5", '"48"', "true", "null"])
@pytest.mark.parametrize("length", [None, "0", "1", "-1", "+5", "9" * 30, "0x10", "²"])
def test_sizes_of_binary_data_that_lie(colours, size, length):
    asked = json.dumps(ask(parameters={"binary_data_size": 0})).replace(": 0}", f": {size}}}")
    asked = asked.replace(f', "data": {[0] * 48}', "").encode()
    given = str(len(asked)) if length is None else length
    answer = colours.post(INFER, content=asked + bytes(48), headers={
        "Content-Type": "application/octet-stream", "Inference-Header-Content-Length": given.encode("latin-1"),
    })  # fmt: skip
    assert answer.status_code == 400
    said(answer)


def test_a_million_tensors_of_nothing_are_too_much_json(measured):
    body = json.dumps({"inputs": [{"name": "image", "shape": [0], "datatype": "UINT8", "data": []}] * 10**6}).encode()
    body, answers = body[: measured.max_bytes - 10], []

    def abuse():
        answers.append(post(measured.client, body, "application/json", INFER.replace("colours", "digits")))

    assert measured.growth(abuse) < 3 * measured.max_bytes
    assert answers[0].status_code == 413
    said(answers[0])


def test_classes_are_counted_as_the_texts_that_they_are(colours):
    """As binary data of 32 bits they would fit by far; written out they are ten times as many bytes."""
    images = np.zeros((100_000, 4, 4, 3), np.uint8)
    asked = ask(shape=images.shape, parameters={"binary_data_size": images.size})
    del asked["inputs"][0]["data"]
    wanted = {"name": "logits", "parameters": {"classification": 3, "binary_data": True}}

    def infer(**parameters):
        output = wanted | {"parameters": wanted["parameters"] | parameters}
        text = json.dumps(asked | {"outputs": [output]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))}
        return post(colours, text + images.tobytes(), "application/octet-stream", INFER, **headers)

    assert infer().status_code == 413
    said(infer())
    assert infer(classification=1).status_code == 200
