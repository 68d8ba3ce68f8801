"""Answers are read from outputs by the card's rule; numbers here are computed by hand."""

from math import exp

import numpy as np
import pytest

from app.answers import Interpreter
from app.errors import InferenceError
from model.contract import BRANCH_LOGITS, BRANCH_WEIGHTS, LAYER_ATTENTION, LOGITS

RED = np.array([[[255, 0, 0]]], np.uint8).repeat(4, 0).repeat(4, 1)


@pytest.fixture
def outputs():
    """z of a red image (see ColourNetwork), behind a green one in the batch."""
    red = np.array([[1, 0, 0], [-2, 0, 0], [0, 1, 0]], np.float32)
    green = np.array([[0, 1, 0], [0, -2, 0], [0, 0, 1]], np.float32)
    branch_logits = np.stack([green, red])
    weights = np.broadcast_to(np.array([[1], [-1.5], [0.5]], np.float32), branch_logits.shape)
    return {LOGITS: (weights * branch_logits).sum(axis=1), BRANCH_LOGITS: branch_logits, BRANCH_WEIGHTS: weights}


def interpret(card, outputs, image, top_k):
    interpreter = Interpreter(card)
    return interpreter.interpret({**outputs, **interpreter.read(outputs)}, image, top_k)


def test_answer_of_a_red_image(colour_card, outputs):
    """Fused logits (4, 0.5, 0) over temperature 2; evidence for red 2/3, 2 and -1/6."""
    answer = interpret(colour_card(), outputs, image=1, top_k=3)
    prediction, top_k, stages, agreement = answer.values()
    total = exp(2) + exp(0.25) + 1
    assert [(p["label"], p["index"]) for p in top_k] == [("red", 0), ("green", 1), ("blue", 2)]
    assert [p["confidence"] for p in top_k] == pytest.approx([exp(2) / total, exp(0.25) / total, 1 / total])
    assert prediction == top_k[0]
    assert [stage["prediction"]["label"] for stage in stages] == ["red", "red", "green"]
    assert [stage["prediction"]["confidence"] for stage in stages] == pytest.approx(
        [exp(1) / (exp(1) + 2), exp(3) / (exp(3) + 2), exp(0.5) / (exp(0.5) + 2)]
    )
    assert [stage["weight"] for stage in stages] == [1, -1.5, 0.5]
    assert [stage["contribution"] for stage in stages] == [1, 3, 0]
    assert [stage["share"] for stage in stages] == pytest.approx([4 / 17, 12 / 17, 1 / 17])
    assert [stage["agrees"] for stage in stages] == [True, True, False]
    assert [(stage["name"], stage["depth"]) for stage in stages] == [("conv1", 1), ("conv2", 2), ("conv3", 3)]
    assert all(stage["evaluated"] and stage["top_k"][0] == stage["prediction"] for stage in stages)
    assert agreement == pytest.approx(2 / 3)


def test_each_image_of_a_batch_gets_its_own_answer(colour_card, outputs):
    assert interpret(colour_card(), outputs, image=0, top_k=1)["prediction"]["label"] == "green"
    assert interpret(colour_card(), outputs, image=1, top_k=1)["prediction"]["label"] == "red"


@pytest.mark.parametrize(("top_k", "listed"), [(1, 1), (2, 2), (3, 3), (10**30, 3)])
def test_top_k_is_clipped_to_the_classes(colour_card, outputs, top_k, listed):
    interpretation = interpret(colour_card(), outputs, 1, top_k)
    assert len(interpretation["top_k"]) == listed
    assert [len(stage["top_k"]) for stage in interpretation["stages"]] == [listed] * 3


def test_nothing_but_the_weight_changes_when_a_branch_is_turned_and_scaled(colour_card, outputs):
    """(w, z) and (w / s, s z) are one network; the reading's scale is fitted again and becomes a / s."""
    factor = np.array([[-0.5], [4], [-8]], np.float32)
    card = colour_card()
    scales = (np.asarray(card.reading_scales) / factor).tolist()
    turned = {
        LOGITS: outputs[LOGITS],
        BRANCH_LOGITS: outputs[BRANCH_LOGITS] * factor,
        BRANCH_WEIGHTS: outputs[BRANCH_WEIGHTS] / factor,
    }
    before = interpret(card, outputs, 1, 3)
    after = interpret(card.model_copy(update={"reading_scales": scales}), turned, 1, 3)
    for stage, other in zip(before["stages"], after["stages"], strict=True):
        assert other["weight"] != stage["weight"]
        assert other | {"weight": stage["weight"]} == stage
    assert before["top_k"] == after["top_k"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [LOGITS, BRANCH_LOGITS])
def test_numbers_that_are_not_finite_are_refused(colour_card, outputs, name, value):
    outputs[name][1].flat[0] = value
    with pytest.raises(InferenceError, match="not finite"):
        interpret(colour_card(), outputs, 1, 3)
    assert (
        interpret(colour_card(), outputs, 0, 1)["prediction"]["label"] == "green"
    )  # the other image is none the worse


# The layers' own attention


@pytest.fixture
def layered_outputs(layered_network):
    """Of an image of the colour (1, 0.2, 0.4), behind one of (0, 1, 0.6)."""
    colours = np.array([[0, 255, 153], [255, 51, 102]], np.uint8)
    return layered_network.outputs(colours[:, None, None])


def weights(interpretation):
    return [[source["weight"] for source in row["sources"]] for row in interpretation["layer_attention"]]


def test_each_image_of_a_batch_gets_what_its_own_blocks_drew_on(layered_model, layered_outputs):
    rows = [weights(interpret(layered_model.card, layered_outputs, image, 1)) for image in (0, 1)]
    for row, expected in zip(rows[0], [[0.25, 0.75], [0.5, 0.3, 0.2], [0.6]], strict=True):
        assert row == pytest.approx(expected)
    for row, expected in zip(rows[1], [[0.5, 0.5], [0.1, 0.2, 0.7], [0.4]], strict=True):
        assert row == pytest.approx(expected)


def test_layer_attention_only_where_asked_for(layered_model, layered_outputs):
    interpreter = Interpreter(layered_model.card)
    for layers in (False, True):
        everything = {**layered_outputs, **interpreter.read(layered_outputs)}
        answer = interpreter.interpret({name: everything[name] for name in interpreter.wanted(layers)}, 1, 1)
        assert ("layer_attention" in answer) == layers


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_layer_attention_that_is_not_finite_is_refused(layered_model, layered_outputs, value):
    layered_outputs[LAYER_ATTENTION][1, 1, 2] = value
    with pytest.raises(InferenceError, match="not finite"):
        interpret(layered_model.card, layered_outputs, 1, 1)
    assert len(interpret(layered_model.card, layered_outputs, 0, 1)["layer_attention"]) == 3
