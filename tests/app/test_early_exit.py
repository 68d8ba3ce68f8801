"""Answers that stop early: of the bundled network, told so by thresholds on its card."""

import numpy as np
import pytest

from app.answers import CONFIDENCES, RANKING, READ_OUTPUTS, Interpreter, ReadNetwork
from app.early_exit import EarlyExit
from app.inference import STOPS
from app.session import ModelError, Session
from app.settings import Settings
from model.contract import BRANCH_LOGITS, BRANCH_WEIGHTS, LOGITS
from model.cut import CONFIDENCE_READ
from model.explain import readings
from model.images import read_input

CPU = Settings(provider="cpu", threads=1)
NEVER = np.inf


@pytest.fixture
def exiting(artefact, rewrite_card):
    """The bundled artefact, whose card has exits."""
    policies = [
        {"max_loss": 0.001, "thresholds": [None, 0.5, 0.9], "accuracy": 0.99, "work": 0.7, "stops": [0, 0.5, 0.3, 0.2]},
        {"max_loss": 0.01, "thresholds": [0, None, None], "accuracy": 0.5, "work": 0.3, "stops": [1, 0, 0, 0]},
    ]
    rewrite_card(artefact, exits=policies)
    return artefact


@pytest.fixture
def session(exiting):
    return Session(exiting, CPU)


@pytest.fixture
def images(session, photographs):
    """Real photographs, upright and upside down: stages are sure of some and not of others."""
    upright = np.stack([read_input(path.read_bytes(), session.card.input) for path in photographs.values()])
    return np.concatenate([upright, upright[:, ::-1], 255 - upright])


def confidences(session, images):
    """Of all stages' readings, (N, B), by the whole network."""
    return readings(session.run(images, [BRANCH_LOGITS])[BRANCH_LOGITS], session.card.reading_scales).max(axis=2)


def test_an_image_that_never_stops_has_all_that_it_would_have_had(session, images):
    names = list(session.card.outputs)
    whole = session.run(images, names)
    pieces = session.run(images, names, np.full((len(images), 3), NEVER))
    for name in (LOGITS, BRANCH_LOGITS, BRANCH_WEIGHTS):
        np.testing.assert_allclose(pieces[name], whole[name], rtol=1e-5, atol=1e-5)
    assert (pieces[STOPS] == 3).all()


def test_each_image_stops_at_the_first_stage_that_is_sure(session, images):
    sure = confidences(session, images)
    thresholds = np.tile(np.quantile(sure[:, :3], 0.45, axis=0), (len(images), 1))  # between two images
    outputs = session.run(images, [LOGITS, BRANCH_LOGITS], thresholds)
    reaches = sure[:, :3] >= thresholds
    expected = np.where(reaches.any(axis=1), reaches.argmax(axis=1), 3)
    assert len(set(expected)) >= 3  # or the test would say little
    np.testing.assert_array_equal(outputs[STOPS], expected)
    whole = session.run(images, [LOGITS, BRANCH_LOGITS])
    for place, stop in enumerate(expected):
        np.testing.assert_allclose(
            outputs[BRANCH_LOGITS][place, : stop + 1], whole[BRANCH_LOGITS][place, : stop + 1], rtol=1e-4, atol=1e-4
        )
        assert np.isnan(outputs[BRANCH_LOGITS][place, stop + 1 :]).all()
        if stop == 3:
            np.testing.assert_allclose(outputs[LOGITS][place], whole[LOGITS][place], rtol=1e-5, atol=1e-5)
        else:
            assert np.isnan(outputs[LOGITS][place]).all()


def test_the_graph_is_cut_only_where_some_promise_lets_images_stop(artefact, rewrite_card):
    policy = {"accuracy": 1, "work": 1, "stops": [0, 0, 0, 1]}
    thresholds = {0.001: [None, None, None], 0.002: [None, 0.9, None], 0.003: [None, 0.8, None]}
    rewrite_card(artefact, exits=[policy | {"max_loss": loss, "thresholds": at} for loss, at in thresholds.items()])
    session = Session(artefact, CPU)
    assert session._early_exit._branches == [(0, 1), (2, 3)]
    images = np.zeros((3, 32, 32, 1), np.uint8)
    outputs = session.run(images, [LOGITS], np.array([[NEVER, 0, NEVER], [NEVER] * 3, [NEVER, 0, NEVER]]))
    assert outputs[STOPS].tolist() == [1, 3, 1]
    whole = session.run(images, [BRANCH_LOGITS])[BRANCH_LOGITS]
    np.testing.assert_allclose(outputs[BRANCH_LOGITS][:, :2], whole[:, :2], rtol=1e-5, atol=1e-5)


def test_thresholds_are_each_image_s_own(session, images):
    images = images[:4]
    thresholds = np.full((4, 3), NEVER)
    thresholds[0, 0] = thresholds[1, 1] = thresholds[3, 2] = 0
    assert session.run(images, [LOGITS], thresholds)[STOPS].tolist() == [0, 1, 3, 2]


def test_nothing_is_computed_for_an_image_that_has_stopped(session, images, monkeypatch):
    ran = []

    class Counting:
        def __init__(self, session):
            self.session = session

        def run(self, names, feeds):
            ran.append({len(values) for values in feeds.values()})
            return self.session.run(names, feeds)

    monkeypatch.setattr(session._early_exit, "_sessions", [Counting(s) for s in session._early_exit._sessions])
    thresholds = np.full((6, 3), NEVER)
    thresholds[0, 0] = thresholds[1, 1] = thresholds[2, 1] = 0
    session.run(images[:6], [LOGITS], thresholds)
    assert ran == [{6}, {5}, {3}, {3}]
    ran.clear()
    session.run(images[:6], [LOGITS], np.zeros((6, 3)))
    assert ran == [{6}]


def test_the_answer_is_the_reading_of_the_stage_that_gave_it(session, images):
    thresholds = np.full((len(images), 3), NEVER)
    thresholds[::2, 1] = 0
    network = ReadNetwork(session, Interpreter(session.card))
    read = network.run(images, READ_OUTPUTS, thresholds)
    whole = network.run(images, READ_OUTPUTS)
    # row 0 is the answer, row 2 the reading of stage 1
    np.testing.assert_allclose(read[CONFIDENCES][::2, 0], whole[CONFIDENCES][::2, 2], atol=1e-5)
    np.testing.assert_array_equal(read[RANKING][::2, 0, 0], whole[RANKING][::2, 2, 0])
    np.testing.assert_allclose(read[CONFIDENCES][1::2], whole[CONFIDENCES][1::2], atol=1e-5)
    assert np.isnan(read[CONFIDENCES][::2, 3:]).all()


def test_a_cut_that_gives_other_numbers_is_refused(exiting, monkeypatch):
    honest = EarlyExit.run

    def off(self, images, thresholds):
        outputs = honest(self, images, thresholds)
        return {**outputs, LOGITS: outputs[LOGITS] * 1.01}

    monkeypatch.setattr(EarlyExit, "run", off)
    with pytest.raises(ModelError, match="`logits` stage by stage is not what the whole graph gives"):
        Session(exiting, CPU)


def test_numbers_that_are_not_finite_are_not_taken_for_a_stop(session, images, monkeypatch):
    class Broken:
        def __init__(self, session):
            self.session = session

        def run(self, names, feeds):
            values = dict(zip(names, self.session.run(names, feeds), strict=True))
            return [value * np.nan if name == CONFIDENCE_READ else value for name, value in values.items()]

    monkeypatch.setattr(session._early_exit, "_sessions", [Broken(s) for s in session._early_exit._sessions])
    network = ReadNetwork(session, Interpreter(session.card))
    read = network.run(images[:2], READ_OUTPUTS, np.zeros((2, 3)))
    assert read[STOPS].tolist() == [3, 3]  # who is not sure of anything goes on
