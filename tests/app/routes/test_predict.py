"""POST /predict: the answer's form and its laws, with a hand-computed network and with the bundled one."""

import io
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import exp
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from app.answers import ReadNetwork
from app.batcher import Batcher
from app.decoders import Decoders
from app.main import create_app
from app.refusals import Pace
from app.repository import Repository
from app.schemas import Answer, Problem
from app.session import Session
from app.settings import Settings
from model.contract import BRANCH_LOGITS, LAYER_ATTENTION, LOGITS
from model.images import read_input

EXPORTS = Path(__file__).parents[3] / "exports"
PHOTOS = [
    "chelsea.png",  # RGB
    "astronaut.png",
    "rocket.jpg",
    "retina.jpg",
    "multipage.tif",  # several pages
    "no_time_for_that_tiny.gif",  # palette, animated
    "camera.png",  # grey
    "horse.png",  # alpha
    "logo.png",
]


def encoded(image, kind="PNG", **options):
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


def solid(colour):
    return encoded(Image.new("RGB", (7, 5), colour))


def code(answer):
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["code"]


# By hand


def test_the_whole_answer(colours):
    answer = colours.post("/predict?top_k=1", content=solid("red"), headers={"X-Request-ID": "mine"}).json()
    timing = answer.pop("timing_ms")
    assert list(timing) == ["decode", "queue", "inference", "total"]
    assert 0 <= timing["decode"] + timing["queue"] + timing["inference"] <= timing["total"]

    def red(confidence):
        return {"label": "red", "index": 0, "confidence": pytest.approx(confidence)}

    def stage(number, prediction, agrees, *, weight, contribution, share):
        return {
            "name": f"conv{number}",
            "depth": number,
            "prediction": prediction,
            "top_k": [prediction],
            "weight": weight,
            "contribution": contribution,
            "share": pytest.approx(share),
            "agrees": agrees,
            "evaluated": True,
        }

    green = {"label": "green", "index": 1, "confidence": pytest.approx(exp(0.5) / (exp(0.5) + 2))}
    fused = red(exp(2) / (exp(2) + exp(0.25) + 1))
    assert answer == {
        "request_id": "mine",
        "model": {"name": "colours", "version": "1", "method": "S1", "sha256": "0" * 64},
        "prediction": fused,
        "top_k": [fused],
        "stages": [
            stage(1, red(exp(1) / (exp(1) + 2)), True, weight=1.0, contribution=1.0, share=4 / 17),
            stage(2, red(exp(3) / (exp(3) + 2)), True, weight=-1.5, contribution=3.0, share=12 / 17),
            stage(3, green, False, weight=0.5, contribution=0.0, share=1 / 17),
        ],
        "agreement": pytest.approx(2 / 3),
    }


def test_orientation_and_transparency_are_honoured(colours):
    """Left half red, right half transparent; laid over white the mean is (1, 0.5, 0.5)."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 4, 8))
    stages = colours.post("/predict", content=encoded(image)).json()["stages"]
    assert stages[0]["contribution"] == pytest.approx(1.0)
    assert stages[0]["prediction"]["confidence"] == pytest.approx(exp(1) / (exp(1) + 2 * exp(0.5)))


def test_exif_orientation(digits):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    turned = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    answers = [digits.post("/predict", content=content).json() for content in (encoded(upright), turned)]
    assert answers[0]["stages"] == answers[1]["stages"]
    plain = digits.post("/predict", content=encoded(upright.transpose(Image.Transpose.ROTATE_90))).json()
    assert plain["stages"] != answers[0]["stages"]


@pytest.mark.parametrize("query", ["modus=adaptive", "topk=3", "maps=true", "top_k=1&x=", "a%00b=1", "é=1"])
def test_a_parameter_that_does_not_exist_is_refused(colours, query):
    assert code(colours.post(f"/predict?{query}", content=solid("red"))) == (422, "unknown_parameter")


@pytest.mark.parametrize("top_k", ["0", "-1", "2.5", "many", "", "%00", "1e3", "%F0%9F%90%B1", "9" * 5000])
def test_a_bad_top_k_is_refused(colours, top_k):
    answer = colours.post(f"/predict?top_k={top_k}", content=solid("red"))
    assert code(answer) == (422, "invalid_parameter")
    assert "'top_k'" in answer.json()["detail"]


@pytest.mark.parametrize(
    "query", ["model=other", "version=2", "model=colours&version=0", "model=", "model=%00", "model=%FF%FE"]
)
def test_a_model_that_is_not_loaded(colours, query):
    answer = colours.post(f"/predict?{query}", content=solid("red"))
    assert code(answer) == (404, "model_not_found")
    assert "colours (1)" in answer.json()["detail"]


def test_an_overlong_model_name_is_refused(colours):
    assert code(colours.post(f"/predict?model={'x' * 201}", content=solid("red"))) == (422, "invalid_parameter")


def test_a_model_is_chosen_by_name_and_version(serve, colour_model):
    models = [colour_model(name="a", version="1"), colour_model(name="a", version="2"), colour_model(name="b")]
    with serve(create_app(Settings(), Repository(models, "b"))) as client:
        for query, expected in {"": ("b", "1"), "model=a": ("a", "2"), "model=a&version=1": ("a", "1")}.items():
            model = client.post(f"/predict?{query}", content=solid("red")).json()["model"]
            assert (model["name"], model["version"]) == expected


def test_the_server_answers_while_the_network_runs(serve, colour_model, colour_network):
    running, gate = threading.Event(), threading.Event()

    class SlowNetwork:
        def run(self, images, names, thresholds=None, *, alone=False):
            running.set()
            assert gate.wait(30)
            return colour_network.run(images, names)

    with (
        serve(create_app(Settings(), Repository([colour_model(SlowNetwork())]))) as client,
        ThreadPoolExecutor() as pool,
    ):
        answer = pool.submit(client.post, "/predict", content=solid("red"))
        assert running.wait(30)
        assert client.get("/healthz").status_code == 200
        assert not answer.done()
        gate.set()
        assert answer.result().json()["prediction"]["label"] == "red"


def test_concurrent_answers_are_not_mixed(colours):
    def ask(level):
        answer = colours.post("/predict", content=solid((level, 0, 0)), headers={"X-Request-ID": f"id-{level}"})
        return answer.json()["request_id"], answer.json()["stages"][1]["contribution"]

    levels = range(1, 250, 2)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, levels))
    assert answers == [(f"id-{level}", pytest.approx(3 * level / 255, rel=1e-5)) for level in levels]


def test_numbers_that_are_not_finite_are_a_failure_not_an_answer(serve, colour_model, colour_network):
    class OverflowingNetwork:
        def run(self, images, names, thresholds=None, *, alone=False):
            return colour_network.run(images, names) | {LOGITS: np.full((len(images), 3), np.inf, np.float32)}

    with serve(create_app(Settings(), Repository([colour_model(OverflowingNetwork())]))) as client:
        assert code(client.post("/predict", content=solid("red"))) == (500, "inference_failed")


def test_without_a_model_nothing_is_predicted(serve):
    with serve(create_app(Settings(), Repository())) as client:
        assert code(client.post("/predict", content=solid("red"))) == (503, "not_ready")


def test_images_are_not_logged(colours, logs):
    colours.post("/predict", files={"image": ("secret name.png", solid("red"))})
    colours.post("/predict", files={"image": ("secret name.png", b"secret content")})
    assert "predict" in logs.text  # uvicorn's access log is in there
    assert "secret" not in logs.text


@pytest.mark.parametrize("name", PHOTOS)
def test_confidence_follows_from_what_the_stages_say(colours, photos, name):
    """A reading gives a * z up to a constant; with weights shared over classes, w * z too, and the fused softmax."""
    card = colours.get("/model").json()
    with Image.open(photos / name) as photo:
        content = encoded(photo.convert("RGB").resize((50, 40)))
    answer = colours.post("/predict", content=content).json()
    logits = np.zeros(3)
    for stage, weights, scales in zip(answer["stages"], card["branch_weights"], card["reading_scales"], strict=True):
        for entry in stage["top_k"]:
            logits[entry["index"]] += weights[0] / scales[0] * np.log(entry["confidence"])
    confidences = np.exp(logits / card["temperature"])
    for entry in answer["top_k"]:
        assert entry["confidence"] == pytest.approx(confidences[entry["index"]] / confidences.sum(), rel=1e-4)


# The layers' own attention, by hand


def told(answer):
    """All that does not differ from request to request."""
    return {name: value for name, value in answer.json().items() if name not in ("request_id", "timing_ms")}


def test_layer_attention_where_asked_for(layered):
    """Of an image of the colour (0.6, 0.2, 0.4)."""
    content = solid((153, 51, 102))
    answer = told(layered.post("/predict?layers=true", content=content))
    assert answer.pop("layer_attention") == [
        {
            "block": "stage1.block3",
            "module": "AFI",
            "kind": "share",
            "sources": [
                {"name": "stage1.block1", "weight": pytest.approx(0.4)},
                {"name": "stage1.block2", "weight": pytest.approx(0.6)},
            ],
        },
        {
            "block": "stage2.block3",
            "module": "MRLA-base",
            "kind": "share",
            "sources": [
                {"name": "stage2.block1", "weight": pytest.approx(0.1)},
                {"name": "stage2.block2", "weight": pytest.approx(0.2)},
                {"name": "stage2.block3", "weight": pytest.approx(0.7)},
            ],
        },
        {
            "block": "stage3.block1",
            "module": "MRLA-light",
            "kind": "gate",
            "sources": [{"name": "stage3.block1", "weight": pytest.approx(0.4)}],
        },
    ]
    assert answer == told(layered.post("/predict", content=content))


@pytest.mark.parametrize("query", ["", "layers=false", "layers=0"])
def test_no_layer_attention_where_not_asked_for(layered, colours, query):
    for client in (layered, colours):
        answer = client.post(f"/predict?{query}", content=solid("red"))
        assert answer.status_code == 200
        assert "layer_attention" not in answer.json()


@pytest.mark.parametrize("content", [solid("red"), b"no image", b""], ids=["image", "no image", "nothing"])
def test_a_network_without_layer_attention_is_told_before_the_image_is_read(layered, content):
    answer = layered.post("/predict?layers=true&model=colours", content=content)
    assert code(answer) == (422, "no_layer_attention")
    assert answer.json()["detail"] == (
        "the layers of model 'colours' have no attention of their own. Leave `layers` out, or ask for a model whose "
        "card (GET /model) lists `layer_attention`."
    )
    assert layered.get("/model?model=colours").json()["layer_attention"] == []
    assert layered.get("/model").json()["layer_attention"] != []


@pytest.mark.parametrize("layers", ["", "2", "-1", "1.0", "maybe", "truee", "%00", "null", "[true]"])
def test_a_bad_layers_is_refused(layered, layers):
    answer = layered.post(f"/predict?layers={layers}", content=solid("red"))
    assert code(answer) == (422, "invalid_parameter")
    assert "'layers'" in answer.json()["detail"]


# The bundled model


@pytest.mark.parametrize("name", PHOTOS)
def test_answers_to_photographs_hold_together(digits, photos, name):
    card = digits.get("/model").json()
    weights = digits.get("/model/branch-weights").json()
    answer = digits.post("/predict?top_k=1000", files={"image": (photos / name).read_bytes()}).json()
    assert len(answer["top_k"]) == len(card["classes"])
    assert len(answer["stages"]) == len(card["stages"])
    assert answer["prediction"] == answer["top_k"][0]
    for ranking in (answer["top_k"], *(stage["top_k"] for stage in answer["stages"])):
        confidences = [entry["confidence"] for entry in ranking]
        assert confidences == sorted(confidences, reverse=True)
        assert sum(confidences) == pytest.approx(1)
        assert all(card["classes"][entry["index"]] == entry["label"] for entry in ranking)
    for stage, learned in zip(answer["stages"], weights["stages"], strict=True):
        assert stage["prediction"] == stage["top_k"][0]
        assert stage["weight"] == pytest.approx(learned["weights"][answer["prediction"]["label"]])
        assert stage["agrees"] == (stage["prediction"]["index"] == answer["prediction"]["index"])
    assert sum(stage["share"] for stage in answer["stages"]) == pytest.approx(1)
    assert answer["agreement"] == pytest.approx(np.mean([stage["agrees"] for stage in answer["stages"]]))


@pytest.mark.parametrize("name", PHOTOS)
def test_the_answer_is_the_networks(digits, photos, name):
    """Against the bare session and plain numpy: contributions sum to the fused logit, confidence is its softmax."""
    session = Session(EXPORTS / "digits" / digits.get("/model").json()["version"], Settings(provider="cpu"))
    card = session.card
    outputs = session.run(read_input(photos / name, card.input)[None], [LOGITS, BRANCH_LOGITS])
    logits, branch_logits = outputs[LOGITS][0], outputs[BRANCH_LOGITS][0]
    answer = digits.post("/predict?top_k=1000", files={"image": (photos / name).read_bytes()}).json()
    best = int(logits.argmax())
    assert answer["prediction"]["index"] == best
    contributions = [stage["contribution"] for stage in answer["stages"]]
    assert contributions == pytest.approx(np.asarray(card.branch_weights)[:, best] * branch_logits[:, best])
    assert sum(contributions) == pytest.approx(logits[best], rel=1e-4, abs=1e-4)
    scaled = np.exp(-(((logits.max() - logits.astype(float)) / card.temperature) ** card.power))
    confidences = [entry["confidence"] for entry in sorted(answer["top_k"], key=lambda entry: entry["index"])]
    assert confidences == pytest.approx(scaled / scaled.sum(), rel=1e-4)


def test_a_raw_body_and_a_form_give_one_answer(digits, photos):
    content = (photos / "rocket.jpg").read_bytes()
    answers = [
        digits.post("/predict", content=content, headers={"Content-Type": "image/jpeg"}).json(),
        digits.post("/predict", files={"file": content}).json(),
    ]
    assert answers[0]["stages"] == answers[1]["stages"]
    assert answers[0]["top_k"] == answers[1]["top_k"]


def test_layer_attention_of_an_artefact(serve, artefact, photos, add_layer_attention, layered_model):
    """Over HTTP as from the bare session: rows by the card, values by the graph."""
    constant, varying = [[0, 1, 0], [0.5, 0, 0.5], [0, 0, 0]], [[1, -1, 0], [-0.5, 0.5, 0], [1, 0, 0]]
    rows = layered_model.card.layer_attention
    add_layer_attention(artefact, rows, constant, varying)
    session = Session(artefact, Settings(provider="cpu"))
    with serve(create_app(Settings(exports=artefact.parents[1]))) as client:
        for name in ("camera.png", "horse.png"):
            answer = client.post("/predict?layers=true", content=(photos / name).read_bytes()).json()["layer_attention"]
            pixels = read_input(photos / name, session.card.input)[None]
            (expected,) = session.run(pixels, [LAYER_ATTENTION])[LAYER_ATTENTION]
            for told, row, values in zip(answer, rows, expected, strict=True):
                assert [source["name"] for source in told["sources"]] == list(row.sources)
                weights = [source["weight"] for source in told["sources"]]
                assert weights == pytest.approx(values[: len(weights)], abs=1e-4)
                assert sum(weights) == pytest.approx(1) or row.kind == "gate"


# What is sent is what the document promises


@pytest.mark.parametrize("query", ["", "?top_k=1", "?layers=true&top_k=2"])
def test_answers_are_those_of_the_schema(layered, query):
    answer = layered.post(f"/predict{query}", content=solid("red"))
    read = TypeAdapter(Answer).validate_json(answer.content, strict=True)
    assert read["request_id"] == answer.headers["X-Request-ID"]
    assert TypeAdapter(Answer).dump_python(read) == answer.json()  # nothing was sent that the schema lacks
    assert answer.headers["content-type"] == "application/json"


def test_the_answers_of_a_batch_are_those_of_the_schema(layered):
    results = post_batch(layered, solid("red"), b"no image").json()["results"]
    TypeAdapter(Answer).validate_python(results[0])
    Problem.model_validate(results[1])
    document = layered.get("/openapi.json").json()
    schema = document["paths"]["/predict/batch"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/BatchAnswer"}


# Several images


def post_batch(client, *contents, query="", **options):
    files = [("images", (f"{index}.png", content)) for index, content in enumerate(contents)]
    return client.post(f"/predict/batch{query}", files=files, **options)


def test_a_batch_equals_its_singles_in_order(digits, photos):
    contents = [(photos / name).read_bytes() for name in PHOTOS]
    results = post_batch(digits, *contents, query="?top_k=2").json()["results"]
    for content, result in zip(contents, results, strict=True):
        single = digits.post("/predict?top_k=2", content=content).json()
        assert result["model"] == single["model"]
        assert result["prediction"]["label"] == single["prediction"]["label"]
        for stage, other in zip(result["stages"], single["stages"], strict=True):
            assert [entry["label"] for entry in stage["top_k"]] == [entry["label"] for entry in other["top_k"]]
            assert stage["contribution"] == pytest.approx(other["contribution"], rel=1e-3, abs=1e-3)


def test_a_bad_image_fails_alone(colours):
    """Of 100,000 bytes and 1,000,000 pixels allowed."""
    huge = encoded(Image.new("1", (1001, 1000)))
    contents = [solid("red"), b"no image", solid("lime"), b"", solid("blue").ljust(100_001, b"\0"), huge, solid("blue")]
    answer = post_batch(colours, *contents, headers={"X-Request-ID": "mine"})
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert [result.get("code") or result["prediction"]["label"] for result in results] == [
        "red", "invalid_image", "green", "empty_image", "too_many_bytes", "too_many_pixels", "blue",
    ]  # fmt: skip
    assert [result.get("status") for result in results] == [None, 400, None, 400, 413, 413, None]
    assert {result["request_id"] for result in results} == {"mine"}


def test_a_batch_of_bad_images_alone(colours):
    results = post_batch(colours, b"no image", b"neither").json()["results"]
    assert [result["code"] for result in results] == ["invalid_image"] * 2


def test_one_image_whose_numbers_are_not_finite_fails_alone(serve, colour_model, colour_network):
    class DividesByGreen:
        def run(self, images, names, thresholds=None, *, alone=False):
            outputs = colour_network.run(images, names)
            outputs[LOGITS] = outputs[LOGITS].copy()
            outputs[LOGITS][images[:, 0, 0, 1] == 255] = np.nan
            return outputs

    with serve(create_app(Settings(), Repository([colour_model(DividesByGreen())]))) as client:
        results = post_batch(client, solid("red"), solid("lime"), solid("blue")).json()["results"]
    assert [result.get("code") for result in results] == [None, "inference_failed", None]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([("image", b"x")], (422, "invalid_form")),
        ([("images", b"x"), ("other", b"x")], (422, "invalid_form")),
        ([("images", (None, "text"))], (422, "invalid_form")),
    ],
)
def test_a_form_without_images_alone_is_refused(colours, files, expected):
    assert code(colours.post("/predict/batch", files=files)) == expected


def test_a_batch_is_a_form(colours):
    assert code(colours.post("/predict/batch", content=solid("red"))) == (415, "unsupported_media_type")
    assert code(post_batch(colours, solid("red"), query="?topk=1")) == (422, "unknown_parameter")


def test_a_batch_is_bounded_in_bytes_and_images(serve, colour_model):
    settings = Settings(max_batch_bytes=100_000, max_queue=10)
    with serve(create_app(settings, Repository([colour_model()]))) as client:
        assert post_batch(client, *[solid("red")] * 10).status_code == 200
        assert code(post_batch(client, *[solid("red")] * 11)) == (400, "invalid_multipart")
        answer = post_batch(client, *[solid("red").ljust(60_000, b"\0")] * 3)
        assert code(answer) == (413, "too_many_bytes")
        assert "INTERFLOW_MAX_BATCH_BYTES" in answer.json()["detail"]


# Under load


class GatedNetwork:
    """Stands at a gate, and counts what it ran."""

    def __init__(self, network):
        self.network, self.gate, self.entered, self.ran = network, threading.Event(), threading.Semaphore(0), 0

    def run(self, images, names, thresholds=None, *, alone=False):
        self.entered.release()
        assert self.gate.wait(30)
        self.ran += len(images)
        return self.network.run(images, names)


@pytest.fixture
def gated(serve, colour_model, colour_network):
    """A gated network, its batcher with room for 2 that wait, and a client of its server."""
    network = GatedNetwork(colour_network)
    model = colour_model()
    batcher = Batcher(ReadNetwork(network, model.interpreter), max_queue=2)
    model = replace(model, inference=batcher)
    with serve(create_app(Settings(timeout_ms=0), Repository([model]))) as client:
        yield network, batcher, client
        network.gate.set()


def wait_until(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never became so")


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("path", ["/predict", "/predict/batch", "/explain"])
def test_the_network_is_told_whether_more_is_to_come(colours, monkeypatch, path, behind):
    told = []
    infer = Batcher.infer

    def listen(*arguments, more_to_come, **options):
        told.append(more_to_come)
        return infer(*arguments, more_to_come=more_to_come, **options)

    monkeypatch.setattr(Batcher, "infer", listen)
    monkeypatch.setattr(Decoders, "behind", behind)
    field = "images" if path == "/predict/batch" else "image"
    assert colours.post(path, files={field: solid("red")}).status_code == 200
    assert told == [behind]


def test_a_full_queue_is_429_with_retry_after(gated):
    network, batcher, client = gated
    with ThreadPoolExecutor() as pool:
        running = pool.submit(client.post, "/predict", content=solid("red"))
        assert network.entered.acquire(timeout=30)
        waiting = [pool.submit(client.post, "/predict", content=solid("lime")) for _ in range(2)]
        wait_until(lambda: batcher.queued == 2)
        for refused in (
            client.post("/predict", content=solid("red")),
            client.post("/predict", content=b"no image"),  # not even looked at
            client.post("/predict", content=b"{}", headers={"Content-Type": "application/json"}),
            post_batch(client, b"no image"),
        ):
            assert code(refused) == (429, "queue_full")
            assert int(refused.headers["Retry-After"]) >= 1
        network.gate.set()
        assert [task.result().status_code for task in (running, *waiting)] == [200] * 3
    assert network.ran == 3
    assert client.post("/predict", content=solid("red")).status_code == 200


def test_a_refusal_comes_before_the_requests_deadline(gated, monkeypatch):
    """However many came before it: `Pace` is told until when one listens."""
    told = []

    async def keep(pace, deadline):
        told.append(deadline)

    monkeypatch.setattr(Pace, "keep", keep)
    network, batcher, client = gated
    with ThreadPoolExecutor() as pool:
        tasks = [pool.submit(client.post, "/predict", content=solid("red"))]
        assert network.entered.acquire(timeout=30)
        tasks += [pool.submit(client.post, "/predict", content=solid("red")) for _ in range(2)]
        wait_until(lambda: batcher.queued == 2)
        for path, field in (("/predict", "image"), ("/predict/batch", "images"), ("/explain", "image")):
            before = time.perf_counter()
            answer = client.post(path, files={field: solid("red")}, headers={"X-Request-Timeout-Ms": "7000"})
            assert answer.status_code == 429
            assert before + 7 <= told.pop() <= time.perf_counter() + 7
        assert client.post("/predict", content=solid("red")).status_code == 429
        assert told == [None]
        network.gate.set()
        assert [task.result().status_code for task in tasks] == [200] * 3


def test_a_deadline_that_passes_is_504_and_costs_no_inference(gated):
    network, batcher, client = gated
    with ThreadPoolExecutor() as pool:
        running = pool.submit(client.post, "/predict", content=solid("red"))
        assert network.entered.acquire(timeout=30)
        for post in (lambda **options: client.post("/predict", content=solid("red"), **options),
                     lambda **options: post_batch(client, solid("red"), b"no image", **options)):  # fmt: skip
            assert code(post(headers={"X-Request-Timeout-Ms": "20"})) == (504, "deadline_passed")
            assert batcher.queued == 0
        network.gate.set()
        assert running.result().status_code == 200
    assert network.ran == 1


def test_the_servers_deadline_holds_where_a_request_allows_more(serve, colour_model, colour_network):
    network = GatedNetwork(colour_network)
    with serve(create_app(Settings(timeout_ms=20), Repository([colour_model(network)]))) as client:
        for headers in ({}, {"X-Request-Timeout-Ms": "60000"}):
            assert code(client.post("/predict", content=solid("red"), headers=headers)) == (504, "deadline_passed")
        network.gate.set()


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "", "1e3", "9" * 10, "\xb2"])
def test_a_timeout_that_is_none_is_refused(colours, value):
    headers = {"X-Request-Timeout-Ms": value.encode("latin-1")}
    assert code(colours.post("/predict", content=solid("red"), headers=headers)) == (422, "invalid_header")


@pytest.mark.parametrize("batch", [False, True])
def test_who_hangs_up_leaves_the_queue_and_is_never_run(gated, logs, batch):
    network, batcher, client = gated
    with ThreadPoolExecutor() as pool:
        running = pool.submit(client.post, "/predict", content=solid("red"))
        assert network.entered.acquire(timeout=30)
        request = client.build_request("POST", "/predict", content=solid("lime"))
        if batch:
            request = client.build_request("POST", "/predict/batch", files=[("images", solid("lime"))])
        head = f"POST {request.url.path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in request.headers.items())
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address) as connection:
            connection.sendall(head.encode() + b"\r\n" + request.read())
            wait_until(lambda: batcher.queued == 1)
        wait_until(lambda: batcher.queued == 0)
        network.gate.set()
        assert running.result().status_code == 200
    assert client.post("/predict", content=solid("red")).status_code == 200
    assert network.ran == 2
    assert [record for record in logs.records if record.levelname == "ERROR"] == []
