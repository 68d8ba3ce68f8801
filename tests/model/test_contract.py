"""The card: reads back equal, knows its graph, and refuses what does not fit together."""

import json

import pytest

from model.contract import CardError, ModelCard


@pytest.fixture
def card(bundled):
    return ModelCard.from_json((bundled / "model.json").read_bytes(), "bundled")


def test_a_card_reads_back_equal(card):
    assert ModelCard.from_json(card.to_json(), "again") == card


def by_class(card):
    """The card with figures by class, as training writes them now."""
    recall, images = (1.0, *(0.9,) * 9), (89, *(30,) * 9)
    update = {"macro_f1": 0.91, "auroc": 0.999, "class_recall": recall, "class_images": images}
    return card.model_copy(update={"metrics": card.metrics.model_copy(update=update)})


def test_a_card_from_before_figures_by_class_says_that_there_are_none(card):
    content = json.loads(card.to_json())
    for field in ("macro_f1", "auroc", "class_recall", "class_images"):
        content["metrics"].pop(field, None)
    metrics = ModelCard.from_json(json.dumps(content), "old").metrics
    assert metrics.macro_f1 is metrics.auroc is metrics.class_recall is metrics.class_images is None


def test_figures_by_class_read_back_equal(card):
    assert ModelCard.from_json(by_class(card).to_json(), "again") == by_class(card)


def test_it_names_its_graphs_tensors(card):
    assert {name: str(spec) for name, spec in card.inputs.items()} == {"image": "uint8[N, 32, 32, 1]"}
    outputs = {name: str(spec) for name, spec in card.outputs.items()}
    assert list(outputs)[:3] == ["logits", "branch_logits", "branch_weights"]
    assert outputs["branch_logits"] == outputs["branch_weights"] == "float32[N, 4, 10]"
    height, width = card.stages[3].map_size
    assert outputs["branch_map_3"] == f"float32[N, 10, {height}, {width}]"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format_version",), 2, "format_version"),
        (("classes",), ["one"], "classes"),
        (("classes",), ["0"] * 10, "distinct"),
        (("branch_weights",), [[1.0]], "branch_weights needs 4 rows"),
        (("reading_scales",), [], "reading_scales needs 4 rows"),
        (("branch_importance",), [0.5, 0.5], "needs 4 values"),
        (("branch_importance",), [0.5, 0.5, 0.5, 0.5], "sum to 1"),
        (("temperature",), 0, "temperature"),
        (("temperature",), float("nan"), "temperature|card"),
        (("input", "std"), [0.0], "input.std"),
        (("input", "mean"), [0.1, 0.2], "mean and std need 1"),
        (("input", "channels"), 2, "input.channels"),
        (("name",), "../up", "name"),
        (("name",), ".hidden", "name"),
        (("version",), "0", "version"),
        (("provenance", "weights_sha256"), "abc", "weights_sha256"),
        (("provenance", "created"), "2026-01-01T00:00:00", "provenance.created"),
        (("metrics", "branch_accuracy"), [1.0], "metrics.branch_accuracy needs 4"),
        (("metrics", "macro_f1"), 1.01, "metrics.macro_f1"),
        (("metrics", "auroc"), -0.01, "metrics.auroc"),
        (("metrics", "auroc"), None, "come together"),
        (("metrics", "class_recall"), [1.0] * 9, "metrics.class_recall needs 10 values, one per class; got 9"),
        (("metrics", "class_recall"), [1.5] * 10, "metrics.class_recall"),
        (("metrics", "class_images"), [359], "metrics.class_images needs 10"),
        (("metrics", "class_images"), [36] * 10, "must sum to metrics.images, 359; they sum to 360"),
        (("metrics", "class_images"), [0, 79, *[35] * 8], "metrics.class_images"),
        (("stages",), [], "stages"),
    ],
)
def test_a_card_that_does_not_hold_together_is_refused_by_field(card, path, value, message):
    content = json.loads(by_class(card).to_json())
    part = content
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(CardError, match=message) as error:
        ModelCard.from_json(json.dumps(content), "model.json")
    assert str(error.value).startswith("model.json: not a model card")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"name": "x"}'])
def test_what_is_no_card_is_refused(text):
    with pytest.raises(CardError, match="not a model card"):
        ModelCard.from_json(text, "model.json")
