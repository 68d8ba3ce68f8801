"""The card: reads back equal, knows its graph, and refuses what does not fit together."""

import json

import pytest

from model.contract import CardError, ModelCard


@pytest.fixture
def card(bundled):
    return ModelCard.from_json((bundled / "model.json").read_bytes(), "bundled")


def test_a_card_reads_back_equal(card):
    assert ModelCard.from_json(card.to_json(), "again") == card


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
        (("stages",), [], "stages"),
    ],
)
def test_a_card_that_does_not_hold_together_is_refused_by_field(card, path, value, message):
    content = json.loads(card.to_json())
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
