"""Doubt is a probability, no worse than the confidence at finding wrong answers, and better at what is foreign."""

import numpy as np
import pytest

from app.answers import CONFIDENCES, DOUBTS, RANKING, Interpreter
from app.inference import STOPS
from model.contract import BRANCH_LOGITS, BRANCH_WEIGHTS, LOGITS, ModelCard
from model.explain import doubts, fused_confidences, readings, reasons_to_doubt
from training.calibration import Predictions, fit_confidence, fit_reading_scales
from training.doubt import AUROC_SPENT, DOUBTED, auroc, fit_doubt

CLASSES, STAGES = 5, 3


def network(count, seed, foreign=False):
    """Stages that see the class through a blur they share and noise of their own; of foreign images, nothing else."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    seen = np.zeros((count, CLASSES)) if foreign else 2 * np.eye(CLASSES)[labels]
    blurred = (seen + random.normal(0, 0.6, (count, CLASSES)))[:, None]
    noisy = blurred + random.normal(0, 0.8, (count, STAGES, CLASSES))
    # logits in the power that the card's has to undo
    logits = np.sign(noisy) * np.abs(noisy) ** 0.7
    return Predictions(logits.astype(np.float32), np.full((STAGES, CLASSES), 0.5, np.float32), labels)


@pytest.fixture(scope="module")
def fitted():
    held_out, test = network(4000, 0), network(4000, 1)
    scales, (temperature, power) = fit_reading_scales(held_out, per_class=False), fit_confidence(held_out)
    return scales, temperature, power, fit_doubt(held_out, test, scales, temperature, power)


def said(predictions, fitted):
    scales, temperature, power, doubt = fitted
    fused = fused_confidences(predictions.logits, temperature, power)
    beliefs = readings(predictions.branch_logits, scales)
    return fused, beliefs, doubts(fused, beliefs, doubt.coefficients)


def wrong(predictions):
    return predictions.logits.argmax(axis=1) != predictions.labels


def test_doubt_is_the_probability_of_a_wrong_answer(fitted):
    test = network(20_000, 2)
    doubt = said(test, fitted)[2]
    assert 0 <= doubt.min() < doubt.max() <= 1
    assert doubt.mean() == pytest.approx(wrong(test).mean(), abs=0.02)
    for rows in np.array_split(np.argsort(doubt), 8):
        assert doubt[rows].mean() == pytest.approx(wrong(test)[rows].mean(), abs=0.05)


def test_it_finds_wrong_answers_as_the_confidence_does(fitted):
    held_out, test = network(4000, 0), network(20_000, 2)
    for images, slack in ((held_out, AUROC_SPENT + 1e-9), (test, 0.01)):
        fused, _, doubt = said(images, fitted)
        assert auroc(doubt, wrong(images)) >= auroc(-fused.max(axis=1), wrong(images)) - slack
    assert fitted[3].coefficients[2] > 0  # and still listens to the stages


def test_it_finds_foreign_images_better_than_the_confidence(fitted):
    known, foreign = (said(network(20_000, 2, foreign), fitted) for foreign in (False, True))
    is_foreign = np.repeat([False, True], 20_000)
    by_doubt = auroc(np.concatenate([known[2], foreign[2]]), is_foreign)
    by_confidence = auroc(-np.concatenate([known[0].max(axis=1), foreign[0].max(axis=1)]), is_foreign)
    assert by_doubt > by_confidence + 0.004


def test_the_threshold_parts_as_many_as_it_says(fitted):
    held_out, test = network(4000, 0), network(4000, 1)
    doubt = fitted[3]
    assert (said(held_out, fitted)[2] > doubt.threshold).mean() == pytest.approx(DOUBTED, abs=1e-3)
    beyond = said(test, fitted)[2] > doubt.threshold
    assert doubt.share == beyond.mean()
    assert doubt.share_of_wrong == beyond[wrong(test)].mean() > 2 * doubt.share


def test_doubt_rises_as_the_confidence_falls_and_as_the_stages_waver(fitted):
    """At the same readings, and at the same confidence."""
    sure = np.linspace(0.3, 1, 50)
    fused = np.column_stack([sure, *[(1 - sure) / 4] * 4])
    coefficients = fitted[3].coefficients
    some = np.tile(np.full(CLASSES, 0.2), (50, STAGES, 1))
    assert (np.diff(doubts(fused, some, coefficients)) < 0).all()
    beliefs = np.tile(fused[:, None], (1, STAGES, 1))
    same = np.tile([[0.9, 0.1, 0, 0, 0]], (50, 1))
    assert (np.diff(doubts(same, beliefs, coefficients)) < 0).all()
    assert np.isfinite(reasons_to_doubt(np.eye(CLASSES), np.tile(np.eye(CLASSES)[:, None], (1, STAGES, 1)))).all()


def test_indecision_is_that_of_the_paper_by_hand():
    beliefs = np.array([[[0.5, 0.5], [0.9, 0.1]]])
    expected = (2 * 0.25**0.1 + 2 * 0.09**0.1) / 2
    found = reasons_to_doubt(np.array([[0.75, 0.25]]), beliefs)
    assert found == pytest.approx(np.array([[np.log(0.25), np.log(expected)]]))


def test_the_names_and_order_of_classes_do_not_matter(fitted):
    predictions, order = network(100, 3), np.array([4, 2, 0, 3, 1])
    fused, beliefs, doubt = said(predictions, fitted)
    coefficients = fitted[3].coefficients
    np.testing.assert_allclose(doubts(fused[:, order], beliefs[:, :, order], coefficients), doubt)


@pytest.mark.parametrize("labels", ["right", "wrong"])
def test_where_hardly_an_answer_is_wrong_or_right_no_doubt_is_fitted(labels):
    easy = network(500, 4)
    easy = Predictions(easy.branch_logits, easy.branch_weights, (easy.logits.argmax(axis=1) + (labels == "wrong")) % 5)
    assert fit_doubt(easy, easy, np.ones((STAGES, CLASSES)), 1.0, 1.0) is None


@pytest.fixture
def card(fitted, bundled):
    """Of the network by hand: all but what is read here is another's."""
    scales, temperature, power, doubt = fitted
    other = ModelCard.from_json((bundled / "model.json").read_bytes(), "card")
    return other.model_copy(
        update={
            "classes": tuple("abcde"),
            "stages": other.stages[:STAGES],
            "reading_scales": tuple(map(tuple, scales.tolist())),
            "temperature": temperature,
            "power": power,
            "doubt": doubt,
        }
    )


def test_the_server_says_what_training_says_of_the_same_logits(card, fitted):
    predictions = network(64, 5)
    assert fitted[2] != pytest.approx(1, abs=0.02)  # or a server that forgot the power would pass
    interpreter = Interpreter(card)
    outputs = {
        LOGITS: predictions.logits,
        BRANCH_LOGITS: predictions.branch_logits,
        BRANCH_WEIGHTS: np.broadcast_to(predictions.branch_weights, predictions.branch_logits.shape),
    }
    read = interpreter.read(outputs)
    fused, beliefs, doubt = said(predictions, fitted)
    for row, expected in enumerate([fused, *beliefs.swapaxes(0, 1)]):
        np.testing.assert_allclose(read[CONFIDENCES][:, row], -np.sort(-expected, axis=1), rtol=1e-12)
    np.testing.assert_array_equal(read[RANKING][:, 0], np.argsort(-predictions.logits, axis=1))
    np.testing.assert_allclose(read[DOUBTS], doubt, rtol=1e-12)
    answer = interpreter.interpret({**outputs, **read}, 7, top_k=1)
    assert answer["doubt"] == pytest.approx(doubt[7])


def test_an_image_that_stops_early_has_no_doubt_and_the_others_have_theirs(card, fitted):
    predictions = network(6, 6)
    branch_logits, logits = predictions.branch_logits.copy(), predictions.logits.copy()
    branch_logits[2, 1:], logits[2] = np.nan, np.nan
    interpreter = Interpreter(card)
    outputs = {
        LOGITS: logits,
        BRANCH_LOGITS: branch_logits,
        BRANCH_WEIGHTS: np.broadcast_to(predictions.branch_weights, branch_logits.shape),
        STOPS: np.array([2, 2, 0, 2, 2, 2]),
    }
    read = interpreter.read(outputs)
    assert np.isnan(read[DOUBTS]).tolist() == [False, False, True, False, False, False]
    answers = [interpreter.interpret({**outputs, **read}, image, 1, adaptive=True)["doubt"] for image in range(6)]
    expected = said(predictions, fitted)[2].tolist()
    expected[2] = None
    assert answers == [None if value is None else pytest.approx(value) for value in expected]


def test_a_card_without_doubt_has_answers_without(card):
    predictions = network(1, 7)
    outputs = {
        LOGITS: predictions.logits,
        BRANCH_LOGITS: predictions.branch_logits,
        BRANCH_WEIGHTS: predictions.branch_weights[None],
    }
    interpreter = Interpreter(card.model_copy(update={"doubt": None}))
    assert "doubt" not in interpreter.interpret({**outputs, **interpreter.read(outputs)}, 0, 1)
