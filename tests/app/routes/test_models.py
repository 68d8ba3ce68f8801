"""GET /models, /model and /model/branch-weights."""

import numpy as np
import pytest

from app.main import create_app
from app.repository import Repository
from app.schemas import Runtime
from app.settings import Settings
from model.contract import ModelCard


def test_the_loaded_models(serve, colour_model):
    models = [colour_model(name="a", version="2"), colour_model(name="b", created="2026-02-01T00:00:00Z")]
    with serve(create_app(Settings(), Repository(models))) as client:
        listed = client.get("/models").json()["models"]
    common = {"method": "S1", "sha256": "0" * 64, "classes": 3}
    assert listed == [
        {"name": "a", "version": "2", **common, "default": False},
        {"name": "b", "version": "1", **common, "default": True},
    ]


def test_no_loaded_model_is_the_default_while_the_one_that_is_set_is_unloaded(serve, colour_model):
    repository = Repository([colour_model(name="a"), colour_model(name="b")], "a")
    repository.replace("a", [])
    with serve(create_app(Settings(), repository)) as client:
        assert [(model["name"], model["default"]) for model in client.get("/models").json()["models"]] == [("b", False)]
        assert client.get("/model").status_code == 404
        assert client.get("/model?model=b").status_code == client.get("/readyz").status_code == 200


def test_one_model_is_its_card_and_its_runtime(digits):
    described = digits.get("/model?model=digits").json()
    runtime = described.pop("runtime")
    assert ModelCard.model_validate(described).name == "digits"
    assert list(runtime) == list(Runtime.model_fields)
    assert runtime["requested_provider"] == Settings().provider
    assert (runtime["fallback"] is None) == (runtime["provider"] == "cuda" or Settings().provider == "cpu")
    assert runtime["threads"] >= 1


def test_branch_weights_by_class_name(colours):
    answer = colours.get("/model/branch-weights").json()
    assert answer["model"]["name"] == "colours"
    assert (answer["method"]["name"], answer["method"]["attention"], answer["method"]["learned"]) == (
        "S1",
        "branch",
        True,
    )
    assert answer["shared_over_classes"] is True
    assert answer["stages"][1] == {
        "name": "conv2",
        "depth": 2,
        "weights": {"red": -1.5, "green": -1.5, "blue": -1.5},
        "reading_scales": {"red": -1.5, "green": -1.5, "blue": -1.5},
        "importance": 0.7,
        "accuracy": 0.9,
    }
    assert "importance" in answer["how_to_read"]


def test_branch_weights_of_the_bundled_model_are_its_cards(digits):
    card = digits.get("/model").json()
    answer = digits.get("/model/branch-weights").json()
    assert answer["shared_over_classes"] == (card["method"]["attention"] != "class")
    by_class = [[stage["weights"][label] for label in card["classes"]] for stage in answer["stages"]]
    np.testing.assert_array_equal(by_class, card["branch_weights"])


@pytest.mark.parametrize("path", ["/model", "/model/branch-weights"])
def test_refusals(colours, path):
    for query, status, code in [
        ("model=other", 404, "model_not_found"),
        ("version=9", 404, "model_not_found"),
        ("modle=colours", 422, "unknown_parameter"),
        ("version=" + "1" * 201, 422, "invalid_parameter"),
    ]:
        answer = colours.get(f"{path}?{query}")
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("path", ["/models", "/model", "/model/branch-weights"])
def test_nothing_is_loaded(serve, path):
    with serve(create_app(Settings(), Repository())) as client:
        answer = client.get(path)
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
