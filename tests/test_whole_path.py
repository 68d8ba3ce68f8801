"""The whole path on real images: what PyTorch, ONNX and HTTP say of one picture is the same."""

import io

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from model.contract import ModelCard
from model.explain import fused_confidences, softmax
from model.images import read_input
from model.interflow import Normalize
from training.artefact import network_of
from training.checkpoint import load_network
from training.data import load_data
from training.recipe import load_recipe, resolve_recipe

# float32 through two libraries
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def client(exported):
    with TestClient(create_app(Settings(exports=exported))) as client:
        yield client


@pytest.fixture(scope="module")
def card(exported):
    return ModelCard.from_json((exported / "digits" / "1" / "model.json").read_bytes(), "card")


@pytest.fixture(scope="module")
def network(trained_run, card):
    network = network_of(card)
    load_network(trained_run / "checkpoint.safetensors", network)
    return network


def encoded(path, kind, size):
    """A photograph, resized and encoded anew."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").resize(size).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["chelsea.png", "astronaut.png", "rocket.jpg"])
@pytest.mark.parametrize(
    ("kind", "size"), [("PNG", (451, 300)), ("JPEG", (640, 427)), ("WEBP", (20, 33)), ("BMP", (32, 32))]
)
def test_a_photograph_of_any_size_gets_the_same_logits_everywhere(
    client, exported, card, network, photographs, name, kind, size
):
    picture = encoded(photographs[name], kind, size)
    pixels = read_input(picture, card.input)[np.newaxis].copy()

    with torch.inference_mode():
        by_torch = network(Normalize(card.input.mean, card.input.std)(torch.from_numpy(pixels)))
    session = onnxruntime.InferenceSession(exported / "digits" / "1" / "model.onnx")
    logits, branch_logits = session.run(["logits", "branch_logits"], {"image": pixels})
    np.testing.assert_allclose(logits, by_torch.logits, atol=TOLERANCE)
    np.testing.assert_allclose(branch_logits, by_torch.branch_logits, atol=TOLERANCE)

    answer = client.post("/predict?top_k=10", files={"image": picture}).json()
    chosen = answer["prediction"]["index"]
    assert sum(stage["contribution"] for stage in answer["stages"]) == pytest.approx(logits[0, chosen], abs=TOLERANCE)
    confidences = {entry["index"]: entry["confidence"] for entry in answer["top_k"]}
    expected = fused_confidences(by_torch.logits.numpy(), card.temperature, card.power)[0]
    np.testing.assert_allclose([confidences[i] for i in range(10)], expected, atol=TOLERANCE)
    for stage, z, a in zip(answer["stages"], by_torch.branch_logits[0].numpy(), card.reading_scales, strict=True):
        believed = {entry["index"]: entry["confidence"] for entry in stage["top_k"]}
        np.testing.assert_allclose([believed[i] for i in range(10)], softmax(np.array(a) * z), atol=TOLERANCE)


def test_test_images_are_answered_as_the_card_promises(client, trained_run, card):
    """Accuracy over HTTP, on images of the test split, against the card's figures for the whole split."""
    data = load_data(load_recipe(trained_run / "recipe.yaml"))
    right = np.zeros(1 + len(card.stages))
    for image, label in zip(data.test.images, data.test.labels.tolist(), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze(-1).numpy()).save(buffer, "PNG")
        answer = client.post("/predict", content=buffer.getvalue(), headers={"content-type": "image/png"}).json()
        right += [answer["prediction"]["index"] == label] + [
            s["prediction"]["index"] == label for s in answer["stages"]
        ]
    promised = [card.metrics.accuracy, *card.metrics.branch_accuracy]
    np.testing.assert_allclose(
        right / len(data.test), promised, atol=1.5 / len(data.test)
    )  # an exact tie may fall either way


@pytest.mark.parametrize("ink_on_paper", [False, True])
def test_the_bundled_model_reads_test_digits_light_on_dark_and_as_ink_on_paper(bundled, ink_on_paper):
    data = load_data(resolve_recipe("digits", {}))
    images = data.test.images.numpy()
    session = onnxruntime.InferenceSession(bundled / "model.onnx")
    (logits,) = session.run(["logits"], {"image": 255 - images if ink_on_paper else images})
    assert (logits.argmax(axis=1) == data.test.labels.numpy()).mean() >= 0.97
    assert sum(path.stat().st_size for path in bundled.iterdir()) <= 5e6


def test_branch_weights_over_http_are_the_networks(client, network):
    answer = client.get("/model/branch-weights").json()
    served = [list(stage["weights"].values()) for stage in answer["stages"]]
    np.testing.assert_allclose(served, network.attention.weight.detach(), rtol=1e-6)
