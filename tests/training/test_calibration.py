"""Fits recover what they should, and what users see does not depend on how a network happens to be written down."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from model.explain import contributions, fused_confidences, readings, shares, softmax
from model.registry import create_model
from training.calibration import (
    Predictions,
    adaptive_ece,
    branch_accuracy,
    branch_ece,
    branch_nll,
    class_recall,
    confusion,
    ece,
    fit_confidence,
    fit_reading_scales,
    fit_stage_factors,
    fit_temperature,
    fused_accuracy,
    fused_auroc,
    fused_ece,
    fused_nll,
    held_out_figures,
    importance,
    macro_f1,
)
from training.data import load_data
from training.loop import predict
from training.recipe import Recipe, resolve_recipe


def sampled(scale, count=20_000, classes=5, seed=0):
    """Logits of one branch whose labels are drawn from softmax(scale * logits)."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(count, classes))
    chances = softmax(scale * logits)
    labels = (chances.cumsum(axis=1) > random.random((count, 1))).argmax(axis=1)
    return logits, labels


@pytest.mark.parametrize("scale", [2.0, 0.3, -1.5])
@pytest.mark.parametrize("unit", [1.0, 1e-4, -300.0])
def test_the_scale_that_made_the_labels_is_found_whatever_the_units(scale, unit):
    logits, labels = sampled(scale)
    weight = np.full((1, 5), 0.7 / unit)
    found = fit_reading_scales(Predictions(logits[:, None] * unit, weight, labels), per_class=False)
    np.testing.assert_allclose(found * unit, scale, rtol=0.05)


def test_one_scale_a_class_is_found_where_classes_differ():
    scales = np.array([2.0, -1.0, 0.5, 1.0, 3.0])
    logits, labels = sampled(scales)
    found = fit_reading_scales(Predictions(logits[:, None], np.ones((1, 5)), labels), per_class=True)
    np.testing.assert_allclose(found[0], scales, rtol=0.1)


def test_a_branch_that_is_never_wrong_gets_a_finite_scale():
    labels = np.arange(100) % 4
    logits = np.eye(4)[labels]
    predictions = Predictions(logits[:, None], np.ones((1, 4)), labels)
    scale = fit_reading_scales(predictions, per_class=False)
    # Platt's targets: 100 right in 100 makes the next right with 101 in 102
    assert softmax(scale * logits).max(axis=1) == pytest.approx(101 / 102, rel=1e-4)
    assert softmax(logits / fit_temperature(predictions)).max(axis=1) == pytest.approx(101 / 102, rel=1e-4)
    temperature, power = fit_confidence(predictions)
    assert fused_confidences(logits, temperature, power).max(axis=1) == pytest.approx(101 / 102, rel=1e-4)
    assert power == pytest.approx(1, abs=1e-3)  # of equal distances none tells


def test_a_branch_that_never_varies_keeps_its_weight():
    predictions = Predictions(np.ones((10, 1, 3)), np.full((1, 3), 0.4), np.arange(10) % 3)
    assert fit_reading_scales(predictions, per_class=False).tolist() == [[0.4] * 3]


def test_a_class_that_never_varies_keeps_its_weight_and_no_other_does():
    logits, labels = sampled(2.0)
    logits[:, 1] = 0
    found = fit_reading_scales(Predictions(logits[:, None], np.full((1, 5), 0.7), labels), per_class=True)
    assert found[0, 1] == 0.7
    assert (found[0, [0, 2, 3, 4]] > 1).all()


def test_temperature_calibrates_and_never_changes_the_ranking():
    logits, labels = sampled(0.5)
    predictions = Predictions(logits[:, None] * 4, np.ones((1, 5)), labels)  # eight times too sure
    temperature = fit_temperature(predictions)
    assert temperature == pytest.approx(8, rel=0.05)
    assert fused_ece(predictions, temperature) < 0.01
    assert fused_ece(predictions, 1.0) > 0.3
    for unit in (1e-5, 1e5):
        other = Predictions(predictions.branch_logits * unit, predictions.branch_weights, labels)
        assert fit_temperature(other) == pytest.approx(temperature * unit, rel=0.01)
    upside_down = Predictions(-predictions.branch_logits, predictions.branch_weights, labels)
    assert fit_temperature(upside_down) == 1.0


def drawn(probabilities, seed=0):
    """Labels of these very probabilities."""
    random = np.random.default_rng(seed)
    return (probabilities.cumsum(axis=1) > random.random((len(probabilities), 1))).argmax(axis=1)


def of_one_stage(logits, labels):
    return Predictions(logits[:, None], np.ones((1, logits.shape[1])), labels)


@pytest.mark.parametrize(("temperature", "power"), [(1.0, 1.0), (0.5, 1.6), (3.0, 1.3), (0.2, 0.7)])
@pytest.mark.parametrize("unit", [1.0, 1e-3, 500.0])
def test_the_temperature_and_power_that_made_the_labels_are_found_whatever_the_units(temperature, power, unit):
    logits = np.random.default_rng(1).normal(0, 2, size=(40_000, 6))
    truth = fused_confidences(logits, temperature, power)
    predictions = of_one_stage(logits * unit, drawn(truth))
    found = fit_confidence(predictions)
    assert found == (pytest.approx(temperature * unit, rel=0.06), pytest.approx(power, rel=0.06))
    assert fused_ece(predictions, *found) < 0.008 > ece(truth, predictions.labels)
    assert adaptive_ece(fused_confidences(predictions.logits, *found), predictions.labels) < 0.008


def test_few_images_do_not_move_the_power_far():
    logits, labels = sampled(2.0, count=30)
    assert fit_confidence(of_one_stage(logits, labels))[1] == pytest.approx(1, abs=0.4)
    assert fit_confidence(of_one_stage(-logits, labels)) == (1, 1)  # worse than chance


def test_gaps_that_teach_nothing_of_the_power_leave_it_at_1():
    """Nearly all answers are one class, with gaps almost alike: the most likely power is beyond any bounds."""
    labels = np.arange(400) % 2
    logits = 0.1 * np.random.default_rng(1).normal(size=(400, 2)) + 0.1 * np.eye(2)[labels]
    logits[:, 0] += 2
    predictions = of_one_stage(logits, labels)
    assert fit_confidence(predictions) == (fit_temperature(predictions), 1)


@pytest.mark.parametrize("power", [0.6, 1.0, 1.7, 3.0])
def test_no_fit_changes_the_ranking_and_none_sends_a_probability_out_of_range(power):
    logits = np.random.default_rng(2).normal(0, 1, size=(500, 10)).astype(np.float32)
    said = fused_confidences(logits, 0.7, power)
    np.testing.assert_array_equal(said.argsort(axis=1), logits.argsort(axis=1))
    np.testing.assert_allclose(said.sum(axis=1), 1)
    np.testing.assert_allclose(fused_confidences(logits + 5, 0.7, power), said, rtol=1e-4)
    np.testing.assert_allclose(fused_confidences(logits, 0.7, 1), softmax(logits.astype(float) / 0.7))


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_fitting_never_lowers_the_likelihood_of_what_it_is_fitted_on(power):
    logits = np.random.default_rng(3).normal(0, 2, size=(3000, 4))
    predictions = of_one_stage(logits, drawn(fused_confidences(logits, 0.4, power)))
    plain, fitted = fit_temperature(predictions), fit_confidence(predictions)
    slack = 1e-3  # Platt's targets and the prior are not the labels
    assert fused_nll(predictions, *fitted) <= fused_nll(predictions, plain) + slack
    assert fused_nll(predictions, plain) <= fused_nll(predictions, 1) + slack
    scales = fit_reading_scales(predictions, per_class=True)
    assert branch_nll(predictions, scales)[0] <= branch_nll(predictions, np.ones((1, 4)))[0] + slack
    if power > 1:
        assert fused_nll(predictions, *fitted) < fused_nll(predictions, plain) - 0.003


FACTORS = np.array([0.05, 0.8, 1.6])


def weighed(count, seed=0):
    """Three stages, the first of which says little of what it seems to, and labels drawn from their true sum."""
    random = np.random.default_rng(seed)
    branch_logits = random.normal(size=(count, 3, 5))
    weights = np.repeat([[2.0], [-0.5], [1.0]], 5, axis=1)
    chances = softmax((FACTORS[:, None] * weights * branch_logits).sum(axis=1))
    labels = (chances.cumsum(axis=1) > random.random((count, 1))).argmax(axis=1)
    return Predictions(branch_logits, weights, labels)


def with_factors(predictions, factors):
    return replace(predictions, branch_weights=predictions.branch_weights * factors[:, None])


def test_the_factors_of_stages_that_made_the_labels_are_found():
    told = weighed(20_000)
    found = fit_stage_factors(told)
    np.testing.assert_allclose(found / fit_temperature(told), FACTORS, atol=0.05)
    after, other = with_factors(told, found), weighed(20_000, seed=1)
    assert fit_temperature(after) == pytest.approx(fit_temperature(told), rel=0.02)  # the logits are as large as before
    assert fused_nll(after, fit_temperature(after)) < fused_nll(told, fit_temperature(told)) - 0.05
    assert fused_accuracy(with_factors(other, found)) > fused_accuracy(other) + 0.02
    np.testing.assert_allclose(fit_stage_factors(after), 1, atol=0.1)  # once is enough


def test_few_images_do_not_move_the_factors_far():
    found = np.log([fit_stage_factors(weighed(8, seed)) for seed in range(20)])
    assert (np.ptp(found, axis=1) < 1.5).all()  # of one another: all alike would do
    silent = Predictions(np.zeros((4, 2, 3)), np.ones((2, 3)), np.array([0, 1, 2, 0]))
    np.testing.assert_array_equal(fit_stage_factors(silent), 1)


def test_likelihood_by_hand():
    predictions = of_one_stage(np.log([[3.0, 1], [1, 4]]), np.array([0, 0]))
    assert fused_nll(predictions, 1) == pytest.approx(-(np.log(3 / 4) + np.log(1 / 5)) / 2)
    assert branch_nll(predictions, np.zeros((1, 2))) == [pytest.approx(np.log(2))]


def test_accuracies_by_hand():
    labels = np.array([0, 1, 1])
    branch_logits = np.array([[[1.0, 0], [0, 1]], [[0, 1], [1, 0]], [[0, 1], [0, 1]]])
    predictions = Predictions(branch_logits, np.array([[2.0, 2], [-1, -1]]), labels)
    assert fused_accuracy(predictions) == 1
    assert branch_accuracy(predictions, np.array([[1.0, 1], [-1, -1]])) == [1, pytest.approx(2 / 3)]
    np.testing.assert_allclose(importance(predictions), [2 / 3, 1 / 3])
    assert branch_ece(predictions, np.zeros((2, 2))) == pytest.approx([1 / 6, 1 / 6], abs=1e-6)


# Figures by class, against their definitions written out.


def imbalanced(classes, count=300, seed=0):
    """Two stages' logits of classes each half as common as the one before; the last is never answered.

    In quarters, so that there are ties, and that these are as exact in one class's confidence as in another's.
    """
    random = np.random.default_rng(seed)
    chances = 0.5 ** np.arange(classes)
    labels = np.concatenate([np.arange(classes), random.choice(classes, count, p=chances / chances.sum())])
    branch_logits = (4 * random.normal(size=(len(labels), 2, classes))).round() / 4
    branch_logits[np.arange(len(labels)), :, labels] += 0.75
    branch_logits[:, :, -1] -= 5
    return Predictions(branch_logits, np.full((2, classes), 0.5), labels)


def area(scores, positive):
    """Chance that a positive scores above a negative, ties counting half: AUROC by its meaning, pair by pair."""
    differences = scores[positive][:, None] - scores[~positive]
    return (differences > 0).mean() + (differences == 0).mean() / 2


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_figures_by_class_are_what_their_definitions_say(classes):
    predictions = imbalanced(classes)
    labels, answers = predictions.labels, predictions.logits.argmax(axis=1)
    confidence = softmax(predictions.logits / 0.5)
    recalls, f1s, areas = [], [], []
    for label in range(classes):
        right = ((answers == label) & (labels == label)).sum()
        recall, precision = right / (labels == label).sum(), right / max(1, (answers == label).sum())
        recalls.append(recall)
        f1s.append(2 * recall * precision / (recall + precision) if right else 0)
        areas.append(area(confidence[:, label], labels == label))
    assert recalls[-1] == 0 < recalls[0]
    counts = confusion(predictions)
    assert counts[1, 0] == ((labels == 1) & (answers == 0)).sum() != counts[0, 1]
    np.testing.assert_allclose(class_recall(counts), recalls)
    assert macro_f1(predictions) == pytest.approx(np.mean(f1s))
    assert fused_auroc(predictions, 0.5) == pytest.approx(np.mean(areas))
    if classes == 2:
        assert fused_auroc(predictions, 0.5) == pytest.approx(areas[1])


def test_recalls_weighted_by_images_are_the_accuracy():
    predictions = imbalanced(5)
    counts = confusion(predictions)
    images = counts.sum(axis=1)
    assert images.tolist() == np.bincount(predictions.labels).tolist()
    assert (class_recall(counts) * images).sum() / images.sum() == pytest.approx(fused_accuracy(predictions))


def test_renaming_the_classes_changes_no_mean_and_moves_the_recalls():
    tied, order = imbalanced(5), np.array([3, 0, 4, 1, 2])
    untied = tied.branch_logits + np.random.default_rng(1).normal(size=tied.branch_logits.shape) / 100
    predictions = Predictions(untied, tied.branch_weights, tied.labels)
    renamed = Predictions(untied[:, :, order], tied.branch_weights, order.argsort()[tied.labels])
    assert held_out_figures(renamed) == pytest.approx(held_out_figures(predictions))
    np.testing.assert_array_equal(class_recall(confusion(renamed)), class_recall(confusion(predictions))[order])


def test_one_answer_for_everything_is_accurate_where_a_class_is_rare_and_shows_in_the_other_figures():
    labels = np.repeat([0, 1], [95, 5])
    always_good = Predictions(np.tile([[[1.0, 0.0]]], (100, 1, 1)), np.ones((1, 2)), labels)
    assert held_out_figures(always_good) == {
        "val_accuracy": 0.95,
        "val_macro_f1": pytest.approx(2 * 95 / (100 + 95) / 2),
        "val_auroc": 0.5,
    }
    assert class_recall(confusion(always_good)).tolist() == [1, 0]


@pytest.mark.parametrize(("classes", "count"), [(2, 21), (2, 22), (3, 14), (3, 28), (7, 13), (10, 359), (100, 130)])
def test_a_perfect_network_has_figures_of_one_and_none_above(classes, count):
    """Sums in float32 pass 1 here, of a ROC curve's steps and of a hundred hundredths; a card refuses that."""
    labels = np.arange(count) % classes
    noise = np.random.default_rng(count).normal(size=(count, 1, classes))
    perfect = Predictions(np.eye(classes)[labels][:, None] * 40 + noise, np.ones((1, classes)), labels)
    assert fused_auroc(perfect, 4.0) == pytest.approx(1)
    assert fused_auroc(perfect, 4.0) <= 1
    assert macro_f1(perfect) == 1
    assert (class_recall(confusion(perfect)) == 1).all()
    upside_down = Predictions(perfect.branch_logits, -perfect.branch_weights, labels)
    assert fused_auroc(upside_down, 4.0) == pytest.approx(0, abs=1e-6)


def test_the_figures_of_an_epoch_are_those_of_the_card_at_temperature_one():
    predictions = imbalanced(4)
    assert held_out_figures(predictions) == {
        "val_accuracy": fused_accuracy(predictions),
        "val_macro_f1": macro_f1(predictions),
        "val_auroc": fused_auroc(predictions, 1.0),
    }
    assert fused_auroc(predictions, 3.0) != fused_auroc(predictions, 1.0)


# What a user sees must not depend on the choice among equal networks (papers: "what the weights mean").


@pytest.fixture(scope="module")
def digits():
    return load_data(resolve_recipe("digits", {}))


@pytest.fixture(scope="module")
def trained(digits):
    """Narrow networks after some steps on real digits: features and heads that mean something."""
    made = {}

    def network(method, shared_heads=True):
        key = method, shared_heads
        if key not in made:
            made[key] = _train(method, shared_heads, digits)
        return copy.deepcopy(made[key])

    return network


def _train(method, shared_heads, digits):
    torch.manual_seed(0)
    network = create_model("vgg16", method=method, width=0.1, in_channels=1, shared_heads=shared_heads)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    images = (digits.train.images.float() / 255 - 0.3).permute(0, 3, 1, 2)
    for step in range(120):
        batch = (torch.arange(64) + 64 * step) % len(images)
        optimizer.zero_grad()
        functional.cross_entropy(network(images[batch]).logits, digits.train.labels[batch]).backward()
        optimizer.step()
    return network


def seen(network, digits):
    """Everything an answer shows of the test digits, fitted on the held-out ones."""
    held_out, test = (predict(network, digits, split, Recipe()) for split in (digits.val, digits.test))
    scales = fit_reading_scales(held_out, per_class=network.method.attention == "class")
    answers = test.logits.argmax(axis=1)
    return {
        "answers": answers,
        "confidence": fused_confidences(test.logits, *fit_confidence(held_out)),
        "readings": readings(test.branch_logits, scales),
        "shares": shares(contributions(test.branch_logits, test.branch_weights), answers),
        "importance": importance(held_out),
    }


def assert_the_same(before, after):
    assert np.array_equal(before.pop("answers"), after.pop("answers"))
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, atol=2e-3, err_msg=name)


@torch.no_grad()
def rescale_head(network, name, factor):
    """Multiply a head by `factor` (a number, or one per class), and divide the weights of all its branches."""
    head = network.heads[name]
    factor = torch.as_tensor(factor).expand(10)
    head.weight.mul_(factor[:, None, None, None])
    head.bias.mul_(factor)
    for branch, its_head in enumerate(network.head_names):
        if its_head == name:
            network.attention.weight[branch] /= factor[: network.attention.weight.shape[1]]


@pytest.mark.parametrize("factor", [-1.0, 5.0, -0.2])
@pytest.mark.parametrize("shared_heads", [True, False])
@pytest.mark.parametrize("method", ["S1", "S3"])
def test_flipping_or_rescaling_a_head_and_its_weights_changes_nothing(method, shared_heads, factor, digits, trained):
    network = trained(method, shared_heads)
    before = seen(network, digits)
    assert before["readings"].max() > 0.5  # it believes something
    rescale_head(network, network.head_names[-1], factor)
    assert_the_same(before, seen(network, digits))


def test_with_a_weight_a_class_each_class_may_flip_by_itself(digits, trained):
    network = trained("S3")
    before = seen(network, digits)
    rescale_head(network, network.head_names[-1], torch.tensor([1.0, -1, 2, -0.5, 1, 1, -3, 1, 1, -1]))
    assert_the_same(before, seen(network, digits))


@pytest.mark.parametrize("method", ["normal", "S0", "S1"])
def test_adding_one_vector_to_all_class_rows_of_a_head_changes_nothing(method, digits, trained):
    network = trained(method)
    before = seen(network, digits)
    head = network.heads[network.head_names[-1]]
    with torch.no_grad():
        head.weight += torch.randn(1, head.weight.shape[1], 1, 1)
        head.bias += 0.7
    assert_the_same(before, seen(network, digits))
