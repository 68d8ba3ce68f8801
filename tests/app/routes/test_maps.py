"""POST /predict?explain=maps: planes whose sums are the fused logits, with the bundled networks on real images."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.answers import ALL_CLASSES, Interpreter, ReadNetwork
from app.batcher import Batcher
from app.main import create_app
from app.repository import LoadedModel, Repository
from app.settings import Settings
from model.contract import BRANCH_LOGITS, BRANCH_WEIGHTS, LOGITS, ModelCard, branch_map_name
from model.images import read_input

ROOT = Path(__file__).parents[3]
PHOTOS = ["chelsea.png", "astronaut.png", "rocket.jpg", "retina.jpg", "camera.png", "horse.png"]
MODELS = ["cifar10", "digits"]


def card_of(model):
    path = ROOT / "exports" / model / "1" / "model.json"
    return ModelCard.from_json(path.read_bytes(), path)


def planes_of(stage):
    return np.frombuffer(base64.b64decode(stage["values"], validate=True), "<f4").reshape(stage["shape"])


def encoded(image, kind="PNG", **options):
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


def infer(client, model, content, *names):
    """The network's own outputs by the Open Inference Protocol, which knows nothing of explanations."""
    pixels = read_input(content, card_of(model).input)[np.newaxis]
    image = {"name": "image", "shape": pixels.shape, "datatype": "UINT8", "data": pixels.ravel().tolist()}
    body = {"inputs": [image], "outputs": [{"name": name} for name in names]}
    answer = client.post(f"/v2/models/{model}/infer", json=body).json()
    return [np.reshape(output["data"], output["shape"])[0] for output in answer["outputs"]]


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("model", MODELS)
def test_the_planes_of_all_stages_sum_to_the_fused_logits(both, photos, model, name):
    content = (photos / name).read_bytes()
    maps = both.post(f"/predict?model={model}&explain=maps", content=content).json()["maps"]
    logits, branch_logits, weights = infer(both, model, content, LOGITS, BRANCH_LOGITS, BRANCH_WEIGHTS)
    assert maps["classes"] == list(range(len(logits)))
    sums = np.stack([planes_of(stage).sum(axis=(1, 2), dtype=np.float64) for stage in maps["stages"]])
    tolerance = 1e-4 * np.abs(logits).max()
    np.testing.assert_allclose(sums[:, :-1].sum(axis=0), logits, rtol=0, atol=tolerance)
    np.testing.assert_allclose(sums[:, :-1], weights * branch_logits, rtol=0, atol=tolerance)
    np.testing.assert_allclose(sums[:, -1], (weights * branch_logits).mean(axis=1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("model", MODELS)
def test_each_plane_is_the_networks_class_map_times_its_weight(both, photos, model):
    content = (photos / "chelsea.png").read_bytes()
    maps = both.post(f"/predict?model={model}&explain=maps", content=content).json()["maps"]
    card = card_of(model)
    assert [stage["name"] for stage in maps["stages"]] == [stage.name for stage in card.stages]
    weights, *class_maps = infer(
        both, model, content, BRANCH_WEIGHTS, *(branch_map_name(branch) for branch in range(len(card.stages)))
    )
    for stage, weight, class_map, info in zip(maps["stages"], weights, class_maps, card.stages, strict=True):
        planes = planes_of(stage)
        assert planes.shape == (len(card.classes) + 1, *info.map_size)
        expected = weight[:, None, None] * class_map / np.prod(info.map_size)
        atol = 1e-6 * np.abs(expected).max()
        np.testing.assert_allclose(planes[:-1], expected, rtol=1e-5, atol=atol)
        np.testing.assert_allclose(planes[-1], expected.mean(axis=0), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("model", MODELS)
def test_maps_change_nothing_else_in_the_answer(both, photos, model):
    content = (photos / "rocket.jpg").read_bytes()
    with_maps = both.post(f"/predict?model={model}&explain=maps", content=content).json()
    for query in ("", "&explain=none"):
        plain = both.post(f"/predict?model={model}{query}", content=content).json()
        assert "maps" not in plain
        for name in ("prediction", "top_k", "stages", "agreement"):
            assert plain[name] == with_maps[name]


def test_only_who_asks_for_maps_has_them_computed(serve, colour_model, colour_network):
    asked = []

    class Watched:
        def run(self, images, names, thresholds=None, *, alone=False):
            asked.append(set(names))
            return colour_network.run(images, names)

    content = encoded(Image.new("RGB", (5, 5), "red"))
    maps = {branch_map_name(branch) for branch in range(3)}
    with serve(create_app(Settings(), Repository([colour_model(Watched())]))) as client:
        client.post("/predict", content=content)
        client.post("/predict?explain=maps", content=content)
    plain, explained = asked
    assert plain & maps == set()
    assert explained == plain | maps


def test_a_batch_has_the_maps_of_each_image(both, photos):
    contents = [(photos / name).read_bytes() for name in PHOTOS]
    files = [("images", content) for content in (*contents[:2], b"no image", *contents[2:])]
    results = both.post("/predict/batch?model=cifar10&explain=maps", files=files).json()["results"]
    assert results.pop(2)["code"] == "invalid_image"
    for content, result in zip(contents, results, strict=True):
        alone = both.post("/predict?model=cifar10&explain=maps", content=content).json()
        assert result["maps"]["box"] == alone["maps"]["box"]
        for stage, other in zip(result["maps"]["stages"], alone["maps"]["stages"], strict=True):
            planes = planes_of(other)
            np.testing.assert_allclose(planes_of(stage), planes, rtol=0, atol=1e-4 * np.abs(planes).max())


def test_a_batch_larger_than_what_runs_at_a_time(colours):
    shades = [encoded(Image.new("RGB", (5, 5), (level, 0, 0))) for level in range(1, 71)]
    files = [("images", shade) for shade in shades]
    results = colours.post("/predict/batch?explain=maps", files=files).json()["results"]
    reds = [planes_of(result["maps"]["stages"][0])[0].sum() for result in results]
    assert reds == pytest.approx([level / 255 for level in range(1, 71)], rel=1e-5)


def test_the_box_is_what_the_network_saw(both, photos):
    """`cifar10` crops to a square: of 451 x 300 pixels, the middle 300."""
    content = (photos / "chelsea.png").read_bytes()
    box = both.post("/predict?model=cifar10&explain=maps", content=content).json()["maps"]["box"]
    assert card_of("cifar10").input.resize == "crop"
    assert box == pytest.approx({"left": 151 / 902, "top": 0, "right": 751 / 902, "bottom": 1})


class ManyClasses:
    """Two stages of 40 classes; the maps are set by hand, and the image adds nothing."""

    classes = 40
    maps = np.random.default_rng(0).normal(size=(2, classes, 3, 2)).astype(np.float32)
    weights = np.random.default_rng(1).normal(size=(2, classes)).astype(np.float32)

    def run(self, images, names, thresholds=None, *, alone=False):
        z = self.maps.mean(axis=(2, 3))
        outputs = {
            LOGITS: (self.weights * z).sum(axis=0),
            BRANCH_LOGITS: z,
            BRANCH_WEIGHTS: self.weights,
            branch_map_name(0): self.maps[0],
            branch_map_name(1): self.maps[1],
        }
        return {name: np.repeat(outputs[name][None], len(images), axis=0) for name in names}


@pytest.fixture
def many(colour_card, colour_model):
    """A loaded `ManyClasses`."""
    network, card = ManyClasses(), colour_card()
    stages = [stage.model_copy(update={"map_size": (3, 2)}) for stage in card.stages[:2]]
    card = card.model_copy(
        update={
            "classes": tuple(f"class {index}" for index in range(network.classes)),
            "stages": tuple(stages),
            "branch_weights": network.weights.tolist(),
            "reading_scales": network.weights.tolist(),
        }
    )
    return LoadedModel(card, colour_model().runtime, Batcher(ReadNetwork(network, Interpreter(card))))


def test_of_many_classes_only_the_listed_are_sent_and_the_mean_of_all(serve, many):
    network = ManyClasses()
    assert network.classes > ALL_CLASSES
    with serve(create_app(Settings(), Repository([many]))) as client:
        answer = client.post("/predict?explain=maps&top_k=3", content=encoded(Image.new("RGB", (5, 5)))).json()
    maps = answer["maps"]
    lists = [answer["top_k"], *(stage["top_k"] for stage in answer["stages"])]
    assert maps["classes"] == sorted({entry["index"] for entries in lists for entry in entries})
    assert 3 <= len(maps["classes"]) <= 9
    contributions = network.weights[:, :, None, None] * network.maps / 6
    for stage, expected in zip(maps["stages"], contributions, strict=True):
        planes = planes_of(stage)
        assert planes.shape == (len(maps["classes"]) + 1, 3, 2)
        evidence = (expected - expected.mean(axis=0))[maps["classes"]]
        np.testing.assert_allclose(planes[:-1] - planes[-1], evidence, rtol=0, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 10, 100])
@pytest.mark.parametrize("explain", ["none", "maps"])
def test_an_answer_is_as_large_as_was_reckoned(serve, many, both, photos, top_k, explain):
    """No larger, and not much smaller."""
    content = (photos / PHOTOS[0]).read_bytes()
    query = f"top_k={top_k}&explain={explain}"
    with serve(create_app(Settings(), Repository([many]))) as client:
        answers = {many.interpreter: client.post(f"/predict?{query}", content=content).json()}
    for model in MODELS:
        answers[Interpreter(card_of(model))] = both.post(f"/predict?model={model}&{query}", content=content).json()
    for interpreter, answer in answers.items():
        lists = [answer["top_k"], *(stage["top_k"] for stage in answer["stages"])]
        size = sum(len(json.dumps(listed, separators=(",", ":"))) for listed in lists)
        size += sum(len(stage["values"]) for stage in answer.get("maps", {"stages": []})["stages"])
        reckoned = interpreter.answer_bytes(top_k, explain == "maps")
        assert 0.4 * reckoned < size <= reckoned


@pytest.mark.parametrize("fit", [0.99, 2])
def test_what_would_be_answered_with_too_much_is_refused(serve, many, fit):
    limit, content = int(fit * many.interpreter.answer_bytes(100, maps=True)), encoded(Image.new("RGB", (5, 5)))
    with serve(create_app(Settings(max_tensor_bytes=limit), Repository([many]))) as client:

        def refused(images, query):
            answer = client.post(f"/predict/batch?{query}", files=[("images", content)] * images)
            if images == 1:
                assert client.post(f"/predict?{query}", content=content).status_code == answer.status_code
            if answer.status_code == 200:
                return False
            assert (answer.status_code, answer.json()["code"]) == (413, "too_many_bytes")
            assert "INTERFLOW_MAX_TENSOR_BYTES" in answer.json()["detail"]
            return True

        assert [refused(images, "explain=maps&top_k=100") for images in (1, 2, 3)] == [fit < 1, fit < 2, True]
        assert not refused(1, "explain=maps&top_k=1")
        assert not refused(1, "top_k=100")
        assert not refused(10, "top_k=1")


@pytest.mark.parametrize("value", ["", "map", "MAPS", "true", "maps,none", "%00"])
def test_an_explanation_that_does_not_exist_is_refused(colours, value):
    answer = colours.post(f"/predict?explain={value}", content=encoded(Image.new("RGB", (5, 5))))
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_parameter")
    assert "'explain'" in answer.json()["detail"]
    assert "'none' or 'maps'" in answer.json()["detail"]
