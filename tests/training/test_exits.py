"""Thresholds keep their promise and save what can be saved; the work of a stage is what a hand computation says."""

from itertools import product

import numpy as np
import pytest

from model.contract import InputSpec
from model.registry import create_model
from training import exits
from training.calibration import Predictions
from training.exits import PROMISES, fit_exits, fit_thresholds, stopping_stages
from training.work import stage_effort, stage_work

WORK = (0.3, 0.6, 1.0)


def spec(size=32, channels=3):
    return InputSpec(
        height=size, width=size, channels=channels, mean=(0,) * channels, std=(1,) * channels, resize="crop"
    )


@pytest.fixture
def confidence_and_loss():
    """Of 60 images and two stages: the surer a stage, the rarer it gives anything up; the deeper one less so."""
    random = np.random.default_rng(0)
    confidence = random.uniform(0.3, 1, (60, 2))
    loss = (random.uniform(size=(60, 2)) > confidence + np.array([0, 0.2])) * random.uniform(0, 1, (60, 2))
    return confidence, loss


def mean_cost(confidence, loss, thresholds, work=WORK):
    limits = np.array([np.inf if threshold is None else threshold for threshold in thresholds])
    stops = stopping_stages(confidence, limits)
    padded = np.append(loss, np.zeros((len(loss), 1)), axis=1)
    return padded[np.arange(len(loss)), stops].mean(), np.take(work, stops).mean()


def test_an_image_stops_at_the_first_stage_that_is_sure():
    confidence = np.array([[0.9, 0.1], [0.1, 0.9], [0.9, 0.9], [0.1, 0.1]])
    assert stopping_stages(confidence, np.array([0.5, 0.5])).tolist() == [0, 1, 0, 2]
    assert stopping_stages(confidence, np.array([np.inf, 0.5])).tolist() == [2, 1, 1, 2]
    assert stopping_stages(confidence, np.array([0.9, np.inf])).tolist() == [0, 2, 0, 2]


@pytest.mark.parametrize("max_loss", [0, 0.002, 0.01, 0.05, 0.2])
def test_the_promise_holds_and_hardly_any_thresholds_save_more(confidence_and_loss, max_loss):
    confidence, loss = confidence_and_loss
    found_loss, found_work = mean_cost(confidence, loss, *fit_thresholds(confidence, loss, WORK, [max_loss]))
    assert found_loss <= max_loss
    every = [mean_cost(confidence, loss, thresholds)
             for thresholds in product(*([*np.unique(column), np.inf] for column in confidence.T))]  # fmt: skip
    least = min(work for lost, work in every if lost <= max_loss)
    assert least - 1e-9 <= found_work <= least + 0.03


def test_who_may_lose_more_works_no_more(confidence_and_loss):
    confidence, loss = confidence_and_loss
    works = [
        mean_cost(confidence, loss, *fit_thresholds(confidence, loss, WORK, [max_loss]))[1]
        for max_loss in (0, *PROMISES, 0.1, 1)
    ]
    assert works == sorted(works, reverse=True)
    assert works[0] > works[-1] == pytest.approx(0.3)


def test_stages_that_always_lose_are_never_stopped_at():
    confidence, loss = np.full((10, 2), 0.99), np.ones((10, 2))
    assert fit_thresholds(confidence, loss, WORK, [0.05]) == [(None, None)]


def test_stages_that_never_lose_are_stopped_at_once():
    confidence = np.linspace(0.2, 1, 20).reshape(10, 2)
    ((first, _),) = fit_thresholds(confidence, np.zeros((10, 2)), WORK, [0])
    assert first <= confidence[:, 0].min()
    assert mean_cost(confidence, np.zeros((10, 2)), (first, None))[1] == pytest.approx(WORK[0])


def predictions(seed, count=2000):
    """Three calibrated stages, each knowing more of the truth than the one before; the last is all of the answer.

    Evidence of a class is normal around 1 for the true one and 0 for others, with deviation d: its logit is evidence
    over d squared.
    """
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    deviation = np.array([0.6, 0.4, 0.25])[:, np.newaxis]
    steps = random.normal(0, 1, (count, 3, 4)) * np.sqrt(np.append(deviation[:-1] ** 2 - deviation[1:] ** 2, [[0]], 0))
    shared = random.normal(0, deviation[-1], (count, 1, 4))
    evidence = np.eye(4)[labels][:, np.newaxis] + shared + np.flip(np.cumsum(np.flip(steps, 1), axis=1), 1)
    weights = np.array([[0.0] * 4, [0.0] * 4, [1.0] * 4])
    return Predictions(evidence / deviation**2, weights, labels)


def test_policies_say_what_they_do_on_test():
    held_out, test = predictions(0), predictions(1)
    policies = fit_exits(held_out, test, np.ones((3, 4)), 1.0, work=WORK)
    assert [policy.max_loss for policy in policies] == list(PROMISES)
    full = (test.logits.argmax(axis=1) == test.labels).mean()
    for policy in policies:
        assert sum(policy.stops) == pytest.approx(1)
        assert policy.work == pytest.approx(np.dot(policy.stops, WORK))
        assert full - policy.accuracy <= policy.max_loss + 3 * np.sqrt(policy.max_loss / len(test.labels)) + 1e-3
    works = [policy.work for policy in policies]
    assert works == sorted(works, reverse=True)
    assert works[-1] < 0.9


def test_no_image_is_asked_where_asking_costs_more_than_it_saves(monkeypatch):
    held_out, test = predictions(0), predictions(1)
    monkeypatch.setattr(exits, "CUT", 0.0)
    free = fit_exits(held_out, test, np.ones((3, 4)), 1.0, work=(0.5, 0.51, 1))
    assert free[-1].thresholds[0] is not None
    assert free[-1].thresholds[1] is not None
    monkeypatch.setattr(exits, "CUT", 0.05)  # both stages save as much: one is enough
    dear = fit_exits(held_out, test, np.ones((3, 4)), 1.0, work=(0.5, 0.51, 1))
    assert {policy.thresholds[0] for policy in dear} == {None}
    assert dear[-1].thresholds[1] is not None
    monkeypatch.setattr(exits, "CUT", 0.9)
    assert {policy.thresholds for policy in fit_exits(held_out, test, np.ones((3, 4)), 1.0, work=WORK)} == {
        (None, None)
    }


def test_a_network_of_one_stage_has_no_exits():
    one = predictions(0)
    assert fit_exits(Predictions(one.branch_logits[:, 2:], one.branch_weights[2:], one.labels), one, np.ones((1, 4)),
                     1.0, work=(1.0,)) == ()  # fmt: skip


def test_work_of_vgg16_is_what_a_hand_computation_says():
    network = create_model("vgg16", method="S3", num_classes=10, width=0.5, taps=[4, 7, 10, 13], image_size=(32, 32))
    sides = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    channels = [3, 32, 32, 64, 64, 128, 128, 128, 256, 256, 256, 256, 256, 256]
    kernels = [9 * channels[i] * channels[i + 1] for i in range(13)]
    multiplications = [side**2 * kernel for side, kernel in zip(sides, kernels, strict=True)]
    weights = [kernel + 2 * wide for kernel, wide in zip(kernels, channels[1:], strict=True)]  # and batch norm's
    done = stage_effort(network, spec())
    depths = (4, 7, 10, 13)
    assert [stage.multiplications // 2 for stage in done] == [sum(multiplications[:depth]) for depth in depths]
    assert [stage.weights for stage in done] == [sum(weights[:depth]) for depth in depths]
    shares = [
        (sum(multiplications[:depth]) / sum(multiplications) + sum(weights[:depth]) / sum(weights)) / 2
        for depth in depths
    ]
    assert stage_work(network, spec()) == pytest.approx(shares, rel=1e-9)


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2", "afi_resnet32", "mrla_light_resnet50"])
def test_work_rises_from_stage_to_stage(name):
    network = create_model(name, method="S3", num_classes=10, image_size=(32, 32))
    work = stage_work(network, spec())
    assert list(work) == sorted(set(work))
    assert (work[0] > 0, work[-1]) == (True, 1)


def test_with_a_top_down_path_no_stage_can_answer_early():
    network = create_model("vgg16", method="S3", num_classes=4, width=0.1, neck="aff", image_size=(32, 32))
    work = stage_work(network, spec())
    assert min(work) > 0.9
    held_out = predictions(0)
    assert fit_exits(held_out, held_out, np.ones((3, 4)), 1.0, work=(1.0, 0.99, 0.98)) == ()
