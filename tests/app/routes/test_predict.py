"""POST /predict: the answer's form and its laws, with a hand-computed network and with the bundled one."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from math import exp
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.main import create_app
from app.repository import Repository
from app.session import Session
from app.settings import Settings
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


@pytest.mark.parametrize("query", ["mode=adaptive", "topk=3", "explain=maps", "top_k=1&x=", "a%00b=1", "é=1"])
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


def test_the_server_answers_while_the_network_runs(serve, colour_model):
    running, gate = threading.Event(), threading.Event()

    class SlowNetwork:
        def run(self, images):
            running.set()
            assert gate.wait(30)
            return colour_model().inference._network.run(images)

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


def test_numbers_that_are_not_finite_are_a_failure_not_an_answer(serve, colour_model):
    class OverflowingNetwork:
        def run(self, images):
            outputs = colour_model().inference._network.run(images)
            outputs.logits[:] = np.inf
            return outputs

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
    outputs = session.run(read_input(photos / name, card.input)[None])
    answer = digits.post("/predict?top_k=1000", files={"image": (photos / name).read_bytes()}).json()
    best = int(outputs.logits[0].argmax())
    assert answer["prediction"]["index"] == best
    contributions = [stage["contribution"] for stage in answer["stages"]]
    assert contributions == pytest.approx(np.asarray(card.branch_weights)[:, best] * outputs.branch_logits[0, :, best])
    assert sum(contributions) == pytest.approx(outputs.logits[0, best], rel=1e-4, abs=1e-4)
    scaled = np.exp(outputs.logits[0].astype(float) / card.temperature)
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
            (expected,) = session.run(read_input(photos / name, session.card.input)[None]).layer_attention
            for told, row, values in zip(answer, rows, expected, strict=True):
                assert [source["name"] for source in told["sources"]] == list(row.sources)
                weights = [source["weight"] for source in told["sources"]]
                assert weights == pytest.approx(values[: len(weights)], abs=1e-4)
                assert sum(weights) == pytest.approx(1) or row.kind == "gate"
